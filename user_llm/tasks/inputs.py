"""What of a config and of the files that it names all phases of a run depend on, as parts of an `Identity`.

A setting belongs to the identity of a phase if another value of it can give other parameters or results, beyond the rounding of
floats. NO_INPUT lists the settings that do not, with reasons; everything else that a phase reads is part of its identity, so that a
key that somebody adds counts until it is listed here.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from user_llm.common.hashes import content_hashes
from user_llm.training.identity import Identity

# (what a key contains, why it is no part of an identity)
NO_INPUT = (
    (
        r"\.loop\.sharding$",
        "where parameters lie; a run goes on with more or fewer devices, as it does with another section `mesh`",
    ),
    (r"\.loop\.(save_steps|log_steps)$", "a run that is stopped and resumed anywhere equals one that is not"),
    (r"(^|\.)(unroll|remat|attention_kernel|pad_whole)$", "other ways to compute the same numbers"),
    (r"\.(eval\.batch_size|loss\.chunk)$", "how many rows are computed at a time"),
    (r"\.like\.", "which flags of the command line hold for several phases; their values are in the section"),
    (
        r"^data\.(dir|catalogue_items|accept_changes)$",
        "where files are, whose content counts; a stand-in for data; a permission",
    ),
)
# Keys of `data` that one kind of source alone reads.
OF_SOURCE = {"category": "amazon", "states": "google_local", "name": "events", "columns": "events", "synthetic": "synthetic"}
# Keys of `data` that say what is done with a dataset once it is read.
PROTOCOL = ("ties", "min_events", "split", "withhold", "streams")


def flat(section: ConfigDict | Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings of a section by their whole keys, without those of NO_INPUT."""
    values = json.loads(section.to_json_best_effort()) if isinstance(section, ConfigDict) else section
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict):
            found |= flat(value, key)
        elif not any(re.search(pattern, key) for pattern, _ in NO_INPUT):
            found[key] = value
    return found


def reading_settings(config: ConfigDict) -> dict[str, Any]:
    """Return the settings that say what is read from the files of a dataset; a synthetic world is written by them too."""
    settings = data_settings(config)
    seed = {"seed": config.seed} if config.data.source == "synthetic" else {}
    return {key: value for key, value in settings.items() if key.split(".")[1] not in PROTOCOL} | seed


def data_settings(config: ConfigDict) -> dict[str, Any]:
    """Return the settings of the dataset and its protocol."""
    data = config.data
    sources = {data.source} | ({data.synthetic.layout} if data.source == "synthetic" else set())
    unused = {key for key, source in OF_SOURCE.items() if source not in sources}
    return {key: value for key, value in flat(data, "data").items() if key.split(".")[1] not in unused}


def run_identity(config: ConfigDict, data_files: Mapping[str, str]) -> Identity:
    """Return what every phase of a run depends on, and the baselines on alone: dataset, protocol and seed."""
    return Identity(data_files, {"seed": config.seed} | data_settings(config))


def tokenizer_identity(config: ConfigDict, data_files: Mapping[str, str]) -> Identity:
    """Return the identity of a tokenizer that is trained on the dataset.

    The lines of the run's prompts, which it is trained on too, are left out: phases that are added to a run use the tokenizer that is
    there.
    """
    return Identity(data_files, {"seed": config.seed, "llm.vocab_size": config.llm.vocab_size} | data_settings(config))


def data_files(files: Iterable[epath.PathLike], folder: Path) -> dict[str, str]:
    """Return the content hashes of a dataset's files by their names below the folder that they share, as `data/...`."""
    paths = list(files)
    return dict(zip(_names(paths), content_hashes(paths, folder), strict=True))


def _names(paths: list[epath.PathLike]) -> list[str]:
    texts = [os.fspath(path) for path in paths]
    if len(set(map(os.path.basename, texts))) == len(texts):
        return [f"data/{os.path.basename(text)}" for text in texts]
    shared = os.path.commonpath(texts)
    return [f"data/{os.path.relpath(text, shared)}" for text in texts]
