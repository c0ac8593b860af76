"""A dataset as a run sees it: timelines and their split, found, prepared and read by what the config says."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from etils import epath

from user_llm.common.files import local_folder, lock, make_once
from user_llm.common.hashes import data_hashes
from user_llm.common.workdir import path_part
from user_llm.config.inputs import OF_SOURCE, reading_settings
from user_llm.config.reader import Config
from user_llm.data import amazon, event_files, google_local, movielens, prepare, synthetic_files
from user_llm.data.raw import Raw
from user_llm.data.splits import Split, make_split, train_counts
from user_llm.data.timelines import Timelines

# Finds a dataset: (what the config's section `data` says, a folder for what is downloaded) -> the dataset as published.
Source = Callable[..., Raw]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Timelines, and which of their events are for training, validation and test.

    Attributes:
      files: the SHA-256 of each file that was read, by the file's name; empty where nobody asks for them.
    """

    timelines: Timelines
    split: Split
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The dataset's name, for result rows."""
        return self.timelines.name

    @functools.cached_property
    def train_counts(self) -> np.ndarray:
        """The number of training events of each item; index 0 is PAD."""
        return train_counts(self.timelines, self.split)

    def select(self, features: tuple[str, ...]) -> "Dataset":
        """Return the same dataset with only these features of events, in this order; all of them for none."""
        return dataclasses.replace(self, timelines=self.timelines.select(features))


def open_dataset(config: Config, workdir: epath.Path, sources: Mapping[str, Source] | None = None) -> Dataset:
    """Find a dataset, prepare it if need be, read it, and split it.

    Args:
      sources: datasets besides those that the package knows, by what `data.source` calls them.

    Raises:
      ValueError: no data given, bad data, or a leak between the parts of the split.
    """
    data, folder = config.data, local_folder(workdir)
    with lock(folder / "data"):  # one process of a machine downloads or writes
        raw = find_data(config, folder, sources or {})
    hashes = data_hashes(raw.files, folder / "data")
    prepared = folder / "data" / f"read-{_digest(config)}"
    timelines = prepare.load(raw, prepared, ties=data.ties, seed=config.seed, min_events=data.min_events)
    return Dataset(timelines, make_split(timelines, data.split, withhold=data.withhold), hashes)


def find_data(config: Config, keep: Path, sources: Mapping[str, Source]) -> Raw:
    """Return the dataset as published; `keep` is for downloads, and for a synthetic world, which is written first.

    Raises:
      ValueError: no data given, or none of its kind there.
    """
    data = config.data
    source, folder, category, states = data.source, data.dir, data.category, data.states
    columns = vars(data.columns)
    if source in sources:
        return sources[source](data, keep / "data")
    if source == "synthetic":
        source, columns = data.synthetic.layout, synthetic_files.COLUMNS
        category, states = synthetic_files.NAME, (synthetic_files.NAME,)
        world = lambda path: synthetic_files.write(path, seed=config.seed, **vars(data.synthetic))  # noqa: E731
        # Its name is the dataset's; worlds of other settings stand beside it.
        folder = str(make_once(keep / "data" / f"world-{_digest(config)}" / "synthetic", world))
    for key, values in (("category", (category,)), ("states", states), ("name", (data.name,))):
        if OF_SOURCE[key] == source:
            for value in values:
                path_part(value, f"data.{key}")
    find = {
        "movielens": lambda: movielens.find(folder, keep / "data", bad_rows=data.bad_rows),
        "amazon": lambda: amazon.find(folder, category, bad_rows=data.bad_rows),
        "google_local": lambda: google_local.find(folder, states, bad_rows=data.bad_rows),
        "events": lambda: event_files.find(folder, event_files.Columns(**columns), name=data.name, bad_rows=data.bad_rows),
    }
    if not folder:
        raise ValueError(
            "No data: name where it is by --config.data.dir=... (for MovieLens also a zip or a release to download), or take "
            "the config's :synthetic variant, which makes its own."
        )
    return find[source]()


def _digest(config: Config) -> str:
    """Return a hash of what is read from the files of a dataset."""
    return hashlib.sha256(json.dumps(reading_settings(config.said), sort_keys=True).encode()).hexdigest()[:8]
