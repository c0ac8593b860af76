"""What tests of model directories share: how a model came about, and hands that change its directory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from user_llm.common.files import sha256
from user_llm.models.pretrained import checkpoint_hashes
from user_llm.serving import artifact, loading
from user_llm.serving.settings import write_settings

FACTS = {"dataset": "toy", "users": 5, "events": 20, "items": 9, "columns": ["item"], "command": "none", "rows": []}


def making(llm: Path, **changes: Any) -> artifact.Making:
    """Return how a model with adapters came about, whose LLM is named."""
    base = artifact.Base(str(llm), checkpoint_hashes(llm))
    return artifact.Making(base, False, llm, ((".*", ()),), "float32", np.arange(10), FACTS, **changes)


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
        loading.load(directory, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900
    return str(error.value)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)
