"""Which settings of a config can change parameters or results.

A setting counts if another value of it can give other parameters or results, beyond the rounding of floats. NO_INPUT lists the
settings that do not, with reasons; everything else that a phase reads counts, so that a key that somebody adds counts until it is
listed here. All functions take a config as plain values, `Config.said`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from user_llm.config.values import SOURCES

# (what a key contains, why it is no part of an identity)
NO_INPUT = (
    (
        r"\.loop\.sharding$",
        "where parameters lie; a run goes on with more or fewer devices, as it does with another section `mesh`",
    ),
    (r"\.loop\.(save_steps|log_steps)$", "a run that is stopped and resumed anywhere equals one that is not"),
    (r"(^|\.)(unroll|remat|attention_kernel|pad_whole)$", "other ways to compute the same numbers"),
    (r"\.(eval\.batch_size|loss\.chunk)$", "how many rows are computed at a time"),
    (
        r"^data\.(dir|catalogue_items|accept_changes)$",
        "where files are, whose content counts; a stand-in for data; a permission",
    ),
)
# Settings of the test alone: training, and the choice of the step that is kept, do not depend on them.
TEST_ALONE = r"^[^.]+\.(eval\.(guide|rerank|bert_score|control_users|samples)|(eval\.)?transitions)$"
WRITTEN = r"^[^.]+\.eval\.generate_users$"  # the same holds of this one where an item head ranks on validation
# And of these where a phase keeps its last parameters and no patience ends it.
CHOSEN_BY = r"^[^.]+\.loop\.(eval_steps|monitor|mode)$"
# Keys of `data` that one kind of source alone reads.
OF_SOURCE = {"category": "amazon", "states": "google_local", "name": "events", "columns": "events", "synthetic": "synthetic"}
# Keys of `data` that say what is done with a dataset once it is read.
PROTOCOL = ("ties", "min_events", "split", "withhold", "streams")


def flat(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings of a section by their whole keys, without those of NO_INPUT."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict):
            found |= flat(value, key)
        elif not any(re.search(pattern, key) for pattern, _ in NO_INPUT):
            found[key] = value
    return found


def training_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a phase's settings on which its parameters depend; the others change what is measured of them in the end."""

    def any_is(key: str, holds: Callable[[Any], Any]) -> bool:
        return any(name.endswith(key) and holds(value) for name, value in settings.items())

    alone = TEST_ALONE
    if any_is(".loss.catalogue", bool):
        alone += f"|{WRITTEN}"
    if any_is(".loop.keep", lambda keep: keep == "last") and not any_is(".loop.patience_evals", bool):
        alone += f"|{CHOSEN_BY}"
    return {key: value for key, value in settings.items() if not re.search(alone, key)}


def reading_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that say what is read from the files of a dataset; a synthetic world is written by them too."""
    settings = data_settings(config)
    seed = {"seed": config["seed"]} if config["data"]["source"] == "synthetic" else {}
    return {key: value for key, value in settings.items() if key.split(".")[1] not in PROTOCOL} | seed


def data_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the dataset and its protocol."""
    data = config["data"]
    if data["source"] not in SOURCES:  # a caller's own dataset, which may read any of them
        return {key: value for key, value in flat(data, "data").items() if not key.startswith("data.synthetic.")}
    sources = {data["source"]} | ({data["synthetic"]["layout"]} if data["source"] == "synthetic" else set())
    unused = {key for key, source in OF_SOURCE.items() if source not in sources}
    return {key: value for key, value in flat(data, "data").items() if key.split(".")[1] not in unused}
