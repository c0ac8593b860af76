"""Where a config's data or LLM are not at hand: a small world and an empty checkpoint of the same shapes.

A compiled step depends on shapes alone: the size of the catalogue, the features of an event, the LLM's sizes, and the batch, which
the config says.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from user_llm.common.files import local_folder, make_once
from user_llm.data.schema import Schema
from user_llm.data.splits import make_split
from user_llm.data.timelines import Timelines
from user_llm.data.tokenizer import train_bpe
from user_llm.tasks.context import Context, catalogue_lines, load_data

WORLD = {"num_users": 64, "num_items": 240, "events_per_user": 60}
TOKENS = 8192  # of the tokenizer that stands in for an open LLM's


def stand_in_context(config: ConfigDict, mesh: Mesh, workdir: epath.Path, *, world: Mapping[str, int] | None = None) -> Context:
    """Open a run of `config` on what there is, and on stand-ins for the rest.

    Args:
      world: sizes of the world that stands in for data, of `synthetic_files.write`; None for a small one.

    Raises:
      ValueError: data or an LLM that are neither here nor known by their sizes.
    """
    config = config.copy_and_resolve_references()
    grown = not config.data.dir and config.data.source != "synthetic"
    if grown:
        config.data.synthetic.update(layout=config.data.source, **(world or WORLD))
        config.data.source = "synthetic"
    timelines, split = load_data(config, workdir)
    if grown:
        timelines = grow(timelines, config.data.catalogue_items)
        split = make_split(timelines, config.data.split, withhold=config.data.withhold)
    if config.llm.checkpoint and not Path(config.llm.checkpoint).is_dir():
        if not config.llm.published:
            raise ValueError(
                f"The sizes of {config.llm.checkpoint} are not known here: name its directory by --config.llm.checkpoint=."
            )
        config.llm.checkpoint = str(_empty_checkpoint(config, timelines, workdir))
    facts = {"dataset": timelines.name, "seed": config.seed, "split": split.name, "config_hash": ""}
    return Context(config, timelines, split, mesh, workdir, facts)


def grow(timelines: Timelines, num_items: int) -> Timelines:
    """Return the same timelines with a catalogue of `num_items`: further items that nobody has chosen."""
    catalogue, schema = timelines.catalogue, timelines.schema
    more = num_items - schema.num_items
    if more <= 0:
        return timelines
    item, *rest = schema.features
    return dataclasses.replace(
        timelines,
        schema=Schema((dataclasses.replace(item, size=num_items + 1), *rest)),
        catalogue=dataclasses.replace(
            catalogue,
            titles=[*catalogue.titles, *(f"Item {number}" for number in range(more))],
            keys=[*catalogue.keys, *(f"item-{number}" for number in range(more))],
            multi={name: np.pad(bags, ((0, more), (0, 0)), mode="wrap") for name, bags in catalogue.multi.items()},
        ),
    )


def _empty_checkpoint(config: ConfigDict, timelines: Timelines, workdir: epath.Path) -> Path:
    """Return the published settings of an open LLM and a tokenizer of this world, written once: a checkpoint without weights."""
    published = config.llm.published

    def write(directory: Path) -> None:
        texts = catalogue_lines(timelines)[:10_000] + 1000 * _sentences(config)  # so often that their words are tokens
        train_bpe(texts, min(published.vocab_size, TOKENS), directory)
        (directory / "config.json").write_text(json.dumps(published.to_dict()))

    return make_once(local_folder(workdir) / "llm", write)


def _sentences(config: ConfigDict) -> list[str]:
    """Return what the prompts of all phases say, which an open LLM's tokenizer writes in about a token a word."""
    prompts = [config[phase].prompts for phase in config.phases if "prompts" in config[phase]]
    tasks = [task for asked in prompts for task in asked.values() if isinstance(task, ConfigDict)]
    return sorted({task[key] for task in tasks for key in ("instruction", "question") if task.get(key)})
