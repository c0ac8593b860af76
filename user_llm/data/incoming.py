"""Events as a caller has them (a list of dicts, a pandas, polars or Arrow table, or files), cut into pieces of columns.

pandas and polars need not be installed. Their tables are read by Arrow.
"""

import datetime
import decimal
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from user_llm.data.declared import check_names
from user_llm.data.event_files import find_files
from user_llm.data.event_tables import Piece
from user_llm.data.raw import ROWS, BadRows
from user_llm.data.values import shown

PLAIN = (str, int, float, bool, type(None), list, tuple, dict)  # the types of values that `columns.py` reads
LIST, TABLE = epath.Path("The list of events"), epath.Path("The table of events")  # in messages, in the place of a file's path


def event_pieces(
    events: Any, wanted: Sequence[str], *, needed: Sequence[str], numbers: Collection[str], bad_rows: BadRows
) -> tuple[set[str], Iterator[Piece]]:
    """Return the names of the wanted columns that the events have, and an iterator over the events in pieces.

    Args:
      events: a list of dicts; a pandas table, or any table that Arrow can read; or the path of a file, a folder or a glob.
      wanted: the names of the columns to read.
      needed: the names among `wanted` that the events must have.
      numbers: the names among `wanted` whose values are read as numbers alone, so that 4 and 4.0 are the same.
      bad_rows: what happens to rows that cannot be read.

    Raises:
      ValueError: the events are of another type, a column is missing or there twice, or a file cannot be read.
    """
    if isinstance(events, str | os.PathLike):
        return _of_files(os.fspath(events), wanted, needed, numbers, bad_rows)
    if isinstance(events, list | tuple):
        return _of_dicts(events, wanted, needed)
    table = as_arrow(events, "Events")
    return _of_table(table, wanted, needed) if isinstance(table, pa.Table) else _of_dicts(table, wanted, needed)


def _of_files(
    source: str, wanted: Sequence[str], needed: Sequence[str], numbers: Collection[str], bad_rows: BadRows
) -> tuple[set[str], Iterator[Piece]]:
    files, form = find_files(source)
    there: set[str] = set()
    for file in files:
        names = form.names(file, wanted)
        check_names(file, names, wanted, needed)
        there |= set(names) & set(wanted)
    return there, itertools.chain.from_iterable(form.pieces(file, wanted, numbers, bad_rows) for file in files)


def _of_dicts(events: Sequence[Any], wanted: Sequence[str], needed: Sequence[str]) -> tuple[set[str], Iterator[Piece]]:
    names: dict[str, None] = {}
    for row, event in enumerate(events, 1):
        if not isinstance(event, Mapping):
            raise ValueError(f"{LIST}, row {row}: {shown(event)} is no dict; give each event as a dict of its columns.")
        names |= dict.fromkeys(event)
    check_names(LIST, list(names), wanted, needed)
    there = [name for name in wanted if name in names]

    def pieces() -> Iterator[Piece]:
        for first in range(0, len(events), ROWS):
            part = events[first : first + ROWS]
            columns = {name: [_plain(event.get(name)) for event in part] for name in there}
            yield Piece(LIST, np.arange(first + 1, first + len(part) + 1), columns)

    return set(there), pieces()


def _plain(value: Any) -> Any:
    """Return a value in a type that JSON has: a date as ISO 8601 text, a NumPy number as a Python number, a decimal as text."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.datetime64):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # bytes that are not UTF-8 stay invalid, and are refused later
    if isinstance(value, datetime.date):  # a datetime is a date too
        return value.isoformat()
    if type(value).__name__ == "NAType":  # the missing value of pandas
        return None
    return str(value) if isinstance(value, decimal.Decimal) else value


def as_arrow(rows: Any, what: str) -> pa.Table | list[dict]:
    """Return a table as an Arrow table; a pandas table with a column of mixed types as a list of dicts.

    Args:
      what: what the rows are, in a message, such as "Events".

    Raises:
      ValueError: no table of a kind that can be read.
    """
    of_pandas = type(rows).__module__.split(".")[0] == "pandas" and hasattr(rows, "columns")
    if not (of_pandas or hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__")):
        kind = type(rows).__name__
        raise ValueError(f"{what} are a list of dicts, a table of pandas, polars or Arrow, or the path of a file, not {kind}.")
    try:
        return pa.Table.from_pandas(rows, preserve_index=False) if of_pandas else pa.table(rows)
    except (pa.ArrowException, TypeError, ValueError) as error:
        if of_pandas and isinstance(error, pa.ArrowException):
            return rows.to_dict("records")
        where = f"The table of {what.lower()}"
        raise ValueError(f"{where} cannot be read by Arrow: {' '.join(str(error).split())[:160]}.") from None


def _of_table(table: pa.Table, wanted: Sequence[str], needed: Sequence[str]) -> tuple[set[str], Iterator[Piece]]:
    check_names(TABLE, table.column_names, wanted, needed)
    there = [name for name in wanted if name in table.column_names]

    def pieces() -> Iterator[Piece]:
        number = 1
        for batch in table.select(there).to_batches(ROWS):
            columns = dict(zip(there, batch.columns, strict=True))
            yield Piece(TABLE, np.arange(number, number + len(batch)), columns)
            number += len(batch)

    return set(there), pieces()
