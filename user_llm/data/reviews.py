"""Reviews in JSON lines, as Amazon's and Google's files hold them: a user, an item, one to five stars, a time, and texts."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from user_llm.data import columns
from user_llm.data.fields import Fields, Number, Text
from user_llm.data.json_lines import alike, json_pieces
from user_llm.data.opening import line_chunks
from user_llm.data.raw import BadRows, Raw, clean, cleaned
from user_llm.data.times import FRACTION, UNITS
from user_llm.data.values import identifier, json_object, text_of, whole

STARS = 5
FIRST_LINES = 100  # of which one tells a file's layout
FURTHEST = 10**11  # seconds from 1970 (the year 5138)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The keys of a review's object.

    Attributes:
      per_second: the units of `time` in a second.
    """

    user: str
    item: str
    rating: str
    time: str
    texts: tuple[str, ...]
    per_second: int


def of_lines(
    name: str,
    events: tuple[Sequence[epath.Path], Sequence[Layout]],
    items: tuple[Sequence[epath.Path], Callable[[dict[str, Any]], tuple]],
    *,
    texts: tuple[str, ...],
    bad_rows: str,
    held: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
) -> Raw:
    """Return a dataset of reviews out of files of JSON lines.

    Args:
      events: files, and the layouts that a line may have; a line is of the first whose user it names, and else of the last.
      items: files, and what makes a row of the items of `Raw` out of a line's object.
      texts: what `Raw` calls the texts of a layout.
      held: returns the reviews that a line's object holds; for None the object is itself the one review.
    """
    of_line = held or (lambda line: [line])
    raw = Raw(
        name=name, files=(*events[0], *items[0]), events=lambda: reviews(), items=lambda: products(), ordinals={"rating": STARS},
        fields=_fields(_first_layout(*events, of_line), texts), texts=texts, bags=("categories",), bad_rows=BadRows.of(bad_rows), settings=bad_rows,
    )  # fmt: skip
    layouts = events[1]

    def reviews() -> Iterator[pa.RecordBatch]:
        rows = lambda line: [_row(review, layouts) for review in of_line(line)]  # noqa: E731
        at_once = lambda lines: None if held else _columns(lines, layouts, raw.event_schema)  # noqa: E731
        for path in events[0]:
            yield from json_pieces(path, rows, raw.event_schema, raw.bad_rows, at_once)

    def products() -> Iterator[pa.RecordBatch]:
        for path in items[0]:
            yield from json_pieces(path, lambda line: [items[1](line)], raw.item_schema, raw.bad_rows)

    return raw


def existing(folder: epath.Path, patterns: tuple[str, ...], name: str) -> list[epath.Path]:
    """Return the files that there are of `patterns`, gzipped or not."""
    files = [folder / (pattern.format(name) + end) for pattern in patterns for end in (".gz", "")]
    return [file for file in files if file.exists()]


def _layout(line: dict[str, Any], layouts: Sequence[Layout]) -> Layout:
    for layout in layouts:
        if layout.user in line:
            return layout
    return layouts[-1]


def _first_layout(
    files: Sequence[epath.Path], layouts: Sequence[Layout], of_line: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> Layout:
    """Return the layout of the first line that can be read, among the first of the first file; else the last layout."""
    with contextlib.suppress(ValueError):  # of what is no file of lines, which reading says
        for line in next((lines for file in files[:1] for _, lines in line_chunks(file, FIRST_LINES)), []):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                for review in of_line(json_object(line)):
                    _row(review, layouts)
                    return _layout(review, layouts)
    return layouts[-1]


def _fields(layout: Layout, texts: tuple[str, ...]) -> Fields:
    unit = next(name for name, per_second in UNITS.items() if per_second == layout.per_second)
    return Fields(
        layout.user,
        layout.item,
        layout.time,
        unit=unit,
        numbers={"rating": Number.of_scale(layout.rating, range(1, STARS + 1))},
        texts={name: Text(column, html=True) for name, column in zip(texts, layout.texts, strict=True)},
    )


def _row(line: dict[str, Any], layouts: Sequence[Layout]) -> tuple:
    """Return a line's row of the events of `Raw`.

    Raises:
      KeyError, ValueError: no value, or one that is not what it must be.
    """
    layout = _layout(line, layouts)
    furthest = layout.per_second * FURTHEST
    seconds, rest = divmod(whole(line[layout.time], layout.time, -furthest, furthest), layout.per_second)
    user, item = identifier(line[layout.user], layout.user), identifier(line[layout.item], layout.item)
    stars = whole(line[layout.rating], layout.rating, 1, STARS)
    texts = [clean(text_of(line.get(name))) for name in layout.texts]
    return user, item, seconds, rest * (FRACTION // layout.per_second), stars, *texts


def _columns(lines: list[bytes], layouts: Sequence[Layout], schema: pa.Schema) -> pa.RecordBatch | None:
    """Return what `_row` makes of lines, or None unless all of them are of the first one's layout and spell their values alike."""
    try:
        layout = _layout(json_object(lines[0]), layouts)
    except ValueError:
        return None
    kinds = dict.fromkeys((layout.user, layout.item, *layout.texts), pa.string())
    found = alike(lines, kinds | {layout.rating: pa.float64(), layout.time: pa.int64()})
    if found is None or any(columns.missing(found[name]).any() for name in (layout.user, layout.item)):
        return None
    if found[layout.rating].null_count or found[layout.time].null_count:
        return None
    stars, time = found[layout.rating].to_numpy(), found[layout.time].to_numpy()
    furthest = layout.per_second * FURTHEST
    if not np.isin(stars, np.arange(1, STARS + 1)).all() or time.min() < -furthest or time.max() > furthest:
        return None
    seconds, rest = np.divmod(time, layout.per_second)
    numbers = (seconds, rest * (FRACTION // layout.per_second), stars.astype(np.int32))
    texts = (cleaned(found[name]) for name in layout.texts)
    return pa.RecordBatch.from_arrays([found[layout.user], found[layout.item], *map(pa.array, numbers), *texts], schema=schema)
