"""Reviews as DEP has them: in each line a user, a profile of past reviews, and the review to be written after them.

DEP is difference-aware embedding-based personalization (Qiu et al., EMNLP 2025; code: github.com/SnowCharmQ/DEP). Its data are parts of
Amazon Review 2023: `SnowCharmQ/DPL-main` on the Hugging Face hub, one subset for each of Books, Movies_and_TV and CDs_and_Vinyl, and
the products in `SnowCharmQ/DPL-meta`. Each split of a subset is read as the JSON lines that `Dataset.to_json` writes:

    <Category>_train.jsonl, <Category>_val.jsonl, <Category>_test.jsonl    (any of them, gzipped or not)
        {"user_id": ..., "profile": [<review>, ...], "data": <review>}
        a review: {"asin": ..., "rating": 1 to 5, "title": its summary, "text": ..., "timestamp": in milliseconds}
    <Category>_meta.jsonl
        {"asin": ..., "title": ..., "description": ...}

A user's events are the reviews of all their lines; a review that stands in several lines counts once. A review to be written in the test split is
its user's last one, so that the split `leave_last_out` tests on it. Descriptions are left out.
"""

from typing import Any

from etils import epath

from user_llm.data.raw import Raw, clean
from user_llm.data.reviews import Layout, existing, of_lines
from user_llm.data.values import identifier, text_of

REVIEWS = ("{}_train.jsonl", "{}_val.jsonl", "{}_test.jsonl")
PRODUCTS = ("{}_meta.jsonl",)
USER = "user_id"
LAYOUTS = (Layout(USER, "asin", "rating", "timestamp", ("title", "text"), per_second=1000),)


def find(directory: epath.PathLike, category: str, *, bad_rows: str = "refuse") -> Raw:
    """Return one category of DEP's data; its folder must hold reviews.

    Args:
      bad_rows: `refuse`, or `skip` to leave lines out that cannot be read.

    Raises:
      ValueError: a bad line, when it is read.
    """
    folder = epath.Path(directory)
    reviews, products = existing(folder, REVIEWS, category), existing(folder, PRODUCTS, category)[:1]
    texts = ("summary", "review")
    return of_lines(f"dep-{category}", (reviews, LAYOUTS), (products, _product), texts=texts, bad_rows=bad_rows, held=_reviews)


def _reviews(line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the reviews of a line, each with its user.

    Raises:
      KeyError, ValueError: no reviews, or what is none.
    """
    profile, written = line["profile"], line["data"]
    if not isinstance(profile, list) or not all(isinstance(review, dict) for review in [*profile, written]):
        raise ValueError("a profile that is no list of reviews, or data that are no review")
    return [{**review, USER: line[USER]} for review in [*profile, written]]


def _product(line: dict[str, Any]) -> tuple[str, str, list[str]]:
    return identifier(line["asin"], "asin"), clean(text_of(line.get("title"))), []
