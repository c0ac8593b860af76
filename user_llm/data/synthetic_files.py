"""Synthetic worlds as files, in the layouts of the datasets whose readers then read them.

| layout | items | files | of an event |
|---|---|---|---|
| movielens | films | ratings.csv, movies.csv, as in ml-latest | rating |
| amazon | products | Synthetic_5.json.gz, meta_Synthetic.json.gz, as in 2018 | rating, review summary and text |
| google_local | places | review-Synthetic_10.json.gz, meta-Synthetic.json.gz, as in 2021 | rating, review text, or none |
| events | films | events.csv, a row per event | rating |

One seed makes the same users, choices, ratings and times in every layout; only names and words differ.
"""

import csv
import dataclasses
import gzip
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from etils import epath

from user_llm.data.synthetic import Histories, World, sample_histories
from user_llm.data.synthetic_reviews import write_reviews
from user_llm.data.synthetic_words import FILMS, PLACES, PRODUCTS, Domain

NAME = "Synthetic"  # the category of Amazon Review, the state of Google Local
COLUMNS: dict[str, Any] = {  # of the layout events, as `event_files` is told
    "user": "user_id", "item": "item_id", "time": "timestamp", "title": "title", "categories": ("genre",), "numbers": ("rating",),
}  # fmt: skip
SILENT = 0.2  # share of the visits to places that are rated without a word


@dataclasses.dataclass(frozen=True)
class Layout:
    """What items are called, and how a world is written into a folder (by its seed)."""

    domain: Domain
    write: Callable[[epath.Path, World, Histories, int], None]


def write(directory: epath.PathLike, *, layout: str, num_users: int, num_items: int, events_per_user: int, seed: int) -> World:
    """Sample users and write what they do; history lengths vary from half to 1.5 times the mean.

    Raises:
      ValueError: no such layout, more events a user than a third of the items, or more items than there are titles.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown data.synthetic.layout {layout!r}: choose one of {', '.join(LAYOUTS)}.")
    world = World.create(num_items, seed, domain=LAYOUTS[layout].domain)
    histories = sample_histories(world, num_users, events_per_user, seed)
    directory = epath.Path(directory)
    directory.mkdir(parents=True)
    LAYOUTS[layout].write(directory, world, histories, seed)
    return world


def _movielens(folder: epath.Path, world: World, histories: Histories, seed: int) -> None:
    with (folder / "movies.csv").open("w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["movieId", "title", "genres"])
        rows.writerows([i, item.title, "|".join(item.groups)] for i, item in enumerate(world.items, 1))
    with (folder / "ratings.csv").open("w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["userId", "movieId", "rating", "timestamp"])
        for user, _, item, stars, time in histories.events():
            rows.writerow([user + 1, item + 1, f"{stars}.0", time])


def _events(folder: epath.Path, world: World, histories: Histories, seed: int) -> None:
    with (folder / "events.csv").open("w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["user_id", "item_id", "timestamp", "title", "genre", "rating"])
        for user, _, item, stars, time in histories.events():
            rows.writerow([user + 1, item + 1, time, world.items[item].title, world.items[item].groups[0], stars])


def _amazon(folder: epath.Path, world: World, histories: Histories, seed: int) -> None:
    reviews = write_reviews(world, PRODUCTS, histories, seed)
    _json_lines(
        folder / f"{NAME}_5.json.gz",
        (
            {
                "overall": float(stars), "reviewerID": f"A{user + 1:09d}", "asin": _asin(item),
                "reviewText": reviews[user][t].text, "summary": reviews[user][t].summary, "unixReviewTime": time,
            }
            for user, t, item, stars, time in histories.events()
        ),
    )  # fmt: skip
    products = (
        {"asin": _asin(i), "title": item.title, "category": [NAME, *item.groups, item.noun]}
        for i, item in enumerate(world.items)
    )
    _json_lines(folder / f"meta_{NAME}.json.gz", products)


def _asin(item: int) -> str:
    return f"B{item + 1:09d}"


def _google_local(folder: epath.Path, world: World, histories: Histories, seed: int) -> None:
    reviews = write_reviews(world, PLACES, histories, seed)
    silent = np.random.default_rng((seed, 4)).random(histories.items.shape) < SILENT
    _json_lines(
        folder / f"review-{NAME}_10.json.gz",
        (
            {
                "user_id": f"1{user + 1:020d}", "time": 1000 * time, "rating": stars,
                "text": None if silent[user, t] else reviews[user][t].text, "gmap_id": _gmap_id(item),
            }
            for user, t, item, stars, time in histories.events()
        ),
    )  # fmt: skip
    places = (
        {"name": item.title, "gmap_id": _gmap_id(i), "category": [item.noun, *item.groups]}
        for i, item in enumerate(world.items)
    )
    _json_lines(folder / f"meta-{NAME}.json.gz", places)


def _gmap_id(item: int) -> str:
    return f"0x0:{item + 1:#x}"


def _json_lines(path: epath.Path, rows: Iterable[dict]) -> None:
    """Write one object a line; the same rows make the same bytes at any time and place."""
    with path.open("wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as lines:
        for row in rows:
            lines.write(json.dumps(row).encode() + b"\n")


LAYOUTS = {
    "movielens": Layout(FILMS, _movielens),
    "amazon": Layout(PRODUCTS, _amazon),
    "google_local": Layout(PLACES, _google_local),
    "events": Layout(FILMS, _events),
}
