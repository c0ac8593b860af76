"""The catalogue of a model as a Parquet file, with one row for each item in the order of the items' numbers from 1.

The columns are `id`, `title`, one list of names for each bag (such as `genres`), and `events`, the number of the item's events in
training.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath
from jaxtyping import Int

from user_llm.common.files import whole
from user_llm.data.event_tables import open_parquet
from user_llm.data.schema import Schema
from user_llm.data.timelines import Catalogue
from user_llm.data.values import shown

REMEDY = "get the file as it was written"


def _columns(bags: Mapping[str, object]) -> pa.Schema:
    names = ("id", "title", *bags, "events")
    if len(set(names)) < len(names):
        raise ValueError(f"A catalogue has the columns id, title and events, and so no bag of these names: {', '.join(bags)}.")
    kinds = (pa.string(), pa.string(), *(pa.list_(pa.string()) for _ in bags), pa.int64())
    return pa.schema(zip(names, kinds, strict=True))


def write_catalogue(path: epath.PathLike, catalogue: Catalogue, counts: Int[np.ndarray, " I+1"]) -> None:
    """Write a catalogue to a Parquet file.

    Args:
      counts: the number of training events of each item; index 0 is PAD.

    Raises:
      ValueError: a bag has the name `id`, `title` or `events`.
    """
    bags = {
        name: [[catalogue.vocab[name][number] for number in row if number] for row in numbers[1:].tolist()]
        for name, numbers in catalogue.multi.items()
    }
    columns = [catalogue.keys[1:], catalogue.titles[1:], *bags.values(), counts[1:]]
    with whole(epath.Path(path)) as target:
        pa.parquet.write_table(pa.table(columns, schema=_columns(bags)), target)


def read_catalogue(
    path: epath.PathLike, schema: Schema, names: Mapping[str, Sequence[str]]
) -> tuple[Catalogue, Int[np.ndarray, " I+1"]]:
    """Return the catalogue of a file, and the number of training events of each item.

    Args:
      names: the names of each bag's ids, from 1, as `vocabulary.schema_and_names` returns them.

    Raises:
      ValueError: the file is not a Parquet file of these columns; the number of items is not that of the schema; an id or a title
        is missing or there twice; a name is not among `names`; or a count is below 0.
    """
    table = _table(path, names)
    if len(table) != schema.num_items:
        raise ValueError(f"{path} has {len(table)} items where the schema has {schema.num_items}; {REMEDY}.")
    for column in ("id", "title"):
        _refuse_repeated(path, column, table[column].to_pylist())
    counts = table["events"].to_numpy()
    if (counts < 0).any():
        raise ValueError(f"{path}, row {1 + int(np.argmax(counts < 0))}: events are at least 0; {REMEDY}.")
    multi = {name: _bag(path, name, table[name].to_pylist(), known, schema) for name, known in names.items()}
    catalogue = Catalogue(
        titles=["", *table["title"].to_pylist()],
        keys=["", *table["id"].to_pylist()],
        multi=multi,
        vocab={name: ["", *known] for name, known in names.items()},
    )
    return catalogue, np.concatenate([[0], counts])


def _table(path: epath.PathLike, bags: Mapping[str, object]) -> pa.Table:
    wanted = _columns(bags)
    file = open_parquet(epath.Path(path))
    there = file.schema_arrow.names
    if missing := [name for name in wanted.names if there.count(name) != 1]:
        raise ValueError(f"{path} has not one column {', '.join(map(repr, missing))}, but {', '.join(there)}; {REMEDY}.")
    try:
        table = file.read(wanted.names, use_threads=False).select(wanted.names).cast(wanted)
        table.validate(full=True)  # this checks that texts are UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:160]}; {REMEDY}.") from None
    for name in wanted.names:
        if table[name].null_count:
            row = 1 + table[name].is_null().to_pylist().index(True)
            raise ValueError(f"{path}, row {row}: column {name!r} holds nothing; {REMEDY}.")
    return table


def _refuse_repeated(path: epath.PathLike, column: str, values: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for row, value in enumerate(values, 1):
        if seen.setdefault(value, row) != row:
            raise ValueError(f"{path}, row {row}: {column} {shown(value)} is that of row {seen[value]} too; {REMEDY}.")


def _bag(
    path: epath.PathLike, name: str, rows: Sequence[Sequence[str]], known: Sequence[str], schema: Schema
) -> Int[np.ndarray, "V W"]:
    """Return the ids of a bag, one row for each item, padded with 0.

    The number of columns W is that of the bag's feature in the schema. If the bag is not a feature, it is the length of the longest
    row.

    Args:
      name: the name of the bag.
      rows: the names in the bag of each item.
      known: the names of the ids, from 1.
    """
    ids = {value: number for number, value in enumerate(known, 1)}
    longest = max(max(map(len, rows), default=0), 1)
    width = schema[name].width if name in schema.names else longest
    numbers = np.zeros((len(rows) + 1, width), np.int32)
    for row, values in enumerate(rows, 1):
        if unknown := [value for value in values if value not in ids]:
            raise ValueError(f"{path}, row {row}: {shown(unknown[0])} is none of the {name} of the model; {REMEDY}.")
        if len(values) > width:
            raise ValueError(f"{path}, row {row}: {len(values)} {name} where the model has at most {width}; {REMEDY}.")
        numbers[row, : len(values)] = [ids[value] for value in values]
    return numbers
