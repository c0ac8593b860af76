"""Timelines: every user's events in order, held as columns.

All users' events lie one after another in flat columns, which may be files mapped into memory (`mapped.py`); `offsets` says where
each user starts. Everything downstream (splits, audits, windows, baselines) is arithmetic on stretches of these columns, so that no
process holds all events.
"""

import dataclasses
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from user_llm.data.fields import Fields
from user_llm.data.mapped import Column
from user_llm.data.schema import Schema

WORD = re.compile(r"\w+")
GAP_BUCKETS = 28  # ids 1..27; the last holds gaps of 2^25 s (388 days) and more
CHUNK = 1 << 18  # events that are worked on at a time


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
class Chunk:
    """The events of a few neighbouring users.

    Attributes:
      first, last: users [first, last).
      offsets: of these users, and the end of the last one.
    """

    first: int
    last: int
    offsets: Int[np.ndarray, " u+1"]

    @property
    def events(self) -> slice:
        """The numbers of the events among those of all users."""
        return slice(int(self.offsets[0]), int(self.offsets[-1]))

    @functools.cached_property
    def users(self) -> Int[np.ndarray, " n"]:
        """The user of each event."""
        return np.repeat(np.arange(self.first, self.last), np.diff(self.offsets))

    @functools.cached_property
    def positions(self) -> Int[np.ndarray, " n"]:
        """The place of each event in its timeline, from 0."""
        return np.arange(self.offsets[0], self.offsets[-1]) - np.repeat(self.offsets[:-1], np.diff(self.offsets))


def chunks(offsets: Int[np.ndarray, " U+1"], size: int | None = None) -> Iterator[Chunk]:
    """Yield all users in order, as many at a time as have `size` events together (CHUNK if not given), but at least one."""
    first, users = 0, len(offsets) - 1
    while first < users:
        fitting = int(np.searchsorted(offsets, offsets[first] + (size or CHUNK), "right")) - 1
        last = max(fitting, first + 1)
        yield Chunk(first, last, np.asarray(offsets[first : last + 1]))
        first = last


class Origin(NamedTuple):
    """Where timelines are stored.

    Attributes:
      identity: a hash of all that is stored of them.
    """

    folder: Path
    identity: str


@dataclasses.dataclass(frozen=True)
class Timelines:
    """All users' events in order.

    Attributes:
      name: of the dataset, for result rows.
      offsets: [U + 1]; user u's events are [offsets[u], offsets[u + 1]).
      item: item ids of all events.
      columns: further event-side columns, such as `rating` ids and `timestamp` in seconds.
      facts: counts of what reading found, for the audit.
      ticks: what the events of a user are ordered by, exactly: times in ticks, or orders. If it is None, `timestamp` counts.
      ticks_per_second: the resolution of `ticks` where they are times.
      words: ids of the words of text columns, where they are stored; those of other columns are computed when asked for.
      fields: the rules by which raw events became these; those of a reader, completed by what the whole dataset tells.
      origin: where the timelines are stored, None if they are not. A copy in which anything was replaced has none.
    """

    name: str
    user_keys: Sequence[str]
    offsets: Int[np.ndarray, " U+1"]
    item: Int[np.ndarray, " N"] | Column
    columns: dict[str, np.ndarray | Column]
    schema: Schema
    catalogue: Catalogue
    facts: dict[str, int] = dataclasses.field(default_factory=dict)
    ticks: Int[np.ndarray, " N"] | Column | None = None
    ticks_per_second: int = 1
    words: dict[str, Column] = dataclasses.field(default_factory=dict)
    fields: Fields = dataclasses.field(default_factory=Fields)
    origin: Origin | None = dataclasses.field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.user_keys)

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " U"]:
        """Number of events of each user."""
        return np.diff(self.offsets)

    @property
    def ordered(self) -> bool:
        """Whether there is an `order`, and not the places of events alone."""
        return self.ticks is not None or "timestamp" in self.columns

    @property
    def order(self) -> Int[np.ndarray, " N"] | Column:
        """What the events of a user are ordered by, exactly."""
        return self.columns["timestamp"] if self.ticks is None else self.ticks

    def chunks(self) -> Iterator[Chunk]:
        """Yield the events of all users, a bounded number at a time."""
        return chunks(self.offsets)

    def users_of(self, events: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Return the users of events, given by their numbers among those of all users."""
        return np.searchsorted(self.offsets, events, "right") - 1

    def features(self, events: Int[np.ndarray, "..."]) -> Int[np.ndarray, "... A"]:
        """Return the schema's features of events, given by their numbers among those of all users; PAD where a number is negative."""
        real = events >= 0
        numbers = events[real]
        item = self.item[numbers]
        table = np.empty((len(numbers), self.schema.width), np.int32)
        start = 0
        for feature in self.schema:
            part = table[:, start : start + feature.width]
            start += feature.width
            if feature.kind == "item":
                part[:, 0] = item
            elif feature.kind == "multi":
                part[:] = self.catalogue.multi[feature.name][item]
            elif feature.kind == "time":
                part[:, 0] = time_gap_bucket(self._gaps(numbers))
            elif feature.kind == "text":
                part[:] = self._words(feature.name, feature.size, feature.width, numbers)
            else:
                part[:, 0] = self.columns[feature.name][numbers]
        features = np.zeros((*events.shape, self.schema.width), np.int32)
        features[real] = table
        return features

    def _gaps(self, events: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the whole seconds since the user's event before; 0 for a user's first event."""
        starts = self.offsets[self.users_of(events)]
        time = self.order
        return (time[events] - time[np.maximum(events - 1, starts)]) // self.ticks_per_second

    def _words(self, name: str, size: int, width: int, events: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n W"]:
        return self.words[name][events] if name in self.words else word_ids(self.columns[name][events], size, width)

    def events(self, user: int, start: int, stop: int) -> Int[np.ndarray, "n A"]:
        """Return the features of events [start, stop) of a user."""
        first = int(self.offsets[user])
        return self.features(np.arange(first + start, first + stop))

    def items(self, user: int, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Return the item ids of events [start, stop) of a user."""
        first = int(self.offsets[user])
        return self.item[first + start : first + stop]

    def select(self, names: tuple[str, ...]) -> "Timelines":
        """Return the same timelines with only these features, in this order; all of them for none."""
        if not names:
            return self
        return dataclasses.replace(self, schema=Schema(tuple(self.schema[name] for name in names)))


def event_counts(timelines: Timelines, chosen: Callable[[Chunk], np.ndarray] | None = None) -> Int[np.ndarray, " V"]:
    """Count each item's events, those that `chosen` says yes to if it is given; index 0 is PAD."""
    counts = np.zeros(timelines.schema.num_items + 1, np.int64)
    for chunk in timelines.chunks():
        item = timelines.item[chunk.events]
        counts += np.bincount(item if chosen is None else item[chosen(chunk)], minlength=len(counts))
    return counts


def time_gap_bucket(seconds: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
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


def hash_key(user: str) -> int:
    """Return what stands for a user in the hash that breaks ties: the user's id if it is a number, else a hash of the id."""
    if user.isdecimal() and len(user) < 19:
        return int(user)
    return int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big")


def order_events(
    user: Int[np.ndarray, " N"],
    key: UInt64[np.ndarray, " N"],
    item: Int[np.ndarray, " N"],
    timestamp: Int[np.ndarray, " N"],
    *,
    ties: str,
    seed: int = 0,
) -> Int[np.ndarray, " N"]:
    """Return the permutation that sorts by user, then time, then ties.

    `hashed` breaks ties by a seeded hash of (key, item), where `key` stands for the user whatever else the dataset holds. `file`
    keeps the file's order, which in MovieLens lists tied films by their id and so leaks the answer; it is there for comparison with
    published numbers alone.

    Raises:
      ValueError: another order of ties.
    """
    if ties == "file":
        return np.lexsort((timestamp, user))
    if ties != "hashed":
        raise ValueError(f"Unknown order of ties {ties!r}: choose hashed or file.")
    return np.lexsort((_hash(key, item, seed), timestamp, user))


def _hash(key: UInt64[np.ndarray, " N"], item: Int[np.ndarray, " N"], seed: int) -> np.ndarray:
    """Mix (key, item, seed) to 64 bits by splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + item.astype(np.uint64)
        z = z * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
