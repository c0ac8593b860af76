"""A model directory on the hub: pushed, and loaded by its name."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parents[1]))

import local_hub

import user_llm
from user_llm import export
from user_llm.models.pretrained import find_checkpoint
from user_llm.serving import artifact


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub.serving(local_hub.Hub({})) as hub:
        local_hub.ask(hub, str(tmp_path / "hub"), monkeypatch)
        monkeypatch.setenv("HF_TOKEN", local_hub.TOKEN)
        yield hub


def contents(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_a_model_is_loaded_by_its_name_on_the_hub(make_model, hub):
    files = contents(make_model("cross").directory)
    hub.repos["org/model"] = files | {"pytorch_model.bin": b"not asked for", ".gitattributes": b""}
    model = user_llm.load("org/model")
    assert model.identity == make_model("cross").written.identity
    hub.repos.clear()  # what was downloaded serves without the hub
    assert user_llm.load("org/model").identity == model.identity


def test_a_damaged_model_of_the_hub_is_refused(make_model, hub):
    hub.repos["org/model"] = contents(make_model("cross").directory) | {"catalogue.parquet": b"PAR1"}
    with pytest.raises(ValueError, match=r"catalogue\.parquet is not as it was written"):
        user_llm.load("org/model")


def test_what_is_pushed_is_what_is_loaded_back(make_model, hub):
    """Also over an older model, of whose files none that would be read is left."""
    directory = make_model("cross").directory
    export.push(directory, "org/new")
    assert hub.repos["org/new"] == contents(directory) | {".gitattributes": b""}
    assert hub.objects  # large files went their own way

    hub.repos["org/new"] |= {"adapter_model.safetensors": b"older", "chat_template.jinja": b"older", "picture.png": b"kept"}
    export.push(directory, "org/new", replace=True)
    assert hub.repos["org/new"] == contents(directory) | {".gitattributes": b"", "picture.png": b"kept"}

    model = user_llm.load("org/new")
    assert model.identity == make_model("cross").written.identity
    found = find_checkpoint("org/new", artifact.PATTERNS)
    assert contents(found) == contents(directory)


@pytest.mark.parametrize(
    ("public", "allowed", "message"),
    [
        (False, {}, r"org/new exists on the hub and is private: choose another name, or replace its model by --replace\."),
        (True, {}, r"org/new exists on the hub and is public: choose another name, or replace its model by --replace\."),
        (True, {"private": False}, "exists on the hub and is public"),
        (True, {"replace": True}, r"org/new is public on the hub: choose another name, or allow a public one by --noprivate\."),
        (False, {"replace": True}, None),
        (True, {"replace": True, "private": False}, None),
    ],
)
def test_a_repository_that_exists_is_replaced_only_when_asked(make_model, hub, public, allowed, message):
    """And one that everybody may read only where a public one is allowed."""
    directory, before = make_model("cross").directory, {"model.safetensors": b"somebody's"}
    hub.repos["org/new"] = dict(before)
    hub.public |= {"org/new"} if public else set()
    if message is None:
        export.push(directory, "org/new", **allowed)
        assert hub.repos["org/new"] == contents(directory)
        return
    with pytest.raises(ValueError, match=message):
        export.push(directory, "org/new", **allowed)
    assert hub.repos["org/new"] == before


def test_a_repository_that_is_made_is_private_unless_a_public_one_is_allowed(make_model, hub):
    export.push(make_model("cross").directory, "org/one")
    export.push(make_model("cross").directory, "org/two", private=False)
    assert hub.public == {"org/two"}


def test_a_model_is_exported_by_its_name_on_the_hub(make_model, hub, tmp_path):
    hub.repos["org/model"] = contents(make_model("lora").directory)
    export.export("org/model", tmp_path / "out")
    assert user_llm.load(tmp_path / "out").identity == make_model("lora").written.identity
    with pytest.raises(ValueError, match="There is no model org/nothing on the hub"):
        export.export("org/nothing", tmp_path / "other")


def test_a_push_that_cannot_be_is_refused(make_model, hub, monkeypatch, tmp_path):
    directory = make_model("cross").directory
    with pytest.raises(ValueError, match=r"--push=name: name it as ORGANISATION/NAME"):
        export.push(directory, "name")
    with pytest.raises(ValueError, match=r"holds no user_llm\.json"):
        export.push(tmp_path, "org/new")
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(ValueError, match=r"Cannot upload .* to org/new \(.*\): see that HF_TOKEN may write there") as error:
        export.push(directory, "org/new")
    assert "\n" not in str(error.value)
    assert not hub.repos
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"Cannot upload to org/new \(.*Connection refused\)"):
        export.push(directory, "org/new")
