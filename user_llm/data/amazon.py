"""Amazon Review in the layouts of 2014, 2018 and 2023 (He and McAuley 2016; Ni, Li and McAuley 2019; Hou et al. 2024).

| year | reviews | products | ids, rating, time, summary, text |
|---|---|---|---|
| 2014 | reviews_<Category>_5.json.gz | meta_<Category>.json.gz | reviewerID, asin, overall, unixReviewTime, summary, reviewText |
| 2018 | <Category>_5.json.gz | meta_<Category>.json.gz | the same |
| 2023 | <Category>.jsonl.gz | meta_<Category>.jsonl.gz | user_id, parent_asin, rating, timestamp (ms), title, text |

Lines are JSON, or in 2014 Python literals. Files need not be gzipped, nor be 5-cores. A product without metadata keeps its id as its
title, and the audit counts it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from user_llm.data.raw import BadRows, Raw, clean, json_pieces
from user_llm.data.times import FRACTION
from user_llm.data.values import identifier, names_of, text_of, whole

REVIEWS = ("reviews_{}_5.json", "reviews_{}.json", "{}_5.json", "{}.json", "{}.jsonl")
PRODUCTS = ("meta_{}.json", "meta_{}.jsonl")
LEVELS = 6  # of a category path; the files of 2018 have lists of features where they go on
LONGEST = 60  # characters of a category's name; longer ones are pieces of descriptions
# Some products of 2018 have a piece of their page's script for a title.
SCRIPT = "var aPageStart"
FURTHEST = 10**11  # seconds from 1970 (the year 5138)


def find(directory: epath.PathLike, category: str, *, bad_rows: str = "refuse") -> Raw:
    """Return one category of Amazon Review.

    Args:
      bad_rows: `refuse`, or `skip` to leave lines out that cannot be read.

    Raises:
      ValueError: no reviews of it in `directory`, or in several layouts. A bad line is refused when it is read.
    """
    folder = epath.Path(directory)
    reviews = existing(folder, REVIEWS, category)
    if len(reviews) != 1:
        names = ", ".join(pattern.format(category) for pattern in REVIEWS)
        found = f"holds {' and '.join(path.name for path in reviews)}" if reviews else f"has none of {names}, gzipped or not"
        raise ValueError(
            f"{folder} {found}: name the folder and the category of one set of reviews (--config.data.category=...)."
        )
    products = existing(folder, PRODUCTS, category)[:1]
    return of_lines(
        f"amazon-{category}", (reviews, _review), (products, _product), texts=("summary", "review"), bad_rows=bad_rows
    )


Lines = tuple[Sequence[epath.Path], Callable[[dict[str, Any]], tuple]]


def of_lines(name: str, events: Lines, items: Lines, *, texts: tuple[str, ...], bad_rows: str) -> Raw:
    """Return a dataset of reviews out of files of JSON lines.

    Args:
      events, items: files, and what makes a row of the events or items of `Raw` out of a line's object.
    """
    raw = Raw(
        name=name, files=(*events[0], *items[0]), events=lambda: read(events, raw.event_schema),
        items=lambda: read(items, raw.item_schema), ordinals={"rating": 5}, texts=texts, bags=("categories",),
        bad_rows=BadRows.of(bad_rows), settings=bad_rows,
    )  # fmt: skip

    def read(lines: Lines, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for path in lines[0]:
            yield from json_pieces(path, lines[1], schema, raw.bad_rows)

    return raw


def existing(folder: epath.Path, patterns: tuple[str, ...], name: str) -> list[epath.Path]:
    """Return the files that there are of `patterns`, gzipped or not."""
    files = [folder / (pattern.format(name) + end) for pattern in patterns for end in (".gz", "")]
    return [file for file in files if file.exists()]


def _review(line: dict[str, Any]) -> tuple:
    if "user_id" in line:  # 2023
        time = milliseconds(line["timestamp"], "timestamp")
        names = ("user_id", "parent_asin", "rating", "title", "text")
    else:
        time = whole(line["unixReviewTime"], "unixReviewTime", -FURTHEST, FURTHEST), 0
        names = ("reviewerID", "asin", "overall", "summary", "reviewText")
    user, item, rating, summary, text = names
    ids = (identifier(line[name], name) for name in (user, item))
    words = (clean(text_of(line.get(name))) for name in (summary, text))
    return *ids, *time, whole(line[rating], rating, 1, 5), *words


def milliseconds(value: Any, name: str) -> tuple[int, int]:
    """Return milliseconds since 1970 as whole seconds and a fraction in 10^-18.

    Raises:
      ValueError: no whole number, or one beyond FURTHEST seconds.
    """
    seconds, rest = divmod(whole(value, name, -1000 * FURTHEST, 1000 * FURTHEST), 1000)
    return seconds, rest * (FRACTION // 1000)


def _product(line: dict[str, Any]) -> tuple[str, str, list[str]]:
    title = clean(text_of(line.get("title")))
    path = line.get("categories") or line.get("category")
    if isinstance(path, list) and path and isinstance(path[0], list):  # 2014: several paths, of which the first is the main one
        path = path[0]
    names = [name for name in dict.fromkeys(map(clean, names_of(path)[:LEVELS])) if name and len(name) <= LONGEST]
    return identifier(line.get("parent_asin") or line["asin"], "asin"), "" if SCRIPT in title else title, names
