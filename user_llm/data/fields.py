"""`Fields`: which raw column holds the user, the item, the time and so on, and how the values of each column are read.

A reader of raw files declares its columns as `Fields`. Some settings can be known only from the whole dataset, such as the unit of
its times; they are added when timelines are opened. A model stores the result, so that serving reads events as training did.
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
RESOLUTIONS = (1, 1000, 1_000_000, 1_000_000_000)  # the possible numbers of ticks in a second


@dataclasses.dataclass(frozen=True)
class Number:
    """A column of numbers, each of which becomes a level: 1 + the number of edges that are below it.

    Attributes:
      column: the name of the raw column.
      edges: the numbers that separate levels, ascending.
      missing: the level of a missing number; 0 if no number may be missing.
      allowed: the only numbers that the column may hold; empty if it may hold any number.

    Raises:
      ValueError: the edges do not ascend, or `missing` is below 0.
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
        """Return a column that holds the numbers of a scale, such as 1 to 5 stars. Each has its own level; none may be missing."""
        allowed = tuple(map(float, numbers))
        return cls(column, allowed[:-1], allowed=allowed)

    @property
    def highest(self) -> int:
        """The highest level."""
        return max(len(self.edges) + 1, self.missing)

    def levels(self, numbers: pa.Array) -> Int[np.ndarray, " n"]:
        """Return the level of each number; null is a missing number."""
        levels = 1 + np.searchsorted(self.edges, numbers.fill_null(0).to_numpy(zero_copy_only=False))
        return np.where(_missing(numbers), self.missing, levels).astype(np.int32)

    def refused(self, numbers: pa.Array, *, needed: bool) -> Bool[np.ndarray, " n"]:
        """Return a mask of the values that this column may not hold.

        Args:
          needed: whether missing numbers are among them.
        """
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
      column: the name of the raw column.
      html: whether HTML in the texts is turned into plain text (`raw.clean`).
    """

    column: str
    html: bool = False


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which raw column holds what, and how its values are read.

    Attributes:
      user, item: the columns of user ids and item ids.
      time: the column of times, or of orders: numbers that say only which of a user's events come first.
      timed: whether `time` holds times; otherwise it holds orders.
      unit: the unit of a plain number in the column of times, one of `times.UNITS` or `times.COMPACT`. It is empty until it is
        known, where a reader leaves the decision to the whole dataset.
      ticks_per_second: the resolution to which times are rounded down. Orders are rounded down to 1 / `ticks_per_second`.
      numbers: the columns of numbers, by the name of the feature that each becomes.
      texts: the columns of texts, by the name of the feature that each becomes.
      ties, seed: how events at the same time are ordered; see `timelines.order_events`.

    Raises:
      ValueError: the unit, the resolution, the order of ties or the seed is not one of those allowed.
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
        """Return the columns whose values are read as numbers alone, so that 4 and 4.0 are the same."""
        spelled = {self.user, self.item, self.time, *(one.column for one in self.texts.values())}
        return {number.column for number in self.numbers.values()} - spelled

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON value, which `from_json` reads."""
        lists = lambda pairs: {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}  # noqa: E731
        return dataclasses.asdict(self, dict_factory=lists)

    @classmethod
    def from_json(cls, value: Any) -> "Fields":
        """Return the fields from the value that `to_json` returned.

        Raises:
          ValueError: a part is missing or of a wrong type.
        """
        if wrong := misfit(value, FORM):
            raise ValueError(f"fields: {wrong}")
        numbers = {name: _of_form(Number, NUMBER, one) for name, one in _members(value["numbers"], NUMBER)}
        texts = {name: _of_form(Text, TEXT, one) for name, one in _members(value["texts"], TEXT)}
        return _of_form(cls, FORM, value | {"numbers": numbers, "texts": texts})


def _of_form(kind: type, form: Mapping[str, Any], value: Mapping[str, Any]) -> Any:
    """Return a dataclass of this kind; `value` holds its attributes, which are the keys of `form`."""
    return kind(**{key: tuple(map(float, value[key])) if isinstance(value[key], list) else value[key] for key in form})


def _members(values: Mapping[str, Any], form: Any) -> list[tuple[str, Any]]:
    for name, value in values.items():
        if wrong := misfit(value, form):
            raise ValueError(f"fields: {name!r} {wrong}")
    return list(values.items())


def finite_number(value: Any) -> bool:
    """Return whether a value is a finite number within the range of float64."""
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
