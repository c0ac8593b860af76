"""The model directory against all that can have happened to it: damage, hostile hands, a kill while it is written."""

import copy
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet
import pytest

from user_llm.common import trees
from user_llm.common.files import sha256
from user_llm.data.fields import Number, Text
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.vocabulary import Vocabulary
from user_llm.models.export import is_bare_llm
from user_llm.models.pretrained import checkpoint_files, decoder_config, load_decoder
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.settings import write_settings

FACTS = {"dataset": "toy", "users": 5, "events": 20, "items": 9, "columns": ["item"], "command": "none", "rows": []}


def making(llm: Path, **changes: Any) -> artifact.Making:
    """Return how a model with adapters came about, whose LLM is named."""
    base = artifact.Base(str(llm), checkpoint_files(llm))
    return artifact.Making(base, False, llm, ((".*", ()),), "float32", np.arange(10), FACTS, **changes)


@pytest.fixture(scope="module")
def llm(make_model, tmp_path_factory) -> Path:
    """An LLM as it came."""
    folder = tmp_path_factory.mktemp("llm")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_model("cross").directory / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def written(make_model) -> Personalizer:
    """A model with adapters that has not been saved yet."""
    return dataclasses.replace(make_model("lora").written, identity="")


@pytest.fixture(scope="module")
def named(written, llm, tmp_path_factory) -> Path:
    """A directory that holds adapters and names their LLM."""
    directory = tmp_path_factory.mktemp("named") / "model"
    artifact.save(directory, written, making(llm))
    return directory


@pytest.fixture
def directory(make_model, tmp_path) -> Path:
    """A copy of a directory that holds its LLM."""
    return shutil.copytree(make_model("cross").directory, tmp_path / "model")


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "user_llm.json").read_text())


def seal(directory: Path, settings: dict[str, Any]) -> None:
    """Write settings as somebody does who knows how they are sealed, with the checksums of the files that are there."""
    for name in settings["files"]:
        if isinstance(settings["files"], dict) and isinstance(settings["files"][name], str) and (directory / name).is_file():
            settings["files"][name] = sha256(directory / name)
    write_settings(directory, {key: value for key, value in settings.items() if key != "seal"})


def refused(directory: Path, words: str | None = None, **options: Any) -> str:
    """Return the one sentence by which a directory is refused."""
    with pytest.raises(ValueError, match=words) as error:
        artifact.load(directory, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900
    return str(error.value)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


# --- damage ---


@pytest.mark.parametrize(
    "damage", [flip, lambda file: os.truncate(file, file.stat().st_size - 9), Path.unlink], ids=["flip", "cut", "miss"]
)
def test_a_damaged_file_is_named(damage, directory, named, tmp_path):
    for whole in (directory, shutil.copytree(named, tmp_path / "named")):
        for file in sorted(whole.iterdir()):
            content = file.read_bytes()
            damage(file)
            if file.name == "README.md":  # it is for people, who may add to it
                assert artifact.load(whole)
            else:
                assert file.name in refused(whole)
            file.write_bytes(content)


def test_settings_changed_by_hand_are_refused(directory):
    settings = settings_of(directory)
    for key in settings:
        changed = copy.deepcopy(settings)
        changed[key] = 2 if key == "format" else "x"
        (directory / "user_llm.json").write_text(json.dumps(changed))
        refused(
            directory,
            "is of format 2, and this version reads 1" if key == "format" else r"user_llm\.json is not as it was written",
        )
    (directory / "user_llm.json").write_text(json.dumps({"format": 1}))
    refused(directory, r"user_llm\.json is not as it was written")


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "special_tokens_map.json", "model.safetensors.index.json"]
)
def test_a_file_that_would_be_read_beside_those_listed_is_refused(name, directory):
    (directory / "LICENSE.txt").write_text("is not read")
    assert artifact.load(directory)
    (directory / name).write_text("{}")
    refused(directory, f"{name} is no file of this model")


@pytest.mark.parametrize("name", ["user_llm.json", "catalogue.parquet", "tokenizer.json", "model.safetensors"])
def test_a_link_that_leads_out_is_refused(name, directory, tmp_path):
    shutil.move(directory / name, tmp_path / name)
    (directory / name).symlink_to(tmp_path / name)
    refused(directory, f"{re.escape(name)} is a link that leads out of")


# --- hostile hands, which know how to seal ---

DEEP = json.loads("[" * 300 + "]" * 300)
HOSTILE = [
    ("format", 0, "'format' is no positive whole number"),
    ("format", 10**30, "'format' is no positive whole number"),
    ("identity", "", "identity='': it must be a text that is not empty"),
    ("identity", 5, "identity=5: it must be a text"),
    ("model", DEEP, "model=.*it must be a section"),
    ("model.decoder.vocab_size", -1, "the LLM's table -1"),
    ("model.decoder.block.heads", 0, "no model has such sizes"),
    ("model.decoder.block.norm_eps", 0.5, "is another one than"),
    ("model.decoder.num_layers", 10**30, r"model\.decoder\.num_layers=1000.*at most 2147483647"),
    ("model.encoder.block.width", 2**31 - 1, r"does not fit the model: encoder.*; and \d+ more"),
    ("model.encoder.max_evnets", 5, r"no key model\.encoder\.max_evnets \(did you mean max_events\?\)"),
    ("model.encoder.schema.features.0.size", 11, "its schema is not that of the vocabulary"),
    ("model.num_items", 8, "8 items in 128 rows, and 9 in the catalogue"),
    ("model.table_rows", 9, "9 items in 9 rows"),
    ("model.unknown", 1, r"no key model\.unknown"),
    ("vocabulary", [], "The vocabulary: is no object"),
    ("vocabulary.schema", DEEP, "'schema' 1: is no object"),
    ("vocabulary.schema.0.size", 10**30, "'size' is no positive whole number"),
    ("vocabulary.fields.unit", "year", "Unknown unit of times"),
    ("vocabulary.names.genres", ["x"], r"catalogue\.parquet, row 1: .* is none of the genres"),
    ("lines.history", "story", r"lines\.history='story': choose titles or summary"),
    ("lines.text_items", -1, r"lines\.text_items=-1: it must be from 0 to 1048576"),
    ("lines.max_title_tokens", True, r"lines\.max_title_tokens=True: it must be a whole number"),
    ("prompts", [], r"prompts=\[\]: it must be a section"),
    ("prompts.next_item", 5, r"prompts\.next_item is of an unknown kind: choose next_item or question"),
    ("prompts.next_item.kind", ["question"], r"prompts\.next_item is of an unknown kind"),
    ("prompts.next_item.code", "x", r"no key prompts\.next_item\.code"),
    ("prompts.next_item.max_tokens", 3, "must fit 3 tokens"),
    ("prompts.favorite.question", "{title.__class__}", "a name alone may stand there"),
    ("prompts.favorite.question", "{title:>999999999}", "a name alone may stand there"),
    ("prompts.favorite.question", "{", r"user_llm\.json: "),
    ("names", {"review": {"1": "x"}}, "the model has no task 'review'"),
    ("names.favorite", {}, "it must be a whole number from 1"),
    ("names.favorite", {"one": "x"}, "has the number 'one'"),
    ("names.favorite", {"9" * 5000: "x"}, "it must be a whole number from 1"),
    ("names.favorite", {"1?": 5}, r"names\.favorite\.1\?=5: it must be a text"),
    ("limits.max_events", 0, "limits.max_events=0 is not what its encoder reads"),
    ("limits.max_events", -1, "limits.max_events=-1: it must be from 0 to 1048576"),
    ("limits.max_events", 2**31 - 1, "limits.max_events=2147483647: it must be from 0 to 1048576"),
    ("limits.batch_size", 0, "limits.batch_size=0: it must be from 1 to 1048576"),
    ("limits.batch_size", 10**30, "limits.batch_size=1000"),
    ("prompts.next_item.max_tokens", 2**31 - 1, r"prompts\.next_item\.max_tokens=2147483647: it must be from 1 to 1048576"),
    ("limits.ranks", 1, "limits.ranks=1: it must be True or False"),
    ("dtype", "object", "dtype='object': choose float32, bfloat16 or float16"),
    ("sharding", [[".*", []]], "sharding=.*it must be a section"),
    ("sharding", {"(a+)+$": []}, "sharding: no 'decoder/"),
    ("sharding.decoder/norm/scale", ["elsewhere"], r"sharding\.decoder/norm/scale\[0\]='elsewhere': choose"),
    ("sharding.decoder/norm/scale", ["data", "data"], "'decoder/norm/scale' names an axis twice"),
    ("sharding.decoder/norm/scale", ["data", "tensor"], "has more entries"),
    ("facts", 5, "facts=5: it must be a section"),
    ("facts.rows", [{"task": 5}], "facts.rows"),
    ("files", [], r"files=\[\]: it must be a section"),
    ("files", {}, "is no file of this model"),
    ("files", {"../secret": "x"}, "'../secret' has a slash"),
    ("files", {"/etc/passwd": "x"}, "'/etc/passwd' has a slash"),
    ("files", {"config.json": 5}, r"files\.config\.json=5: it must be a text"),
    ("llm", {"checkpoint": "/nowhere", "files": {}}, "belongs on the LLM /nowhere: .* say where it is by llm="),
    ("llm", {"checkpoint": 5, "files": {}}, "llm.checkpoint=5: it must be a text"),
    ("llm", {"checkpoint": ".", "files": {"checkpoint/../../secret": "x"}}, "is not the LLM that this model belongs on"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), HOSTILE, ids=[f"{key}={str(value)[:20]}" for key, value, _ in HOSTILE])
def test_settings_of_a_hostile_hand_are_refused(key, value, words, directory):
    settings = settings_of(directory)
    part, (*parents, last) = settings, key.split(".")
    for parent in parents:
        part = part[int(parent)] if isinstance(part, list) else part[parent]
    part[last] = value
    seal(directory, settings)
    refused(directory, words)


def test_a_tokenizer_larger_than_the_table_is_refused(directory):
    backend = json.loads((directory / "tokenizer.json").read_text())
    backend["added_tokens"].append(backend["added_tokens"][-1] | {"id": 999, "content": "<more>"})
    (directory / "tokenizer.json").write_text(json.dumps(backend))
    seal(directory, settings_of(directory))
    refused(directory, "the tokenizer has [0-9]+ tokens, and the LLM's table 280; get the model directory again")


def test_a_type_that_holds_no_fractions_is_refused(directory):
    for dtype in ("int32", "object", "float"[::-1]):
        refused(directory, "is no type of floating-point numbers: choose float32", dtype=dtype)


def test_loading_runs_nothing_of_the_directory(directory):
    """No pickle, no import, no chat template: an audit hook of the interpreter sees none of it."""
    (directory / "evil.py").write_text("raise SystemExit")
    changes = {"chat_template": "{{ raise_exception('rendered') }}", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    seal(directory, settings_of(directory))
    seen: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple) -> None:
        named = str(getattr(arguments[0], "co_filename", "") or arguments[1:]) if event in ("exec", "compile") else ""
        if watching and (
            event in ("pickle.find_class", "subprocess.Popen", "os.system") or "<template>" in named or str(directory) in named
        ):
            seen.append(event)

    sys.addaudithook(hook)
    assert artifact.load(directory).tokenizer.chat_template == changes["chat_template"]
    assert seen == []
    jinja2.Template("{{ 1 }}").render()
    assert seen
    watching = False


# --- the LLM that a directory names ---


def test_a_named_llm_is_found_where_it_is_said_to_be(named, written, llm, tmp_path, monkeypatch):
    assert not (named / "model.safetensors").exists() and (named / "adapter_model.safetensors").exists()
    hidden = llm.with_name("hidden")
    llm.rename(hidden)
    try:
        refused(named, f"belongs on the LLM {llm}: .*Or say where it is by llm=")
        found = artifact.load(named, llm=str(hidden))
    finally:
        hidden.rename(llm)
    loaded, saved, bare = (
        trees.flatten(params) for params in (found.predictor.params, written.predictor.params, {"decoder": load_decoder(llm, decoder_config(llm))})
    )  # fmt: skip
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, bare[path] if is_bare_llm(path) else saved[path])


def test_another_llm_of_the_same_name_is_refused(named, llm, tmp_path):
    for name in ("model.safetensors", "config.json"):
        other = shutil.copytree(llm, tmp_path / name)
        flip(other / name)
        refused(
            named,
            f"{re.escape(str(other))} is not the LLM that this model belongs on .*: {name} is another one",
            llm=str(other),
        )
        (other / name).unlink()
        refused(named, f"{name} is another one", llm=str(other))
    index = shutil.copytree(llm, tmp_path / "index")
    (index / "model.safetensors.index.json").write_text("{}")
    refused(named, r"model\.safetensors\.index\.json is another one", llm=str(index))


def test_an_exported_model_is_the_same_model(named, tmp_path):
    artifact.export(named, tmp_path / "out")
    whole, model = artifact.load(tmp_path / "out"), artifact.load(named)
    assert whole.identity == model.identity
    assert settings_of(tmp_path / "out")["llm"] is None and (tmp_path / "out" / "model.safetensors").exists()
    user = model.encode([{"user": "a", "item": "10", "rating": 3, "timestamp": 1}])
    ours, theirs = model.recommend(user, 9), whole.recommend(user, 9)
    assert [item.id for item in ours] == [item.id for item in theirs]
    artifact.export(tmp_path / "out", tmp_path / "again")
    again = settings_of(tmp_path / "again")
    assert again["identity"] == model.identity and again["files"] == settings_of(tmp_path / "out")["files"]


# --- writing ---


class Killed(BaseException):
    pass


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_a_killed_save_leaves_no_half_directory(written, named, llm, tmp_path, monkeypatch):
    other = dataclasses.replace(written, predictor=dataclasses.replace(written.predictor, max_events=5))
    directory = tmp_path / "model"
    artifact.save(directory, other, making(llm))
    old, new = contents(named), contents(directory)
    assert old != new

    writes, last = 0, 0

    def killing(name, function):
        def run(*arguments, **settings):
            nonlocal writes
            writes += 1
            if writes == last:
                if name == "rmtree" and Path(arguments[0]).is_dir():
                    next(Path(arguments[0]).iterdir()).unlink()  # it is killed amid its work
                raise Killed
            return function(*arguments, **settings)

        return run

    for where, name in (
        (artifact.formats, "save_file"), (artifact.formats.json, "dumps"), (Path, "write_text"), (Path, "rename"), (Path, "replace"),
        (Path, "mkdir"), (shutil, "copy"), (shutil, "rmtree"), (pyarrow.parquet, "write_table"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, killing(name, getattr(where, name)))
    while True:
        shutil.rmtree(directory), shutil.copytree(named, directory)
        writes, last = 0, last + 1
        try:
            artifact.save(directory, other, making(llm))
            break
        except Killed:
            assert not directory.exists() or contents(directory) in (old, new)
        killed_at, last = last, 0
        if killed_at % 5 == 0 or not directory.exists():
            artifact.save(directory, other, making(llm))
            assert contents(directory) == new
            assert [path.name for path in tmp_path.iterdir()] == ["model"]
        last = killed_at
    assert last > 15 and contents(directory) == new


def test_a_directory_holds_no_user_and_no_event(written, llm, dataset, tmp_path):
    texts = np.array([f"secret-text-{n}" for n in range(len(dataset.item))], np.dtypes.StringDType())
    personal = dataclasses.replace(
        dataset, user_keys=[f"secret-user-{n}" for n in range(len(dataset))], columns=dict(dataset.columns) | {"review": texts},
        ticks=dataset.order + 987_654_000_000, fields=dataclasses.replace(dataset.fields, texts={"review": Text("review")}),
    )  # fmt: skip
    artifact.save(tmp_path / "model", dataclasses.replace(written, vocabulary=Vocabulary.of(personal)), making(llm))
    for file in (tmp_path / "model").iterdir():
        content = file.read_bytes()
        if file.suffix == ".parquet":  # it is compressed
            content += json.dumps(pyarrow.parquet.read_table(file).to_pylist()).encode()
        for told in (b"secret", b"98765400"):
            assert told not in content, file


def with_predictor(model: Personalizer, **changes: Any) -> Personalizer:
    return dataclasses.replace(model, predictor=dataclasses.replace(model.predictor, **changes))


def of_another_weight(model: Personalizer) -> Personalizer:
    return with_predictor(
        model, params=trees.replace(model.predictor.params, {"item_head": model.predictor.params["item_head"] + 1})
    )


def of_another_edge(model: Personalizer) -> Personalizer:
    fields = dataclasses.replace(model.vocabulary.fields, numbers={"rating": Number("rating", (2.5,))})
    return dataclasses.replace(model, vocabulary=dataclasses.replace(model.vocabulary, fields=fields))


def of_another_template(model: Personalizer) -> Personalizer:
    templates = dict(model.predictor.templates) | {"next_item": NextItem(model.lines, instruction="Then:", max_tokens=300)}
    return with_predictor(model, templates=templates)


def test_the_identity_is_of_all_that_computes_and_of_nothing_else(written, named, llm, tmp_path):
    identity = settings_of(named)["identity"]
    save = lambda model, made: artifact.save(tmp_path / "model", model, made).identity  # noqa: E731
    other = [
        save(change(written), making(llm))
        for change in (
            of_another_weight, of_another_edge, of_another_template,
            lambda model: with_predictor(model, max_events=5), lambda model: with_predictor(model, ranks=False),
            lambda model: dataclasses.replace(model, names={"favorite": {1: "Action"}}),
        )
    ]  # fmt: skip
    other.append(save(written, dataclasses.replace(making(llm), dtype="bfloat16")))
    assert len({identity, *other}) == 1 + len(other)

    rows = [{"task": "t", "method": "m", "metric": "x", "value": float("nan"), "interval": [0.0, float("inf")], "n": 1}]
    same = [
        save(with_predictor(written, batch_size=64, pad_whole=True), making(llm)),
        save(written, making(shutil.copytree(llm, tmp_path / "elsewhere"))),
        save(written, dataclasses.replace(making(llm), sharding=(("scale", ()), (".*", ("data",))))),
        save(written, dataclasses.replace(making(llm), facts=FACTS | {"command": "another", "rows": rows})),
    ]
    assert set(same) == {identity}
    assert artifact.load(tmp_path / "model").facts["rows"][0]["value"] is None
