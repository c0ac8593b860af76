"""A model directory that is damaged, or changed by hands that know how it is sealed: refused in one sentence."""

import copy
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jinja2
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_directories import flip, refused, seal, settings_of

from user_llm.serving import loading

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
                assert loading.load(whole)
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


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "special_tokens_map.json"])
def test_a_file_that_would_be_read_beside_those_listed_is_refused(name, directory):
    (directory / "LICENSE.txt").write_text("is not read")
    assert loading.load(directory)
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
    backend["added_tokens"].append(backend["added_tokens"][-1] | {"id": 999, "content": "<more>", "special": False})
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
    assert loading.load(directory).tokenizer.chat_template == changes["chat_template"]
    assert seen == []
    jinja2.Template("{{ 1 }}").render()
    assert seen
    watching = False
