"""Items that a model gets after its training: rows of id, title and categories, which are read and put behind the items of a catalogue.

The numbers of the items that were there stay as they are, so that everything that holds numbers of items stays right.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging
from etils import epath

from user_llm.data.declared import check_names
from user_llm.data.event_tables import open_parquet
from user_llm.data.incoming import as_arrow
from user_llm.data.schema import Schema
from user_llm.data.timelines import Catalogue
from user_llm.data.titles import LONGEST_TITLE, one_line, readable, unique_titles
from user_llm.data.values import EXACT, MISSING, shown

PLACE, TABLE = "The list of items", "The table of items"
NUMBERED = re.compile(r" \[\d+\]$")  # what `unique_titles` adds


@dataclasses.dataclass(frozen=True)
class Row:
    """An item as it was given.

    Attributes:
      where: the place of the row in a message.
      title: the title as one line; None where none is given.
      bags: the names in each bag that is given, each name once.
    """

    where: str
    id: str
    title: str | None
    bags: dict[str, tuple[str, ...]]


def extended(catalogue: Catalogue, items: Any, schema: Schema) -> Catalogue:
    """Return a catalogue with further items behind its own; the same catalogue if it has all of them.

    A title that another item has gets a number, as in training. An item without a title gets its id as its title. Categories that the
    catalogue does not know are left out, and a warning counts them.

    Args:
      items: a list of dicts with the keys `id`, `title` and the names of the catalogue's bags (such as `genres`); a table of pandas,
        polars or Arrow with these columns; or the path of a Parquet file with them, such as a model's catalogue.
      schema: the features of an event. A bag that is a feature has a limited number of columns: further categories are left out.

    Raises:
      ValueError: a value cannot be read, a title is blank, or an item is given as another one than the catalogue, or an earlier row, has
        it.
    """
    numbers = {key: number for number, key in enumerate(catalogue.keys) if number}
    fresh: dict[str, Row] = {}
    for row in _rows(items, tuple(catalogue.multi)):
        number = numbers.get(row.id)
        before = fresh.get(row.id) if number is None else _as_given(catalogue, number)
        if before is None:
            fresh[row.id] = row
        elif wrong := _difference(row, before, catalogue, schema):
            raise ValueError(f"{row.where}: the item {shown(row.id)} is there already, with {wrong}: leave the row out.")
    return _behind(catalogue, list(fresh.values()), schema) if fresh else catalogue


def rows_of(catalogue: Catalogue, first: int) -> list[dict[str, Any]]:
    """Return the items of a catalogue from number `first` on, as `extended` reads them."""
    bags = {name: [_names(catalogue, name, row) for row in table[first:].tolist()] for name, table in catalogue.multi.items()}
    return [
        {"id": key, "title": title, **{name: list(rows[place]) for name, rows in bags.items()}}
        for place, (key, title) in enumerate(zip(catalogue.keys[first:], catalogue.titles[first:], strict=True))
    ]


def _behind(catalogue: Catalogue, rows: Sequence[Row], schema: Schema) -> Catalogue:
    """Return a catalogue with new items behind its own."""
    first = len(catalogue.keys)
    given = [row.title if row.title else readable(None, row.id, first + place) for place, row in enumerate(rows)]
    titles = unique_titles([*catalogue.titles[1:], *given])
    if titles[: first - 1] != catalogue.titles[1:]:
        raise ValueError("The catalogue's titles are not unique: get the model directory again.")
    multi, left_out = {}, 0
    for name, table in catalogue.multi.items():
        ids = {value: number for number, value in enumerate(catalogue.vocab[name]) if number}
        bags = [[ids[value] for value in row.bags.get(name, ()) if value in ids] for row in rows]
        width = table.shape[1] if name in schema.names else max(table.shape[1], *map(len, bags))
        left_out += sum(len(row.bags.get(name, ())) - min(len(bag), width) for row, bag in zip(rows, bags, strict=True))
        wide = np.zeros((first + len(rows), width), np.int32)
        wide[:first, : table.shape[1]] = table
        for number, bag in enumerate(bags, first):
            wide[number, : len(bag[:width])] = bag[:width]
        multi[name] = wide
    if left_out:
        logging.warning("%d categories of new items are left out: the model does not know them, or has no room.", left_out)
    keys = [*catalogue.keys, *(row.id for row in rows)]
    return Catalogue(["", *titles], keys, multi, catalogue.vocab)


def _names(catalogue: Catalogue, name: str, row: Sequence[int]) -> tuple[str, ...]:
    return tuple(catalogue.vocab[name][number] for number in row if number)


def _as_given(catalogue: Catalogue, number: int) -> Row:
    """Return an item of the catalogue as a row."""
    bags = {name: _names(catalogue, name, table[number].tolist()) for name, table in catalogue.multi.items()}
    return Row("", catalogue.keys[number], catalogue.titles[number], bags)


def _difference(row: Row, before: Row, catalogue: Catalogue, schema: Schema) -> str:
    """Return in what an item that is there differs from what is given; the empty string if they are the same.

    Categories that the catalogue does not know, or for which a bag has no room, make no difference.
    """
    title = before.title or readable(None, before.id, 0)  # an earlier row without a title has its id as title
    if row.title and row.title not in (title, NUMBERED.sub("", title)):
        return f"the title {shown(title)}"
    for name, values in row.bags.items():
        ids = set(catalogue.vocab[name][1:])  # the first is PAD
        room = catalogue.multi[name].shape[1] if name in schema.names else None
        known, there = ([value for value in bag if value in ids][:room] for bag in (values, before.bags.get(name, ())))
        if set(known) != set(there):
            return f"the {name} {', '.join(there) or 'of none'}"
    return ""


def _rows(items: Any, bags: Sequence[str]) -> Iterator[Row]:
    """Yield what is given, row by row, read and checked."""
    place, rows = _listed(items, bags)
    for number, row in enumerate(rows, 1):
        where = f"{place}, row {number}"
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{where}: {shown(row)} is no dict; give each item as a dict of {', '.join(('id', 'title', *bags))}."
            )
        if unknown := [key for key in row if key not in _keys(bags)]:
            raise ValueError(_unknown(where, bags, unknown))
        yield Row(
            where,
            _id(where, row.get("id")),
            _title(where, row.get("title")),
            {name: _bag(where, name, row[name]) for name in bags if row.get(name) is not None},
        )


def _listed(items: Any, bags: Sequence[str]) -> tuple[str, Sequence[Any]]:
    """Return the place of the rows in a message, and the rows."""
    if isinstance(items, list | tuple):
        return PLACE, items
    if isinstance(items, str | os.PathLike):
        path = epath.Path(os.fspath(items))
        if not path.exists():
            raise ValueError(
                f"There is no file {path}: name a Parquet file with the columns {', '.join(('id', 'title', *bags))}."
            )
        file = open_parquet(path)
        names = [name for name in file.schema_arrow.names if not name.startswith("__index_level_")]  # pandas' own
        check_names(path, names, names, ["id"])
        if unknown := [name for name in names if name not in _keys(bags)]:
            raise ValueError(_unknown(path, bags, unknown))
        try:
            return str(path), _dicts(path, file.read(names, use_threads=False))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())[:160]}; get the file whole.") from None
    table = as_arrow(items, "Items")
    return TABLE, _dicts(TABLE, table) if isinstance(table, pa.Table) else table


def _dicts(place: Any, table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    if "id" in table.column_names and (kind := table.schema.field("id").type) in (pa.float16(), pa.float32()):
        raise ValueError(
            f"{place}: the ids are of type {kind}, which rounds large numbers; write them as text or whole numbers."
        )
    return table.to_pylist()


def _keys(bags: Sequence[str]) -> tuple[str, ...]:
    """Return the keys that an item may have. `events` is the count of its events in a model's catalogue.parquet, and is not read."""
    return ("id", "title", "events", *bags)


def _unknown(where: Any, bags: Sequence[str], unknown: Sequence[Any]) -> str:
    return f"{where}: an item has {', '.join(('id', 'title', *bags))}, and no {shown(unknown[0])}."


def _id(where: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:  # np.float64 is a float
        value = int(value)  # as pandas has whole numbers beside missing ones
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or value.strip() in MISSING or not _encodes(value):
        raise ValueError(f"{where}: an item's id is a text or a whole number, and not {shown(value)}.")
    return value


def _title(where: str, value: Any) -> str | None:
    if value is None:
        return None
    title = one_line(value)[:LONGEST_TITLE].strip() if isinstance(value, str) and _encodes(value) else ""
    if not title:
        raise ValueError(f"{where}: a title is a text that is not blank, and not {shown(value)}; leave it out to use the id.")
    return title


def _bag(where: str, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | np.ndarray) or not all(isinstance(one, str) and _encodes(one) for one in value):
        raise ValueError(f"{where}: {name} are a list of texts, and not {shown(value)}.")
    return tuple(dict.fromkeys(value))


def _encodes(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
