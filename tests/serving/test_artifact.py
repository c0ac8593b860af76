"""A model directory is written as a whole, is found on its LLM, and has the identity of what it computes."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet
import pytest
from etils import epath

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_directories import FACTS, flip, making, refused, settings_of

from user_llm.common import distributed, trees
from user_llm.data.fields import Number, Text
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.vocabulary import Vocabulary
from user_llm.models.export import is_bare_llm
from user_llm.models.pretrained import decoder_config, load_decoder
from user_llm.serving import artifact, loading
from user_llm.serving.personalizer import Personalizer

# --- the LLM that a directory names ---


def test_a_named_llm_is_found_where_it_is_said_to_be(named, written, llm, tmp_path, monkeypatch):
    assert not (named / "model.safetensors").exists() and (named / "adapter_model.safetensors").exists()
    hidden = llm.with_name("hidden")
    llm.rename(hidden)
    try:
        refused(named, f"belongs on the LLM {llm}: .*Or say where it is by llm=")
        found = loading.load(named, llm=str(hidden))
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


@pytest.mark.slow
def test_an_exported_model_is_the_same_model(named, tmp_path):
    artifact.export(named, tmp_path / "out")
    whole, model = loading.load(tmp_path / "out"), loading.load(named)
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
    assert loading.load(tmp_path / "model").facts["rows"][0]["value"] is None


def test_all_processes_have_the_identity_that_the_first_one_wrote(written, llm, tmp_path, monkeypatch):
    """And all of them refuse what the first cannot write. The processes are played one after the other."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda value: told.append(value) or told[:1])
    first = artifact.save(tmp_path / "model", written, making(llm))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    second = artifact.save(tmp_path / "second", written, making(llm))
    assert first.identity and second.identity == first.identity == loading.load(tmp_path / "model").identity
    assert not (tmp_path / "second").exists()
    told.clear()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        with pytest.raises(ValueError, match="file"):
            artifact.save(tmp_path / "file" / "model", written, making(llm))


def test_a_copy_to_a_store_that_is_killed_does_not_load_and_is_finished_by_the_next(directory, tmp_path):
    """Killed at each file that is deleted or written, over a whole older model with a file and a folder of its own."""
    target, kind = epath.Path(tmp_path / "store" / "model"), type(epath.Path())
    reals = {name: getattr(kind, name) for name in ("copy", "unlink")}
    contents_of = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}  # noqa: E731

    class Killed(BaseException):
        pass

    def killing(real, left):
        def step(self, *args, **settings):
            left.pop() if left else kill()
            return real(self, *args, **settings)

        return step

    def kill():
        raise Killed

    for allowed in range(100):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory, target)
        (target / "adapter_model.safetensors").write_bytes(b"of an older model")
        (target / "folder").mkdir()
        left = [None] * allowed
        with pytest.MonkeyPatch.context() as patch:
            for name, real in reals.items():
                patch.setattr(kind, name, killing(real, left))
            try:
                artifact.copy_to_store(directory, target)
                break
            except Killed:
                pass
        if allowed:  # the older model is whole until the first file of it is gone
            refused(Path(target), r"holds no user_llm\.json")
        artifact.copy_to_store(directory, target)
        assert contents_of(target) == contents_of(directory)
    assert allowed > 10 and contents_of(target) == contents_of(directory)
