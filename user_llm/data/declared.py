"""Reading rows by their declared columns. All readers of events use this module.

A value that does not fit its column either ends the reading, with a message that names file and row, or leaves its row out.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from user_llm.data import columns, times
from user_llm.data.columns import Bad, Column, WrongType
from user_llm.data.event_tables import Piece
from user_llm.data.raw import BadRows
from user_llm.data.values import NO_TEXT, shown


def check_names(place: Any, there: Sequence[str], wanted: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a table without the columns that it needs, or with two of one name.

    Args:
      place: the table's name in a message, such as the path of its file.
      there: the names of the table's columns; empty if they are not known.
      wanted: the names of the columns that are read.
      needed: the names among `wanted` that the table must have.

    Raises:
      ValueError: a column is missing, or is there twice.
    """
    for name in wanted:
        if there.count(name) > 1:
            raise ValueError(f"{place} has {there.count(name)} columns {name!r}: rename all but one.")
    if missing := [name for name in needed if name not in there and there]:
        raise ValueError(f"{place} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, there))}.")


class Rows:
    """The rows of a piece of events, which are read column by column.

    The methods `ids`, `texts`, `names`, `numbers` and `times` each read the column that `name` names. They raise a ValueError if the
    type of the whole column is wrong. They only note a row whose value is wrong. `settle` then refuses such rows or leaves them out.
    """

    def __init__(self, piece: Piece):
        self.piece = piece
        self._faults: list[tuple[Bad, str, str, str]] = []

    def __len__(self) -> int:
        return len(self.piece.rows)

    def ids(self, name: str, kind: str) -> pa.Array:
        """Return a column of ids. An id must not be missing. `kind` is the word for an id in a message, such as "user"."""
        found, bad = self._read(name, kind, columns.text)
        self.refuse(bad | columns.missing(found), name, kind)
        return found

    def texts(self, name: str, kind: str = "text") -> pa.Array:
        """Return a column of texts; a missing text is the empty one."""
        found, bad = self._read(name, kind, columns.text)
        self.refuse(bad, name, kind)
        return pc.if_else(pa.array(columns.missing(found, NO_TEXT)), "", found)

    def names(self, name: str) -> pa.Array:
        """Return a column of lists of names; a missing list is the empty one."""
        found, bad = self._read(name, "category", columns.names)
        self.refuse(bad, name, "category")
        return found

    def numbers(self, name: str, more: str = "") -> pa.Array:
        """Return a column of float64 numbers, null where a number is missing; `more` is added to the end of a message."""
        found, bad = self._read(name, "number", columns.number)
        self.refuse(bad, name, "number", more)
        return found

    def times(self, name: str, *, order: bool, compact: bool) -> times.Times:
        """Return a column of times, or with `order` a column of numbers that order events; see `times.read`."""
        kind = "order" if order else "time"
        found = self._read(name, kind, lambda column: times.read(column, order=order, compact=compact))
        self.refuse(found.bad, name, kind)
        return found

    def refuse(self, bad: Bad, name: str, kind: str, more: str = "") -> None:
        """Note the rows, given as a mask, in which a column holds a value that does not fit it."""
        if bad.any():
            self._faults.append((bad, name, kind, more))

    def settle(self, bad_rows: BadRows) -> pa.Array | None:
        """Refuse the first bad row, or leave all bad rows out.

        Returns:
          A mask of the rows that remain; None if all rows remain.

        Raises:
          ValueError: a row is bad, and `bad_rows` says to refuse it.
        """
        if not self._faults:
            return None
        bad = np.any([mask for mask, *_ in self._faults], axis=0)
        row = int(np.argmax(bad))
        name, kind, more = next(rest for mask, *rest in self._faults if mask[row])
        column = self.piece.columns.get(name)
        value = None if column is None else column[row]
        value = value.as_py() if isinstance(value, pa.Scalar) else value
        fault = f"no {kind} that can be read, as column {name!r} holds {_shown(value)}{more}"
        bad_rows(f"{self.piece.file}, row {self.piece.rows[row]}: {fault}", int(bad.sum()))
        return pa.array(~bad)

    def _read(self, name: str, kind: str, read: Callable[[Column], Any]) -> Any:
        column = self.piece.columns.get(name)
        try:
            return read(pa.nulls(len(self)) if column is None else column)
        except WrongType as error:
            raise ValueError(
                f"{self.piece.file}: column {name!r} is of type {error}, which is no {kind}: name another column, or cast this one."
            ) from None


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            value = value.decode()
    return "nothing" if value is None else shown(value)
