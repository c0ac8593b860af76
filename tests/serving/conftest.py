"""Tiny models, each read back from its directory, and the dataset whose users they are asked about."""

import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_directories import making
from tiny_models import Made, make_dataset, make_models, variants

import user_llm
from user_llm.data.timelines import Timelines
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer


@pytest.fixture(scope="session")
def dataset(make_timelines) -> Timelines:
    """Users of 3 to 11 events, and ties in time."""
    return make_dataset(make_timelines)


@pytest.fixture(scope="session")
def make_model(dataset, drawn, tmp_path_factory) -> Callable[[str], Made]:
    """Return `make(variant)`: writes and returns the model of that variant."""
    return make_models(dataset, drawn, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def llm(make_model, tmp_path_factory) -> Path:
    """An LLM as it came."""
    folder = tmp_path_factory.mktemp("llm")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_model("cross").directory / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def written(make_model) -> Personalizer:
    """A model with adapters that has not been saved yet."""
    return dataclasses.replace(make_model("lora").written, identity="")


@pytest.fixture(scope="session")
def named(written, llm, tmp_path_factory) -> Path:
    """A directory that holds adapters and names their LLM."""
    directory = tmp_path_factory.mktemp("named") / "model"
    artifact.save(directory, written, making(llm))
    return directory


@pytest.fixture
def directory(make_model, tmp_path) -> Path:
    """A copy of a directory that holds its LLM."""
    return shutil.copytree(make_model("cross").directory, tmp_path / "model")


@pytest.fixture(params=variants("cross"))
def made(request, make_model) -> Made:
    """The model of each variant."""
    return make_model(request.param)


@pytest.fixture
def model(made) -> Personalizer:
    """The same, loaded from its directory."""
    return load(made.directory)


@functools.cache
def load(directory: Path) -> Personalizer:
    return user_llm.load(directory)
