import json

import pytest
from etils import epath

from user_llm.training.identity import (
    FILE,
    Identity,
    changed_inputs,
    changed_phases,
    changed_settings,
    listed,
    read_identity,
)

IDENTITY = Identity({"data/a.csv": "1"}, {"seed": 0, "rules": (("x", True), (".*", ("data", None)))}, {"encoder": "abc"})


def test_an_identity_is_read_back_as_it_was_written(tmp_path):
    assert read_identity(epath.Path(tmp_path)) is None
    IDENTITY.write(epath.Path(tmp_path), reused_from="elsewhere")
    assert read_identity(epath.Path(tmp_path)) == IDENTITY
    facts = json.loads((tmp_path / FILE).read_text())
    assert facts["identity"] == IDENTITY.hash and facts["reused_from"] == "elsewhere"


def test_the_hash_depends_on_every_part_and_on_no_order():
    others = [
        Identity({"data/a.csv": "2"}, IDENTITY.settings, IDENTITY.built_on),
        Identity({"data/b.csv": "1"}, IDENTITY.settings, IDENTITY.built_on),
        Identity(IDENTITY.inputs, {**IDENTITY.settings, "seed": 1}, IDENTITY.built_on),
        Identity(IDENTITY.inputs, {**IDENTITY.settings, "seed": 0.5}, IDENTITY.built_on),
        Identity(IDENTITY.inputs, IDENTITY.settings, {"encoder": "abd"}),
        Identity(IDENTITY.inputs, IDENTITY.settings),
    ]
    hashes = {identity.hash for identity in (IDENTITY, *others)}
    assert len(hashes) == 7 and all(len(digest) == 12 for digest in hashes)
    turned = Identity(IDENTITY.inputs, dict(reversed(IDENTITY.settings.items())), IDENTITY.built_on)
    assert turned.hash == IDENTITY.hash


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"inputs": 1, "settings": {}, "built_on": {}, "identity": ""}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{FILE}(, line 1)?: .*; delete {tmp_path} and run the same command\.$"):
        read_identity(epath.Path(tmp_path))


def test_an_edited_file_is_refused(tmp_path):
    IDENTITY.write(epath.Path(tmp_path))
    facts = json.loads((tmp_path / FILE).read_text())
    facts["inputs"]["data/a.csv"] = "2"
    (tmp_path / FILE).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{FILE} was changed by hand"):
        read_identity(epath.Path(tmp_path))


def test_differences_are_said_by_name():
    assert changed_settings({"a": 1, "b": [1], "c": 2}, {"a": 1, "b": [2], "d": None}) == [
        "b: [1] -> [2]",
        "c: 2 -> unset",
        "d: unset -> null",
    ]
    assert changed_inputs({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}) == [
        "b changed",
        "c is gone",
        "d is new",
    ]
    assert changed_phases({"a": "1", "b": "1"}, {"a": "1", "b": "2"}) == ["b below it is another"]
    assert changed_settings({"a": "x" * 99}, {"a": ""})[0] == f'a: "{"x" * 56}... -> ""'
    assert listed(["a", "b"]) == "a, b" and listed(["a", "b", "c", "d", "e"]) == "a, b, c, 2 more"
