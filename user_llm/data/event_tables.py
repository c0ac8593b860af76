"""Tables in files: Parquet, CSV or JSON lines, read in pieces of columns that nobody has interpreted yet."""

import collections
import csv
import dataclasses
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from etils import epath
from jaxtyping import Int

from user_llm.common.files import check_regular
from user_llm.data.columns import Column
from user_llm.data.json_lines import alike
from user_llm.data.opening import CHUNK_BYTES, LONGEST_LINE, Damaged, line_chunks, opened
from user_llm.data.quotes import Misquoted, Quoted
from user_llm.data.raw import ROWS, BadRows
from user_llm.data.values import json_object

SEPARATORS = ",;\t|"
END = b"\0"  # each value of the row that is put after the last
LONGEST_HEADER = 1 << 20  # bytes
ALIKE = {
    str: pa.string(),
    int: pa.int64(),
    type(None): pa.string(),
    list: pa.list_(pa.string()),
}  # floats must keep their spelling
KEYS_SEEN = 1000  # lines of JSON whose keys all count as columns of their file; of later lines only keys that are asked for do


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some rows of a file.

    Attributes:
      rows: their numbers in the file, from 1; a CSV's header is none, and neither are its blank lines.
      columns: by name, those that were asked for and that the file has.
    """

    file: epath.Path
    rows: Int[np.ndarray, " n"]
    columns: dict[str, Column]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      names: returns the columns of a file, given those that must be there.
      pieces: returns its rows, with the columns of the given names that are there; of the second ones the numbers count, not how
        they are spelled.
    """

    names: Callable[[epath.Path, Sequence[str]], list[str]]
    pieces: Callable[[epath.Path, Sequence[str], Collection[str], BadRows], Iterator[Piece]]


def _csv_header(file: epath.Path, needed: Sequence[str]) -> tuple[str, list[str]]:
    """Return the separator, under which the header has most of the needed columns, and the header."""
    with opened(file) as stream:
        try:
            start = stream.read(LONGEST_HEADER).removeprefix(b"\xef\xbb\xbf")
        except Damaged as error:
            raise ValueError(f"{file}, row 1: {error}.") from None
    try:
        text = start.decode(errors="ignore" if len(start) == LONGEST_HEADER else "strict")
    except UnicodeDecodeError as error:
        if b"\n" not in start[: error.start]:
            raise ValueError(f"{file}: the header is not UTF-8; save the file as UTF-8.") from None
        text = start[: error.start].decode()
    headers = {}
    for separator in SEPARATORS:
        try:
            headers[separator] = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
        except csv.Error:
            headers[separator] = []
    separator = max(SEPARATORS, key=lambda one: len(set(needed) & set(headers[one])))
    if not headers[separator]:
        raise ValueError(f"{file} has no header: its first line must name the columns.")
    return separator, headers[separator]


class _Ended(io.RawIOBase):
    """A file's bytes and after them a row of our own, which a quotation mark that is never closed swallows."""

    def __init__(self, stream: BinaryIO | Quoted, end: bytes):
        self._parts = stream, io.BytesIO(end)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return next((size for part in self._parts if (size := part.readinto(buffer))), 0)  # type: ignore[union-attr]


def _csv_pieces(file: epath.Path, wanted: Sequence[str], numbers: Collection[str], bad_rows: BadRows) -> Iterator[Piece]:
    separator, header = _csv_header(file, wanted)
    places = {name: f"c{header.index(name)}" for name in wanted if name in header}
    names = [f"c{place}" for place in range(len(header))]
    ragged: collections.deque[tuple[int, int]] = collections.deque()  # row and count of values, ahead of the pieces

    def note(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append((row.number - 1, row.actual_columns))
        return "skip"

    number, ended = 1, False
    with opened(file) as stream:
        try:
            reader = pyarrow.csv.open_csv(
                io.BufferedReader(_Ended(Quoted(stream, separator), b"\n" + separator.encode().join([END] * len(header)) + b"\n"), 1 << 20),
                pyarrow.csv.ReadOptions(
                    use_threads=False, block_size=LONGEST_LINE // 2, column_names=names, skip_rows_after_names=1
                ),
                pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=note),
                pyarrow.csv.ConvertOptions(
                    check_utf8=False, strings_can_be_null=False, include_columns=list(places.values()),
                    column_types=dict.fromkeys(names, pa.binary()),
                ),
            )  # fmt: skip
            for batch in reader:
                if ended := len(batch) > 0 and batch[0][-1].as_py() == END:
                    batch = batch.slice(0, len(batch) - 1)
                rows, number = _numbers(number, len(batch), [row for row, _ in ragged])
                _refuse_ragged(file, ragged, number, len(header), bad_rows)
                for first in range(0, len(batch), ROWS):
                    part = batch.slice(first, ROWS)
                    yield Piece(file, rows[first : first + ROWS], {name: part[place] for name, place in places.items()})
        except Misquoted as error:
            raise ValueError(f"{file}, {error}.") from None
        except Damaged as error:
            raise ValueError(f"{file}, after row {number - 1}: {error}.") from None
        except pa.ArrowInvalid as error:
            if ragged:
                _refuse_ragged(file, ragged, ragged[-1][0] + 1, len(header), bad_rows)
            what = f"a row longer than {LONGEST_LINE >> 21} MiB, or a quotation mark that is never closed"
            what = what if "straddling" in str(error) else " ".join(str(error).split())
            raise ValueError(f"{file}, after row {number - 1}: {what}; mend or delete the row.") from None
    _refuse_ragged(file, ragged, number + len(ragged), len(header), bad_rows)
    if not ended:
        raise ValueError(f"{file}, at its end: a quotation mark is never closed; mend the row where it stands.")


def _numbers(first: int, count: int, left_out: list[int]) -> tuple[Int[np.ndarray, " n"], int]:
    """Return the numbers of the next `count` rows, without those left out, and the number after them."""
    numbers = np.arange(first, first + count + len(left_out))
    numbers = np.setdiff1d(numbers, left_out, assume_unique=True)[:count]
    return numbers, int(numbers[-1]) + 1 if count else first


def _refuse_ragged(
    file: epath.Path, ragged: collections.deque[tuple[int, int]], before: int, width: int, bad_rows: BadRows
) -> None:
    """Refuse the rows before a number that have more or fewer values than the header, and forget them."""
    while ragged and ragged[0][0] < before:
        row, count = ragged.popleft()
        bad_rows(f"{file}, row {row}: {count} values where the header names {width} columns")


def open_parquet(file: epath.Path) -> pyarrow.parquet.ParquetFile:
    """Return a Parquet file, of which no row is read.

    Raises:
      ValueError: no regular file, or not Parquet.
    """
    check_regular(file)
    try:
        # In ns, which is the default, years before 1678 and after 2261 of an INT96 would wrap around.
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False, coerce_int96_timestamp_unit="us")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no Parquet file that can be read: {' '.join(str(error).split())[:160]}.") from None


def _parquet_pieces(file: epath.Path, wanted: Sequence[str], numbers: Collection[str], bad_rows: BadRows) -> Iterator[Piece]:
    table = open_parquet(file)
    here = [name for name in wanted if name in table.schema_arrow.names]
    meta = table.metadata
    size = max((meta.row_group(i).total_byte_size // max(meta.row_group(i).num_rows, 1) for i in range(meta.num_row_groups)), default=0)  # fmt: skip
    number = 1
    try:
        for batch in table.iter_batches(min(max(CHUNK_BYTES // max(size, 1), 1), ROWS), columns=here, use_threads=False):
            columns = {name: batch.column(batch.schema.names.index(name)) for name in here}
            yield Piece(file, np.arange(number, number + len(batch)), columns)
            number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}, after row {number - 1}: {' '.join(str(error).split())[:160]}; get the file whole.") from None


def _json_names(file: epath.Path, needed: Sequence[str]) -> list[str]:
    """Return the keys of the first lines, and needed ones that come later; none if the first line is no object, which reading then says."""
    keys: dict[str, None] = {}
    for first, lines in line_chunks(file, KEYS_SEEN):
        lacking = [name.encode(errors="replace") for name in needed if name not in keys]
        for line in lines:
            if first > 1 and b"\\" not in line and not any(name in line for name in lacking):
                continue  # It has none of them, and no key that is spelled by an escape.
            try:
                keys |= dict.fromkeys(json_object(line))
            except ValueError:
                if not keys:
                    return []
        if keys.keys() >= set(needed):
            break
    return list(keys)


def _json_pieces(file: epath.Path, wanted: Sequence[str], numbers: Collection[str], bad_rows: BadRows) -> Iterator[Piece]:
    for first, lines in line_chunks(file, ROWS):
        filled = [number for number, line in enumerate(lines, first) if not line.isspace()]
        if columns := _alike([lines[number - first] for number in filled], wanted, numbers):
            yield Piece(file, np.array(filled), columns)
            continue
        objects, rows = [], []
        for number in filled:
            try:
                objects.append(json_object(lines[number - first]))
                rows.append(number)
            except ValueError as error:
                bad_rows(f"{file}, row {number}: {error}")
        yield Piece(file, np.array(rows, np.int64), {name: [row.get(name) for row in objects] for name in wanted})


def _alike(lines: list[bytes], wanted: Sequence[str], numbers: Collection[str]) -> dict[str, Column] | None:
    """Return the columns of lines whose values are of the types of the first one; None for other lines."""
    try:
        first = json_object(lines[0])
        return alike(lines, {name: pa.float64() if name in numbers else ALIKE[type(first.get(name))] for name in wanted})
    except (IndexError, KeyError, ValueError):
        return None


CSV = Format(lambda file, needed: _csv_header(file, needed)[1], _csv_pieces)
PARQUET = Format(lambda file, needed: open_parquet(file).schema_arrow.names, _parquet_pieces)
JSON = Format(_json_names, _json_pieces)
FORMATS = {".parquet": PARQUET, ".csv": CSV, ".tsv": CSV, ".jsonl": JSON, ".ndjson": JSON, ".json": JSON}


def format_of(file: epath.Path) -> Format | None:
    """Return what kind of file a name speaks of, whether it is packed or not."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None
