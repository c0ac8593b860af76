"""The download code against a local server that speaks the hub's protocol."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from local_hub import Hub, serving

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "pytorch_model.bin": b"not asked for"}


@pytest.fixture
def find(tmp_path):
    """Return `find(name, endpoint)`: what find_checkpoint prints in a process of its own, or the error it raises."""
    code = "import sys; from user_llm.models.pretrained import find_checkpoint; print(find_checkpoint(sys.argv[1]))"

    def run(name, endpoint):
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, env=env)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    return run


@pytest.fixture
def hub():
    with serving(Hub({"org/model": FILES}, gated=("gated/model",))) as hub:
        yield hub.url


def test_a_models_name_is_downloaded_once_and_only_what_is_needed(find, hub, tmp_path):
    path = find("org/model", hub)
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    with open(os.path.join(path, "model.safetensors"), "rb") as file:
        assert file.read() == b"weights"
    # What was downloaded serves without a network.
    assert find("org/model", "http://127.0.0.1:9") == path


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_a_sentence(find, hub):
    assert find("gated/model", hub).startswith(
        "ValueError: gated/model is gated: accept its licence on the hub, and set HF_TOKEN"
    )
    assert find("org/nothing", hub).startswith("ValueError: There is no model org/nothing on the hub, and no such directory")
    assert find("org/model", "http://127.0.0.1:9").startswith("ValueError: Cannot download org/model (")
