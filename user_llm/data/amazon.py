"""Amazon Review in the layouts of 2014, 2018 and 2023 (He and McAuley 2016; Ni, Li and McAuley 2019; Hou et al. 2024).

| year | reviews | products | ids, rating, time, summary, text |
|---|---|---|---|
| 2014 | reviews_<Category>_5.json.gz | meta_<Category>.json.gz | reviewerID, asin, overall, unixReviewTime, summary, reviewText |
| 2018 | <Category>_5.json.gz | meta_<Category>.json.gz | the same |
| 2023 | <Category>.jsonl.gz | meta_<Category>.jsonl.gz | user_id, parent_asin, rating, timestamp (ms), title, text |

Lines are JSON, or in 2014 Python literals. Files need not be gzipped, nor be 5-cores. A product without metadata keeps its id as its
title, and the audit counts it. A folder that holds a category as DEP has it is read by `dep.py`.
"""

from typing import Any

from etils import epath

from user_llm.data import dep
from user_llm.data.raw import Raw, clean
from user_llm.data.reviews import Layout, existing, of_lines
from user_llm.data.values import identifier, names_of, text_of

REVIEWS = ("reviews_{}_5.json", "reviews_{}.json", "{}_5.json", "{}.json", "{}.jsonl")
PRODUCTS = ("meta_{}.json", "meta_{}.jsonl")
LEVELS = 6  # of a category path; the files of 2018 have lists of features where they go on
LONGEST = 60  # characters of a category's name; longer ones are pieces of descriptions
# Some products of 2018 have a piece of their page's script for a title.
SCRIPT = "var aPageStart"
LAYOUTS = (  # of 2023, and before
    Layout("user_id", "parent_asin", "rating", "timestamp", ("title", "text"), per_second=1000),
    Layout("reviewerID", "asin", "overall", "unixReviewTime", ("summary", "reviewText"), per_second=1),
)


def find(directory: epath.PathLike, category: str, *, bad_rows: str = "refuse") -> Raw:
    """Return one category of Amazon Review.

    Args:
      bad_rows: `refuse`, or `skip` to leave lines out that cannot be read.

    Raises:
      ValueError: no reviews of it in `directory`, or in several layouts. A bad line is refused when it is read.
    """
    folder = epath.Path(directory)
    reviews, profiles = existing(folder, REVIEWS, category), existing(folder, dep.REVIEWS, category)
    if profiles and not reviews:
        return dep.find(folder, category, bad_rows=bad_rows)
    if len(reviews) != 1 or profiles:
        names = ", ".join(pattern.format(category) for pattern in (*REVIEWS, *dep.REVIEWS))
        both = [*reviews, *profiles]
        found = f"holds {' and '.join(path.name for path in both)}" if both else f"has none of {names}, gzipped or not"
        raise ValueError(
            f"{folder} {found}: name the folder and the category of one set of reviews (--config.data.category=...)."
        )
    products = existing(folder, PRODUCTS, category)[:1]
    texts = ("summary", "review")
    return of_lines(f"amazon-{category}", (reviews, LAYOUTS), (products, _product), texts=texts, bad_rows=bad_rows)


def _product(line: dict[str, Any]) -> tuple[str, str, list[str]]:
    title = clean(text_of(line.get("title")))
    path = line.get("categories") or line.get("category")
    if isinstance(path, list) and path and isinstance(path[0], list):  # 2014: several paths, of which the first is the main one
        path = path[0]
    names = [name for name in dict.fromkeys(map(clean, names_of(path)[:LEVELS])) if name and len(name) <= LONGEST]
    return identifier(line.get("parent_asin") or line["asin"], "asin"), "" if SCRIPT in title else title, names
