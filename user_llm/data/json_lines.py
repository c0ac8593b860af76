"""Files of JSON lines: one by one, which names a bad line, or as columns where many are alike, in a fraction of the time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json
from etils import epath

from user_llm.data.opening import line_chunks
from user_llm.data.raw import ROWS, BadRows, pieces
from user_llm.data.values import json_object


def alike(lines: Sequence[bytes], kinds: Mapping[str, pa.DataType]) -> dict[str, pa.Array] | None:
    """Return columns of lines of one object each, whose values are null or of these types, or None if a line is another.

    What is read here, Python's reader reads in the same way.
    """
    data = b"".join(lines)
    objects = 1 + data.count(b"}\n{") + data.count(b"}\r\n{")  # a string holds no line feed
    if objects != len(lines) or not data.startswith(b"{"):
        return None
    try:
        data.decode()
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            pyarrow.json.ParseOptions(explicit_schema=pa.schema(kinds), unexpected_field_behavior="ignore"),
        )
    except (ValueError, pa.ArrowException):
        return None
    return {name: table[name].combine_chunks() for name in kinds} if len(table) == len(lines) else None


def json_pieces(
    path: epath.Path,
    parse: Callable[[dict[str, Any]], Sequence[Sequence[Any]]],
    schema: pa.Schema,
    bad_rows: BadRows,
    at_once: Callable[[list[bytes]], pa.RecordBatch | None] = lambda lines: None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows that `parse` makes of each line of a file, packed or not, that holds one JSON object (or Python literal) each.

    Blank lines are left out. A line is bad that holds no object, or that `parse` refuses (KeyError, TypeError, ValueError).

    Args:
      at_once: makes the same of many lines in a fraction of the time, or returns None for lines that it does not know.

    Raises:
      ValueError: a bad line that is not left out, named by file and line, or a file that is cut off.
    """
    for first, lines in line_chunks(path, ROWS):
        if (batch := at_once(lines)) is not None:
            yield batch
            continue
        rows: list[Sequence[Any]] = []
        for number, line in enumerate(lines, first):
            if len(line) < 3 and not line.strip():
                continue
            try:
                found = parse(json_object(line))
                if not line.isascii() or b"\\u" in line:
                    for row in found:
                        _check_text(row)
                rows += found
            except (KeyError, TypeError, ValueError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
                bad_rows(f"{path}, line {number}: {what}")
        yield from pieces(rows, schema)


def _check_text(row: Sequence[Any]) -> None:
    """Refuse half of a surrogate pair, which is no character."""
    for value in row:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"half a surrogate pair, \\u{ord(text[error.start]):x}, which is no character") from None
