"""Timelines: every user's events in order, held as columns.

All users' events lie one after another in flat arrays; `offsets` says where each user starts. Everything downstream (splits,
audits, windows, baselines) is arithmetic on these arrays.
"""

import dataclasses
import functools
import re
import zlib

import numpy as np
from jaxtyping import Int, UInt64

from user_llm.data.schema import Schema

WORD = re.compile(r"\w+")
GAP_BUCKETS = 28  # ids 1..27; the last holds gaps of 2^25 s (388 days) and more


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The items; index 0 of everything is PAD.

    Attributes:
      titles: unique, readable.
      keys: the publisher's own ids.
      multi: item-side bags of ids, 0-padded: {"genres": int32 [num_items + 1, width]}.
      vocab: names of the ids of bags and categories: {"genres": ["", "Action", ...]}.
    """

    titles: list[str]
    keys: list[str]
    multi: dict[str, Int[np.ndarray, "V W"]]
    vocab: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Timelines:
    """All users' events in order.

    Attributes:
      name: of the dataset, for result rows.
      offsets: [U + 1]; user u's events are [offsets[u], offsets[u + 1]).
      item: item ids of all events.
      columns: further event-side columns, such as `rating` ids and `timestamp` in seconds.
      facts: counts of what reading found, for the audit.
    """

    name: str
    user_keys: list[str]
    offsets: Int[np.ndarray, "U+1"]
    item: Int[np.ndarray, "N"]
    columns: dict[str, np.ndarray]
    schema: Schema
    catalogue: Catalogue
    facts: dict[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user_keys)

    @property
    def lengths(self) -> Int[np.ndarray, "U"]:
        """Number of events of each user."""
        return np.diff(self.offsets)

    @functools.cached_property
    def users(self) -> Int[np.ndarray, "N"]:
        """The user of each event."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @functools.cached_property
    def positions(self) -> Int[np.ndarray, "N"]:
        """The place of each event in its timeline, from 0."""
        return np.arange(len(self.item)) - np.repeat(self.offsets[:-1], self.lengths)

    @functools.cached_property
    def features(self) -> Int[np.ndarray, "N A"]:
        """The schema's features of all events, one after another in columns."""
        parts = []
        for feature in self.schema:
            if feature.kind == "item":
                part = self.item
            elif feature.kind == "multi":
                part = self.catalogue.multi[feature.name][self.item]
            elif feature.kind == "time":
                gap = np.diff(self.columns["timestamp"], prepend=0)
                part = time_gap_bucket(np.where(self.positions == 0, 0, gap))
            elif feature.kind == "text":
                part = word_ids(self.columns[feature.name], feature.size, feature.width)
            else:
                part = self.columns[feature.name]
            parts.append(part.reshape(len(self.item), feature.width))
        return np.concatenate(parts, axis=1).astype(np.int32)

    def events(self, user: int, start: int, stop: int) -> Int[np.ndarray, "n A"]:
        """Return the features of events [start, stop) of a user."""
        first = self.offsets[user]
        return self.features[first + start : first + stop]

    def items(self, user: int, start: int, stop: int) -> Int[np.ndarray, "n"]:
        """Return the item ids of events [start, stop) of a user."""
        first = self.offsets[user]
        return self.item[first + start : first + stop]

    def select(self, names: tuple[str, ...]) -> "Timelines":
        """Return the same timelines with only these features, in this order; all of them for none."""
        if not names:
            return self
        return dataclasses.replace(self, schema=Schema(tuple(self.schema[name] for name in names)))


def time_gap_bucket(seconds: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Return 1 for no gap (or no earlier event), else 2 + floor(log2(seconds)), at most GAP_BUCKETS - 1."""
    log = np.floor(np.log2(np.maximum(seconds, 1))).astype(np.int32)
    return np.where(seconds > 0, np.minimum(2 + log, GAP_BUCKETS - 1), 1).astype(np.int32)


def word_ids(texts: np.ndarray, size: int, width: int) -> Int[np.ndarray, "N W"]:
    """Return the first `width` words of each text as ids from 1 to size - 1, 0-padded.

    A word's id is its checksum: no vocabulary is needed, no word is unknown, and few of `size` collide.
    """
    ids = np.zeros((len(texts), width), np.int32)
    for row, text in enumerate(texts):
        words = WORD.findall(text.lower())[:width]
        ids[row, : len(words)] = [1 + zlib.crc32(word.encode()) % (size - 1) for word in words]
    return ids


def order_events(
    user: Int[np.ndarray, "N"],
    key: UInt64[np.ndarray, "N"],
    item: Int[np.ndarray, "N"],
    timestamp: Int[np.ndarray, "N"],
    *,
    ties: str,
    seed: int = 0,
) -> Int[np.ndarray, "N"]:
    """Return the permutation that sorts by user, then time, then ties.

    `hashed` breaks ties by a seeded hash of (key, item), where `key` stands for the user whatever else the dataset holds. `file` keeps the file's order, which in MovieLens lists tied films by
    their id and so leaks the answer; it is there for comparison with published numbers alone.
    """
    if ties == "file":
        return np.lexsort((timestamp, user))
    if ties != "hashed":
        raise ValueError(f"Unknown order of ties {ties!r}: choose hashed or file.")
    return np.lexsort((_hash(key, item, seed), timestamp, user))


def _hash(key: UInt64[np.ndarray, "N"], item: Int[np.ndarray, "N"], seed: int) -> np.ndarray:
    """Mix (key, item, seed) to 64 bits by splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + item.astype(np.uint64)
        z = z * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
