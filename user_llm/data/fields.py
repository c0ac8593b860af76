"""The rules by which raw columns become ids: which column holds what, and how its values are read.

A reader of raw files declares its columns as `Fields`. What only the whole dataset tells (the unit of its times, the edges of its
numbers) is added when timelines are opened. A model stores the result, so that serving reads events as training did.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from user_llm.common.records import misfit, text, true_or_false, whole_number
from user_llm.data import times

TIES = ("hashed", "file")
RESOLUTIONS = (1, 1000, 1_000_000, 1_000_000_000)  # ticks per second that times have


@dataclasses.dataclass(frozen=True)
class Number:
    """A column of numbers, which become levels: the level of a number is 1 + the count of the edges below it.

    Attributes:
      column: name of the raw column.
      edges: numbers in ascending order.
      missing: level of a missing number; 0 where no number may be missing.
      allowed: the only numbers that the column may hold; empty for any.

    Raises:
      ValueError: edges in another order, or a level below 0.
    """

    column: str
    edges: tuple[float, ...] = ()
    missing: int = 0
    allowed: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if list(self.edges) != sorted(self.edges):
            raise ValueError(f"The edges of {self.column!r} do not ascend: {list(self.edges)}.")
        if self.missing < 0:
            raise ValueError(f"The level of a missing {self.column!r} is at least 0, not {self.missing}.")

    @classmethod
    def of_scale(cls, column: str, numbers: Iterable[float]) -> "Number":
        """Return a column whose numbers are those of a scale: each has a level, and none may be missing."""
        allowed = tuple(map(float, numbers))
        return cls(column, allowed[:-1], allowed=allowed)

    @property
    def highest(self) -> int:
        """The highest level."""
        return max(len(self.edges) + 1, self.missing)

    def levels(self, numbers: pa.Array) -> Int[np.ndarray, " n"]:
        """Return the levels of numbers, which are null where they are missing."""
        levels = 1 + np.searchsorted(self.edges, numbers.fill_null(0).to_numpy(zero_copy_only=False))
        return np.where(_missing(numbers), self.missing, levels).astype(np.int32)

    def refused(self, numbers: pa.Array, *, needed: bool) -> Bool[np.ndarray, " n"]:
        """Say which numbers may not stand in this column: those that are not allowed, and with `needed` missing ones."""
        none = _missing(numbers)
        values = numbers.fill_null(0).to_numpy(zero_copy_only=False)
        outside = ~np.isin(values, self.allowed) if self.allowed else np.zeros(len(values), bool)
        return np.where(none, needed, outside)


def _missing(numbers: pa.Array) -> Bool[np.ndarray, " n"]:
    return numbers.is_null().to_numpy(zero_copy_only=False)


@dataclasses.dataclass(frozen=True)
class Text:
    """A column of texts.

    Attributes:
      column: name of the raw column.
      html: whether HTML in the texts is turned into plain text (`raw.clean`).
    """

    column: str
    html: bool = False


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which raw column holds what, and how it is read.

    Attributes:
      user, item: columns of ids.
      time: column of times, or of numbers that only order a user's events.
      timed: whether `time` holds times.
      unit: what a plain number in the column of times counts, one of `times.UNITS` or `times.COMPACT`. A reader may leave it
        empty where the whole dataset decides.
      ticks_per_second: how fine times are kept. Of orders it is how fine one of them is kept.
      numbers: columns of numbers, by the feature that each becomes.
      texts: columns of texts, by the feature that each becomes.
      ties, seed: how events at the same time are ordered (`timelines.order_events`).

    Raises:
      ValueError: an unknown unit, resolution or order of ties.
    """

    user: str = "user"
    item: str = "item"
    time: str = "timestamp"
    timed: bool = True
    unit: str = "s"
    ticks_per_second: int = 1
    numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, Text] = dataclasses.field(default_factory=dict)
    ties: str = "hashed"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unit and self.unit not in (*times.UNITS, *times.COMPACT):
            raise ValueError(f"Unknown unit of times {self.unit!r}: choose {', '.join((*times.UNITS, *times.COMPACT))}.")
        if self.ticks_per_second not in RESOLUTIONS:
            raise ValueError(f"A second has {' or '.join(map(str, RESOLUTIONS))} ticks, not {self.ticks_per_second}.")
        if self.ties not in TIES:
            raise ValueError(f"Unknown order of ties {self.ties!r}: choose {' or '.join(TIES)}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"The seed of ties is a whole number from 0 to 2^63 - 1, not {self.seed}.")

    def columns(self) -> list[str]:
        """Return the names of all columns, each once."""
        numbers = [number.column for number in self.numbers.values()]
        texts = [one.column for one in self.texts.values()]
        return list(dict.fromkeys([self.user, self.item, self.time, *numbers, *texts]))

    def only_numbers(self) -> set[str]:
        """Return the columns of which the numbers count and not how they are spelled."""
        spelled = {self.user, self.item, self.time, *(one.column for one in self.texts.values())}
        return {number.column for number in self.numbers.values()} - spelled

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        lists = lambda pairs: {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}  # noqa: E731
        return dataclasses.asdict(self, dict_factory=lists)

    @classmethod
    def from_json(cls, value: Any) -> "Fields":
        """Return the fields of a value of JSON.

        Raises:
          ValueError: a part is missing, or is not what it must be.
        """
        if wrong := misfit(value, FORM):
            raise ValueError(f"fields: {wrong}")
        numbers = {name: _of_form(Number, NUMBER, one) for name, one in _members(value["numbers"], NUMBER)}
        texts = {name: _of_form(Text, TEXT, one) for name, one in _members(value["texts"], TEXT)}
        return _of_form(cls, FORM, value | {"numbers": numbers, "texts": texts})


def _of_form(kind: type, form: Mapping[str, Any], value: Mapping[str, Any]) -> Any:
    """Return a dataclass whose attributes are the keys of a form."""
    return kind(**{key: tuple(map(float, value[key])) if isinstance(value[key], list) else value[key] for key in form})


def _members(values: Mapping[str, Any], form: Any) -> list[tuple[str, Any]]:
    for name, value in values.items():
        if wrong := misfit(value, form):
            raise ValueError(f"fields: {name!r} {wrong}")
    return list(values.items())


def finite_number(value: Any) -> bool:
    """Return whether a value is a number that a float64 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _object(value: Any) -> bool:
    return isinstance(value, dict)


_object.__name__ = "object"
NUMBER = {"column": text, "edges": [finite_number], "missing": whole_number, "allowed": [finite_number]}
TEXT = {"column": text, "html": true_or_false}
FORM = {
    **dict.fromkeys(("user", "item", "time", "unit", "ties"), text),
    "timed": true_or_false,
    "ticks_per_second": whole_number,
    "seed": whole_number,
    "numbers": _object,
    "texts": _object,
}
