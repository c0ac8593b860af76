"""What every dataset hands over: its events and items as published, in pieces, so that no file needs to fit into memory.

`prepare.py` numbers, sorts and stores them; the readers (`movielens_raw.py`, `amazon.py`, `google_local.py`, `event_files.py`) know
the publishers' layouts and nothing else.
"""

import dataclasses
import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from absl import logging
from etils import epath

from user_llm.common.workdir import path_part
from user_llm.data.fields import Fields, Number, Text

ROWS = 50_000  # of one piece
WARNINGS = 5  # of bad rows that are left out; the others are counted only
REMEDY = "mend or delete the row, or leave such rows out by --config.data.bad_rows=skip"
TAG = re.compile(r"<[^<>]*>")
UNSHOWN = re.compile(r"<(script|style)\b", re.IGNORECASE | re.ASCII)  # parts of a page that no reader sees
# What `clean` may change: parts of HTML, all white space but single spaces between words.
UNCLEAN = r"[&<\t-\r\x{1c}-\x{1f}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]|^ | $|  "
ENDS = {name: re.compile(f"</{name}>", re.IGNORECASE | re.ASCII) for name in ("script", "style")}


@dataclasses.dataclass
class BadRows:
    """What becomes of rows that cannot be read: the first ends the reading, or with `skip` all are left out and counted.

    Attributes:
      skip: leave them out.
      count: how many were left out.
      remedy: what a refusal tells to do.
      warnings: how many of those that are left out are named in the log.
    """

    skip: bool = False
    count: int = 0
    remedy: str = REMEDY
    warnings: int = WARNINGS

    @classmethod
    def of(cls, mode: str) -> "BadRows":
        """Return what the config's `data.bad_rows` says.

        Raises:
          ValueError: it says neither refuse nor skip.
        """
        if mode not in ("refuse", "skip"):
            raise ValueError(f"Unknown data.bad_rows {mode!r}: choose refuse or skip.")
        return cls(skip=mode == "skip")

    def __call__(self, fault: str, rows: int = 1) -> None:
        """Refuse a row, or leave it and `rows` - 1 others out.

        Args:
          fault: file, row and what is wrong, without a full stop.

        Raises:
          ValueError: bad rows are refused.
        """
        if not self.skip:
            raise ValueError(f"{fault}; {self.remedy}.")
        if self.count < self.warnings:
            logging.warning("Left out: %s.", fault)
        self.count += rows


@dataclasses.dataclass(frozen=True)
class Raw:
    """A dataset as published.

    Attributes:
      name: for result rows.
      files: all that is read; their content tells one prepared dataset from another.
      events: yields pieces with the columns of `event_schema`, in the publisher's order: `user` and `item` (the publisher's ids),
        `time` and `fraction` (see `times.py`), and those that `stored` names.
      items: yields pieces with `item`, `title` and the columns of `bags` (lists of strings); the first row of an item counts. It
        is called when `events` has ended.
      fields: the columns of the files and how they are read. A number or text that is not among them has a column of its own
        name. When timelines are opened, `timed` and what the whole dataset tells are added: edges of measured numbers, and a
        unit that all times decide.
      ordinals: event-side columns of numbers from 1 to the given highest, such as {"rating": 5}, by the publisher's names.
      measured: those of `ordinals` that `events` gives as numbers of any size, of which preparing makes such levels.
      texts: event-side columns of text, by the publisher's names.
      bags: item-side columns of names.
      timed: whether `time` is a time; otherwise it only orders a user's events.
      unit: what `time` counts, one of `times.UNITS` or `times.COMPACT`; empty for one that is decided from all times.
      bad_rows: what becomes of rows that cannot be read.
      settings: what else tells one prepared dataset from another.

    Raises:
      ValueError: a name that is no part of a path, where prepared data and results are kept.
    """

    name: str
    files: tuple[epath.Path, ...]
    events: Callable[[], Iterator[pa.RecordBatch]]
    items: Callable[[], Iterator[pa.RecordBatch]]
    ordinals: Mapping[str, int]
    fields: Fields = dataclasses.field(default_factory=Fields)
    measured: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    bags: tuple[str, ...] = ()
    timed: bool = True
    unit: str = "s"
    bad_rows: BadRows = dataclasses.field(default_factory=BadRows)
    settings: str = ""

    @property
    def stored(self) -> dict[str, str]:
        """The program's own names of event-side columns, and the publisher's: {"level_0": "rating", "text_0": "review"}."""
        levels = {f"level_{n}": name for n, name in enumerate(self.ordinals)}
        return levels | {f"text_{n}": name for n, name in enumerate(self.texts)}

    def number(self, name: str) -> Number:
        """Return how one of `ordinals` is read."""
        if name in self.fields.numbers:
            return self.fields.numbers[name]
        highest = self.ordinals[name]
        return Number(name, missing=highest) if name in self.measured else Number.of_scale(name, range(1, highest + 1))

    def text(self, name: str) -> Text:
        """Return how one of `texts` is read."""
        return self.fields.texts.get(name, Text(name))

    def __post_init__(self) -> None:
        path_part(self.name, "The dataset's name")

    @property
    def event_schema(self) -> pa.Schema:
        """The columns of `events`."""
        kinds = {
            own: pa.string() if name in self.texts and own.startswith("text") else pa.float64() if name in self.measured else pa.int32()
            for own, name in self.stored.items()
        }  # fmt: skip
        return pa.schema({"user": pa.string(), "item": pa.string(), "time": pa.int64(), "fraction": pa.int64()} | kinds)

    @property
    def item_schema(self) -> pa.Schema:
        """The columns of `items`."""
        return pa.schema({"item": pa.string(), "title": pa.string()} | dict.fromkeys(self.bags, pa.list_(pa.string())))


def pieces(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Gather rows to pieces."""
    held: list[Sequence[Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == ROWS:
            yield pa.record_batch(list(zip(*held, strict=True)), schema=schema)
            held = []
    if held:
        yield pa.record_batch(list(zip(*held, strict=True)), schema=schema)


def clean(text: str | None) -> str:
    """Return text without HTML: entities turned into what they stand for, tags and scripts dropped, spaces single."""
    if not text:
        return ""
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = TAG.sub(" ", _without_scripts(text))
    return " ".join(text.split())


def cleaned(texts: pa.Array) -> pa.Array:
    """Return texts as `clean` returns each of them; only those that it may change take its time."""
    texts = texts.fill_null("")
    unclean = pc.match_substring_regex(texts, UNCLEAN)
    return pc.replace_with_mask(texts, unclean, pa.array(map(clean, texts.filter(unclean).to_pylist()), pa.string()))


def _without_scripts(text: str) -> str:
    """Drop scripts and styles that end; in time linear in the text, as each part of it is searched once."""
    kept, at, endless = [], 0, set()
    for start in UNSHOWN.finditer(text):
        name = start[1].lower()
        if start.start() < at or name in endless:
            continue
        end = ENDS[name].search(text, start.end())
        if end is None:
            endless.add(name)
            continue
        kept.append(text[at : start.start()])
        at = end.end()
    return " ".join([*kept, text[at:]])
