"""What every dataset hands over: its events and items as published, in pieces, so that no file needs to fit into memory.

`prepare.py` numbers, sorts and stores them; the readers (`movielens_raw.py`, `amazon.py`, `google_local.py`, `event_files.py`) know
the publishers' layouts and nothing else.
"""

import ast
import dataclasses
import gzip
import html
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from user_llm.common.workdir import path_part

ROWS = 50_000  # of one piece
TAGS = re.compile(r"<(script|style)\b.*?</\1>|<[^<>]*>", re.DOTALL | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Raw:
    """A dataset as published.

    Attributes:
      name: for result rows.
      files: all that is read; their content tells one prepared dataset from another.
      events: yields pieces with the columns `user` and `item` (the publisher's ids, strings), `time` (seconds since 1970, or with
        `timed` False any number that orders a user's events), and those of `ordinals` and `texts`, in the publisher's order.
      items: yields pieces with `item`, `title` and the columns of `bags` (lists of strings); the first row of an item counts.
      ordinals: event-side columns of numbers from 1 to the given highest, such as {"rating": 5}.
      texts: event-side columns of text.
      bags: item-side columns of names.
      timed: whether `time` is a time.

    Raises:
      ValueError: a name that is no part of a path, where prepared data and results are kept.
    """

    name: str
    files: tuple[epath.Path, ...]
    events: Callable[[], Iterator[pa.RecordBatch]]
    items: Callable[[], Iterator[pa.RecordBatch]]
    ordinals: Mapping[str, int]
    texts: tuple[str, ...] = ()
    bags: tuple[str, ...] = ()
    timed: bool = True

    def __post_init__(self) -> None:
        path_part(self.name, "The dataset's name")

    @property
    def event_schema(self) -> pa.Schema:
        """The columns of `events`."""
        return pa.schema(
            {"user": pa.string(), "item": pa.string(), "time": pa.int64()}
            | dict.fromkeys(self.ordinals, pa.int32())
            | dict.fromkeys(self.texts, pa.string())
        )

    @property
    def item_schema(self) -> pa.Schema:
        """The columns of `items`."""
        return pa.schema({"item": pa.string(), "title": pa.string()} | dict.fromkeys(self.bags, pa.list_(pa.string())))


def pieces(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Gather rows to pieces."""
    columns: list[list[Any]] = [[] for _ in schema]
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        if len(columns[0]) == ROWS:
            yield pa.record_batch(columns, schema=schema)
            columns = [[] for _ in schema]
    if columns[0]:
        yield pa.record_batch(columns, schema=schema)


def json_lines(path: epath.Path, parse: Callable[[dict[str, Any]], Any]) -> Iterator[Any]:
    """Yield what `parse` makes of each line of a file, gzipped or not, that holds one JSON object (or Python literal) each.

    Raises:
      ValueError: a line that is no object, or that `parse` refuses (KeyError, TypeError, ValueError), or a file that is cut off;
        named by file and line.
    """
    number = 0
    try:
        with path.open("rb") as file, gzip.open(file) if path.suffix == ".gz" else file as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield parse(_object(line))
                except (KeyError, TypeError, ValueError, SyntaxError) as error:
                    what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
                    raise ValueError(f"{path}, line {number}: {what}; mend or delete the line.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {number}: {error}; the file may be cut off: get it whole.") from None


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        # Amazon's files of 2014 are Python literals, which look like JSON but for their quotes.
        try:
            found = ast.literal_eval(line.decode().strip())
        except (SyntaxError, ValueError):
            raise ValueError(f"{line[:60]!r} is no JSON object") from None
    if not isinstance(found, dict):
        raise ValueError(f"{line[:60]!r} is no JSON object")
    return found


def clean(text: str | None) -> str:
    """Return text without HTML: entities turned into what they stand for, tags and scripts dropped, spaces single."""
    if not text:
        return ""
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = TAGS.sub(" ", text)
    return " ".join(text.split())


def whole(value: Any, name: str, lowest: int, highest: int) -> int:
    """Return a number that must be whole and within bounds.

    Raises:
      ValueError: it is not.
    """
    number = float(value)
    if not (lowest <= number <= highest and number == int(number)):
        raise ValueError(f"{name} {value!r} is no whole number from {lowest} to {highest}")
    return int(number)


def identifier(value: Any, name: str) -> str:
    """Return an id as text.

    Raises:
      ValueError: there is none.
    """
    if value in (None, ""):
        raise ValueError(f"no {name}")
    return str(value)
