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

from user_llm.common.files import local_folder, make_once
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset, open_dataset
from user_llm.data.schema import Schema
from user_llm.data.splits import make_split
from user_llm.data.timelines import Timelines
from user_llm.data.tokenizer import train_bpe
from user_llm.phases.llm import catalogue_lines, sentences
from user_llm.phases.run import Run

WORLD = {"num_users": 64, "num_items": 240, "events_per_user": 60}
TOKENS = 8192  # of the tokenizer that stands in for an open LLM's


def stand_in_run(
    config: Config, mesh: Mesh, workdir: epath.Path, *, world: Mapping[str, int] | None = None
) -> tuple[Run, Dataset]:
    """Open a run of `config` on what there is, and on stand-ins for the rest.

    Args:
      world: sizes of the world that stands in for data, of `synthetic_files.write`; None for a small one.

    Raises:
      ValueError: data or an LLM that are neither here nor known by their sizes.
    """
    grown = not config.data.dir and config.data.source != "synthetic"
    if grown:
        synthetic = {"layout": config.data.source, **(world or WORLD)}
        config = config.but(data={"source": "synthetic", "synthetic": synthetic})
    data = open_dataset(config, workdir)
    if grown:
        timelines = grow(data.timelines, config.data.catalogue_items)
        data = Dataset(timelines, make_split(timelines, config.data.split, withhold=config.data.withhold), data.files)
    if config.llm.checkpoint and not Path(config.llm.checkpoint).is_dir():
        if not config.llm.published:
            raise ValueError(
                f"The sizes of {config.llm.checkpoint} are not known here: name its directory by --config.llm.checkpoint=."
            )
        config = config.but(llm={"checkpoint": str(_empty_checkpoint(config, data.timelines, workdir))})
    return Run(config, workdir, mesh), data


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


def _empty_checkpoint(config: Config, timelines: Timelines, workdir: epath.Path) -> Path:
    """Return the published settings of an open LLM and a tokenizer of this world, written once: a checkpoint without weights."""
    published = config.llm.published

    def write(directory: Path) -> None:
        texts = catalogue_lines(timelines)[:10_000] + 1000 * sorted(
            set(sentences(config))
        )  # so often that their words are tokens
        train_bpe(texts, min(published["vocab_size"], TOKENS), directory)
        (directory / "config.json").write_text(json.dumps(published))

    return make_once(local_folder(workdir) / "llm", write)
