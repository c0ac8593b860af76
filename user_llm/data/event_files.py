"""Your own events: Parquet, CSV or JSON lines, in one file, a folder or a glob, with the columns that you name.

DuckDB reads them; what does not fit is said by file and row. Numbers of few values are taken as they are, others by their share of
all values.
"""

import dataclasses
import glob
from collections.abc import Iterator, Sequence

import duckdb
import pyarrow as pa
from etils import epath

from user_llm.data.raw import ROWS, Raw

READERS = {
    ".parquet": "read_parquet([{}], filename = true)",
    ".csv": "read_csv([{}], filename = true, header = true, null_padding = false)",
    ".jsonl": "read_json([{}], filename = true, format = 'newline_delimited')",
}
READERS |= {
    ".csv.gz": READERS[".csv"],
    ".jsonl.gz": READERS[".jsonl"],
    ".json": READERS[".jsonl"],
    ".json.gz": READERS[".jsonl"],
}
LEVELS = 10  # of a number; one more stands for a missing one
# Later than this many seconds since 1970 (the year 5138) a number must be meant in milliseconds.
MILLISECONDS = 100_000_000_000


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column holds what.

    Attributes:
      user, item: ids of any type.
      time: seconds or milliseconds since 1970, dates or timestamps; empty if only the order is known.
      order: whole numbers that order a user's events; empty with `time`.
      title: readable name of the item; empty for the id.
      categories: of the item: columns of names, or of lists of names.
      numbers: of the event, such as ratings and prices; each becomes a level from 1 to 10.
      texts: of the event.

    Raises:
      ValueError: neither `time` nor `order`, or both.
    """

    user: str
    item: str
    time: str = ""
    order: str = ""
    title: str = ""
    categories: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self):
        if bool(self.time) == bool(self.order):
            raise ValueError(f"Name one column of times (time={self.time!r}) or of the order of events (order={self.order!r}).")

    def named(self) -> list[str]:
        """Return all columns that must be there."""
        single = (self.user, self.item, self.time or self.order, self.title)
        return [name for name in (*single, *self.categories, *self.numbers, *self.texts) if name]


def find(source: str, columns: Columns, *, name: str) -> Raw:
    """Return the events of a file, a folder or a glob.

    Raises:
      ValueError: no such file, another kind of file, a column that is not there or cannot be what it is declared to be.
    """
    files = _files(source)
    table = _connect(files)
    types = {column: kind for column, kind, *_ in table.sql("DESCRIBE files").fetchall()}
    missing = [column for column in columns.named() if column not in types]
    if missing:
        there = ", ".join(column for column in types if column != "filename")
        raise ValueError(f"{source} has no column {', '.join(map(repr, missing))}; it has {there}.")
    levels = {column: _levels(table, column, types[column], source) for column in columns.numbers}
    time = _quoted(columns.time or columns.order)
    selected = {
        "user": f"CAST({_quoted(columns.user)} AS VARCHAR)",
        "item": f"CAST({_quoted(columns.item)} AS VARCHAR)",
        "time": _seconds(time, types[columns.time]) if columns.time else f"try_cast({time} AS BIGINT)",
        **{column: f"CAST({levels[column]} AS INTEGER)" for column in columns.numbers},
        **{column: f"coalesce(CAST({_quoted(column)} AS VARCHAR), '')" for column in columns.texts},
    }
    raw = Raw(
        name=name, files=files, events=lambda: _events(files, selected, raw.event_schema), timed=bool(columns.time),
        items=lambda: _items(files, columns, types, raw.item_schema), ordinals=dict.fromkeys(columns.numbers, LEVELS + 1),
        texts=columns.texts, bags=("categories",) if columns.categories else (),
    )  # fmt: skip
    return raw


def _files(source: str) -> tuple[epath.Path, ...]:
    path = epath.Path(source)
    found = (
        sorted(path.iterdir()) if path.is_dir() else [epath.Path(file) for file in sorted(glob.glob(source, recursive=True))]
    )
    files = tuple(file for file in found if _suffix(file) in READERS)
    kinds = {READERS[_suffix(file)] for file in files}
    if len(kinds) != 1:
        what = "holds files of several kinds" if kinds else "names no file of events"
        raise ValueError(f"{source} {what}: name one file, folder or glob of {', '.join(READERS)}.")
    return files


def _suffix(file: epath.Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def _connect(files: Sequence[epath.Path]) -> duckdb.DuckDBPyConnection:
    """Return a connection in which the view `files` holds all rows, in order."""
    table = duckdb.connect()
    table.execute("SET enable_progress_bar = false; SET memory_limit = '1GB'")
    paths = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
    try:
        table.execute(f"CREATE VIEW files AS SELECT * FROM {READERS[_suffix(files[0])].format(paths)}")
    except duckdb.Error as error:
        raise ValueError(f"{files[0].parent}: {_first_line(error)}") from None
    return table


def _first_line(error: duckdb.Error) -> str:
    return str(error).strip().splitlines()[0]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _seconds(column: str, kind: str) -> str:
    """Return SQL for seconds since 1970."""
    if kind in ("DATE", "TIMESTAMP WITH TIME ZONE") or kind.startswith("TIMESTAMP"):
        return f"CAST(floor(epoch({column})) AS BIGINT)"
    number = f"CAST(floor(try_cast({column} AS DOUBLE)) AS BIGINT)"
    seconds = f"CASE WHEN {number} > {MILLISECONDS} THEN {number} // 1000 ELSE {number} END"
    if kind == "VARCHAR":
        return f"coalesce({seconds}, CAST(floor(epoch(try_cast({column} AS TIMESTAMP))) AS BIGINT))"
    return seconds


def _levels(table: duckdb.DuckDBPyConnection, name: str, kind: str, source: str) -> str:
    """Return SQL for the level of a number."""
    column = _quoted(name)
    try:
        values = table.sql(
            f"SELECT DISTINCT {column} AS v FROM files WHERE v IS NOT NULL ORDER BY v LIMIT {LEVELS + 1}"
        ).fetchall()
        if len(values) > LEVELS:
            shares = [i / LEVELS for i in range(1, LEVELS)]
            edges = table.sql(f"SELECT quantile_disc({column}, {shares}) FROM files").fetchall()[0][0]
        else:
            edges = [value for (value,) in values[:-1]]
        edges = [float(edge) for edge in edges]
    except (duckdb.Error, TypeError, ValueError):
        raise ValueError(f"{source}: column {name!r} ({kind}) holds no numbers; list it under categories or texts.") from None
    above = " + ".join(f"CAST({column} > {edge!r} AS INTEGER)" for edge in edges) or "0"
    return f"CASE WHEN {column} IS NULL THEN {LEVELS + 1} ELSE 1 + {above} END"


def _events(files: tuple[epath.Path, ...], selected: dict[str, str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    table, file, before = _connect(files), None, 0
    chosen = ", ".join(f"{expression} AS {_quoted(name)}" for name, expression in selected.items())
    try:
        for piece in table.sql(f"SELECT {chosen}, filename FROM files").to_arrow_reader(ROWS):
            for name in ("user", "item", "time"):
                if piece[name].null_count:
                    row = piece[name].is_null().index(True).as_py()
                    names = piece["filename"][: row + 1].to_pylist()
                    number = names.count(names[-1]) + (before if names[-1] == file else 0)
                    raise ValueError(f"{names[-1]}, row {number}: no {name} that can be read; mend or delete the row.")
            names = piece["filename"].to_pylist()
            before = names.count(names[-1]) + (before if names[0] == names[-1] == file else 0)
            file = names[-1]
            yield pa.RecordBatch.from_arrays([piece[field.name].cast(field.type) for field in schema], schema=schema)
    except duckdb.Error as error:
        raise ValueError(f"{files[0].parent}: {_first_line(error)}") from None


def _items(
    files: tuple[epath.Path, ...], columns: Columns, types: dict[str, str], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    title = f"CAST(any_value({_quoted(columns.title)}) AS VARCHAR)" if columns.title else "CAST(NULL AS VARCHAR)"
    lists = [
        _quoted(name)
        if types[name].endswith("[]")
        else f"CASE WHEN {_quoted(name)} IS NULL THEN [] ELSE [CAST({_quoted(name)} AS VARCHAR)] END"
        for name in columns.categories
    ]
    bags = f", any_value(list_concat({', '.join(lists)})) AS categories" if lists else ""
    query = f"SELECT CAST({_quoted(columns.item)} AS VARCHAR) AS item, {title} AS title{bags} FROM files GROUP BY 1"
    for piece in _connect(files).sql(query).to_arrow_reader(ROWS):
        yield pa.RecordBatch.from_arrays([piece[field.name].cast(field.type) for field in schema], schema=schema)
