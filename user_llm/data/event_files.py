"""Your own events: Parquet, CSV or JSON lines, in one file, a folder or a glob, with the columns that you name.

Every column is read as what it is declared to be, and no type is guessed; what does not fit is said by file and row. Numbers of few
values are taken as they are, others by their share of all values (`prepare.py`).
"""

import dataclasses
import glob
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from user_llm.common.files import check_regular
from user_llm.data import times
from user_llm.data.declared import Rows, check_names
from user_llm.data.event_tables import FORMATS, Format, Piece, format_of
from user_llm.data.fields import Fields
from user_llm.data.raw import BadRows, Raw, pieces

# The ends of the names of packed files, as other programs write them beside those that are read.
PACKED = frozenset(
    [".bz2", ".zip", ".xz", ".zst", ".zstd", ".lz4", ".snappy", ".lzo", ".br", ".z", ".7z", ".rar", ".tar", ".tgz"]
)
LOGS = {"_delta_log": "Delta Lake", ".hoodie": "Apache Hudi"}  # the folders in which such tables say which of their files count
RULES = 2  # the version of how events are read; what an earlier one has prepared is prepared again
LEVELS = 10  # of a number; one more stands for a missing one


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column holds what.

    Attributes:
      user, item: ids of any type that is not nested; they are text, whose spelling is kept.
      time: numbers since 1970 in one unit, dates or timestamps; empty if only the order is known.
      time_unit: of numbers: s, ms, us, ns, YYYYMMDD or YYYYMMDDHHMMSS; empty for one that is decided from all of them
        (`times.decide`).
      order: numbers that order a user's events; empty with `time`.
      title: readable name of the item, of which the first that is not blank counts; empty for the id.
      categories: of the item: columns of names, or of lists of names.
      numbers: of the event, such as ratings and prices; each becomes a level from 1 to 10.
      texts: of the event.

    Raises:
      ValueError: neither `time` nor `order`, or both; an unknown unit; a number or text that is named twice.
    """

    user: str
    item: str
    time: str = ""
    order: str = ""
    title: str = ""
    categories: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    time_unit: str = ""

    def __post_init__(self):
        if bool(self.time) == bool(self.order):
            raise ValueError(f"Name one column of times (time={self.time!r}) or of the order of events (order={self.order!r}).")
        units = (*times.UNITS, *times.COMPACT)
        if self.time_unit and self.time_unit not in units:
            raise ValueError(f"Unknown data.columns.time_unit {self.time_unit!r}: choose {', '.join(units)}, or '' to decide.")
        features = (*self.numbers, *self.texts)
        for name in features:
            if features.count(name) > 1:
                raise ValueError(f"Column {name!r} is named twice in numbers and texts: name it once.")

    def needed(self) -> list[str]:
        """Return the columns that every file must have."""
        return [self.user, self.item, self.time or self.order]

    def named(self) -> list[str]:
        """Return all columns, each once."""
        optional = (self.title, *self.categories, *self.numbers, *self.texts)
        return list(dict.fromkeys([*self.needed(), *filter(None, optional)]))


def find(source: str, columns: Columns, *, name: str, bad_rows: str = "refuse") -> Raw:
    """Return the events of a file, a folder or a glob.

    Args:
      bad_rows: `refuse`, or `skip` to leave rows out that cannot be read.

    Raises:
      ValueError: no such file, another kind of file, a column that is not there or whose type can never be what it is declared to be.
    """
    files, form = find_files(source)
    _check_columns(source, files, form, columns)
    reader = _Reader(columns, files, form, BadRows.of(bad_rows))
    dates = reader.first_is_date()
    unit = "s" if dates else columns.time_unit  # of what the reader gives; numbers that stand for dates are dates
    raw = Raw(
        name=name, files=files, events=lambda: reader.events(raw.event_schema, dates), items=lambda: reader.items(raw.item_schema),
        ordinals=dict.fromkeys(columns.numbers, LEVELS + 1), measured=columns.numbers, texts=columns.texts,
        bags=("categories",) if columns.categories else (), timed=bool(columns.time), unit=unit,
        fields=Fields(columns.user, columns.item, columns.time or columns.order, unit=columns.time_unit or unit),
        bad_rows=reader.bad_rows, settings=f"{columns} {bad_rows} {RULES}",
    )  # fmt: skip
    return raw


def find_files(source: str) -> tuple[tuple[epath.Path, ...], Format]:
    """Return the files of a file, a folder or a glob, and their format.

    A name that exists is taken literally, whatever signs it has. Of a folder the files count, and those of its folders that are
    called `key=value` or as a file is, `part.parquet`, but hidden ones do not.

    Raises:
      ValueError: there is no such file; files are of several formats; one is packed otherwise than by gzip; or a log beside the files
        says that some of them no longer count, as in tables of Delta Lake.
    """
    path = epath.Path(source)
    if path.is_dir():
        found = _in_folder(path)
    elif path.exists():
        found = [path]
    else:
        found = []
        for name in sorted(glob.glob(source, recursive=True)):
            one = epath.Path(name)
            found += _in_folder(one) if one.is_dir() and _is_part(one) else [one]
    found = list(dict.fromkeys(found))
    if packed := [
        file for file in found if file.suffix.lower() in PACKED and format_of(file.with_suffix("")) and not file.is_dir()
    ]:
        raise ValueError(f"{packed[0]} is packed in a way that is not read here: unpack it, or pack it by gzip.")
    files = tuple(file for file in found if format_of(file) and not file.is_dir())
    forms = {id(form): form for form in map(format_of, files) if form}
    if len(forms) != 1:
        what = "holds files of several kinds" if forms else "names no file of events"
        raise ValueError(f"{source} {what}: name one file, folder or glob of {', '.join(FORMATS)}, packed by gzip or not.")
    for file in files:
        check_regular(file)
    for folder in dict.fromkeys(above for file in files for above in _of_table(file.parent)):
        _check_log(folder)
    return files, next(iter(forms.values()))


def _in_folder(folder: epath.Path, above: tuple[str, ...] = ()) -> list[epath.Path]:
    found: list[epath.Path] = []
    place = os.path.realpath(folder)
    if place in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in: delete it.")
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            found.append(path)
        elif _is_part(path):
            found += _in_folder(path, (*above, place))
    return found


def _of_table(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield a folder and those above it that belong to the same table."""
    yield folder
    if _is_part(folder) and folder != folder.parent:
        yield from _of_table(folder.parent)


def _check_log(folder: epath.Path) -> None:
    """Refuse a folder whose log says that some of its files no longer count."""
    if logs := [name for name in LOGS if (folder / name).is_dir()]:
        raise ValueError(
            f"{folder} is a table of {LOGS[logs[0]]}, whose files hold rows that were deleted since: write the table as Parquet and name that."
        )


def _is_part(folder: epath.Path) -> bool:
    """Say whether a folder within another one holds a part of its table, as Hive and Spark write them."""
    return "=" in folder.name or format_of(folder) is not None


def _check_columns(source: str, files: tuple[epath.Path, ...], form: Format, columns: Columns) -> None:
    anywhere: dict[str, None] = {}
    for file in files:
        there = form.names(file, columns.named())
        check_names(file, there, columns.named(), columns.needed())
        anywhere |= dict.fromkeys(there)
    check_names(source, list(anywhere), columns.named(), columns.named())


class _Reader:
    """Reads all columns of the files in one pass, of which the items' titles and categories remain."""

    def __init__(self, columns: Columns, files: tuple[epath.Path, ...], form: Format, bad_rows: BadRows):
        self.columns, self.files, self.form, self.bad_rows = columns, files, form, bad_rows
        self.role = "time" if columns.time else "order"
        self.titles: dict[str, str] = {}
        self.names: list[dict[str, list[str]]] = [{} for _ in columns.categories]

    def _pieces(self, bad_rows: BadRows) -> Iterator[Piece]:
        columns = self.columns
        spelled = {*columns.needed(), columns.title, *columns.categories, *columns.texts}
        for file in self.files:
            for piece in self.form.pieces(file, columns.named(), set(columns.numbers) - spelled, bad_rows):
                if len(piece.rows):
                    yield piece

    def _times(self, rows: Rows) -> times.Times:
        columns = self.columns
        compact = columns.time_unit in times.COMPACT
        return rows.times(columns.time or columns.order, order=bool(columns.order), compact=compact)

    def first_is_date(self) -> bool:
        """Say whether the first readable time is a date; the others must be what it is."""
        for piece in self._pieces(BadRows(skip=True, warnings=0)):
            found = self._times(Rows(piece))
            if not found.bad.all():
                return bool(found.dates[np.argmin(found.bad)])
        return False

    def events(self, schema: pa.Schema, dates: bool) -> Iterator[pa.RecordBatch]:
        """Yield the events, and gather the items."""
        self.titles.clear()
        for names in self.names:
            names.clear()
        self.bad_rows.count = 0
        for piece in self._pieces(self.bad_rows):
            batch = self._batch(piece, schema, dates)
            if batch is not None and len(batch):
                yield batch

    def _batch(self, piece: Piece, schema: pa.Schema, dates: bool) -> pa.RecordBatch | None:
        columns, rows = self.columns, Rows(piece)
        values: dict[str, pa.Array] = {"user": rows.ids(columns.user, "user"), "item": rows.ids(columns.item, "item")}
        found = self._times(rows)
        other = f", while the first {self.role} is {'a date' if dates else 'a number'}"
        rows.refuse(~found.bad & (found.dates != dates), columns.time or columns.order, self.role, other)
        values |= {"time": pa.array(found.whole), "fraction": pa.array(found.fraction)}
        for n, name in enumerate(columns.numbers):
            values[f"level_{n}"] = rows.numbers(name, "; list columns of names under categories or texts")
        for n, name in enumerate(columns.texts):
            values[f"text_{n}"] = rows.texts(name)
        titles = rows.texts(columns.title, "title")
        bags = [rows.names(name) for name in columns.categories]
        good = rows.settle(self.bad_rows)
        batch = pa.RecordBatch.from_arrays([values[field.name] for field in schema], schema=schema)
        if good is not None:
            batch, titles, bags = batch.filter(good), titles.filter(good), [bag.filter(good) for bag in bags]
        self._gather(batch["item"], titles, bags)
        return batch

    def _gather(self, items: pa.Array, titles: pa.Array, bags: list[pa.Array]) -> None:
        """Keep the first title that is not blank, and the first categories that are not empty, of each item."""
        codes = items.dictionary_encode()
        if self.columns.title:
            filled = pc.not_equal(pc.utf8_trim_whitespace(titles), "").fill_null(False)
            _keep_first(codes, filled.to_numpy(zero_copy_only=False), titles, self.titles)
        for bag, kept in zip(bags, self.names, strict=True):
            _keep_first(codes, pc.list_value_length(bag).to_numpy(zero_copy_only=False) > 0, bag, kept)

    def items(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield what was gathered."""
        gathered: list[dict[str, Any]] = [self.titles, *self.names]
        kept = dict.fromkeys(item for values in gathered for item in values)
        rows = ((item, self.titles.get(item), [name for names in self.names for name in names.get(item, ())]) for item in kept)
        return pieces((row[: len(schema)] for row in rows), schema)


def _keep_first(codes: pa.DictionaryArray, filled: np.ndarray, values: pa.Array, kept: dict[str, Any]) -> None:
    """Keep for each item that has none yet the first of the values that are filled."""
    rows = np.flatnonzero(filled)
    unique, first = np.unique(codes.indices.to_numpy()[rows], return_index=True)
    keys = codes.dictionary.take(pa.array(unique)).to_pylist()
    missing = [n for n, key in enumerate(keys) if key not in kept]
    for n, value in zip(missing, values.take(pa.array(rows[first[missing]])).to_pylist(), strict=True):
        kept[keys[n]] = value
