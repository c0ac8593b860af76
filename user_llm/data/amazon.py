"""Amazon Review in the layouts of 2014, 2018 and 2023 (He and McAuley 2016; Ni, Li and McAuley 2019; Hou et al. 2024).

| year | reviews | products | ids, rating, time, summary, text |
|---|---|---|---|
| 2014 | reviews_<Category>_5.json.gz | meta_<Category>.json.gz | reviewerID, asin, overall, unixReviewTime, summary, reviewText |
| 2018 | <Category>_5.json.gz | meta_<Category>.json.gz | the same |
| 2023 | <Category>.jsonl.gz | meta_<Category>.jsonl.gz | user_id, parent_asin, rating, timestamp (ms), title, text |

Lines are JSON, or in 2014 Python literals. Files need not be gzipped, nor be 5-cores. A product without metadata keeps its id as its
title, and the audit counts it.
"""

from typing import Any

from etils import epath

from user_llm.data.raw import Raw, clean, identifier, json_lines, pieces, whole

REVIEWS = ("reviews_{}_5.json", "reviews_{}.json", "{}_5.json", "{}.json", "{}.jsonl")
PRODUCTS = ("meta_{}.json", "meta_{}.jsonl")
LEVELS = 6  # of a category path; the files of 2018 have lists of features where they go on
LONGEST = 60  # characters of a category's name; longer ones are pieces of descriptions
# Some products of 2018 have a piece of their page's script for a title.
SCRIPT = "var aPageStart"


def find(directory: epath.PathLike, category: str) -> Raw:
    """Return one category of Amazon Review.

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
    raw = Raw(
        name=f"amazon-{category}", files=(*reviews, *products), events=lambda: pieces(json_lines(reviews[0], _review), raw.event_schema),
        items=lambda: pieces((row for path in products for row in json_lines(path, _product)), raw.item_schema),
        ordinals={"rating": 5}, texts=("summary", "review"), bags=("categories",),
    )  # fmt: skip
    return raw


def existing(folder: epath.Path, patterns: tuple[str, ...], name: str) -> list[epath.Path]:
    """Return the files that there are of `patterns`, gzipped or not."""
    files = [folder / (pattern.format(name) + end) for pattern in patterns for end in (".gz", "")]
    return [file for file in files if file.exists()]


def _review(line: dict[str, Any]) -> tuple:
    if "user_id" in line:  # 2023
        time = whole(line["timestamp"], "timestamp", 0, 10**14) // 1000
        names = ("user_id", "parent_asin", "rating", "title", "text")
    else:
        time = whole(line["unixReviewTime"], "unixReviewTime", 0, 10**11)
        names = ("reviewerID", "asin", "overall", "summary", "reviewText")
    user, item, rating, summary, text = names
    ids = (identifier(line[name], name) for name in (user, item))
    return *ids, time, whole(line[rating], rating, 1, 5), clean(line.get(summary)), clean(line.get(text))


def _product(line: dict[str, Any]) -> tuple[str, str | None, list[str]]:
    title = clean(line.get("title"))
    path = line.get("categories") or line.get("category") or []
    if path and isinstance(path[0], list):  # 2014: several paths, of which the first is the main one
        path = path[0]
    names = [name for name in dict.fromkeys(map(clean, path[:LEVELS])) if name and len(name) <= LONGEST]
    return identifier(line.get("parent_asin") or line["asin"], "asin"), None if SCRIPT in title else title or None, names
