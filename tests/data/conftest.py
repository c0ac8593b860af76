"""A tiny MovieLens in every published layout, and a small synthetic world."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from user_llm.data import movielens, prepare, synthetic_files
from user_llm.data.numbering import number_events
from user_llm.data.raw import Raw
from user_llm.data.synthetic import World
from user_llm.data.timelines import Timelines

GENRES = ["unknown", "Action", "Comedy", "Drama"]
MOVIES = [
    (2, "Matrix, The (1999)", ["Action", "Drama"]),
    (3, "Misérables, Les (1995)", ["Drama"]),
    (5, "Never Rated (1950)", ["Comedy"]),
    (7, "Emma (1996)", ["Comedy", "Drama"]),
    (11, "Emma (1996)", []),
    (40, "American President, The (1995)", ["Comedy"]),
]
# user, movie, stars, seconds: users 4 and 9, rows in no order, two ties of user 9.
RATINGS = [
    (9, 7, 4, 500),
    (9, 2, 5, 100),
    (4, 2, 1, 1_000_000_003),
    (9, 3, 3, 500),
    (4, 40, 5, 1_000_000_001),
    (9, 11, 2, 500),
    (4, 7, 2, 1_000_000_000),
    (9, 40, 1, 900),
]


def _csv(directory: Path, ratings: list, movies: list) -> None:
    quoted = [f'{i},"{title}",{"|".join(genres) or "(no genres listed)"}' for i, title, genres in movies]
    (directory / "movies.csv").write_text("\n".join(["movieId,title,genres", *quoted, ""]), encoding="utf-8")
    rows = [",".join(map(str, row)) for row in ratings]
    (directory / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows, ""]))


def _dat(directory: Path, ratings: list, movies: list) -> None:
    rows = [f"{i}::{title}::{'|'.join(genres)}\n" for i, title, genres in movies]
    (directory / "movies.dat").write_text("".join(rows), encoding="latin-1")
    (directory / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))


def _tab(directory: Path, ratings: list, movies: list) -> None:
    flags = lambda genres: "|".join(str(int(name in (genres or ["unknown"]))) for name in GENRES)  # noqa: E731
    rows = [f"{i}|{title}|01-Jan-1995||http://example.org|{flags(genres)}\n" for i, title, genres in movies]
    (directory / "u.item").write_text("".join(rows), encoding="latin-1")
    (directory / "u.genre").write_text("".join(f"{name}|{i}\n" for i, name in enumerate(GENRES)) + "\n")
    (directory / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ratings))


LAYOUTS = {"csv": _csv, "dat": _dat, "tab": _tab}


@pytest.fixture(scope="session")
def write_release() -> Callable[..., Path]:
    """Return `write(directory, layout, ratings, movies)`: writes a release and returns its directory."""

    def write(directory: Path, layout: str = "csv", ratings: list = RATINGS, movies: list = MOVIES) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        LAYOUTS[layout](directory, ratings, movies)
        return directory

    return write


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> tuple[World, Timelines]:
    """A world of 240 films with 400 users of 20 to 60 events, written and read again."""
    directory = tmp_path_factory.mktemp("world")
    world = synthetic_files.write(
        directory / "raw", layout="movielens", num_users=400, num_items=240, events_per_user=40, seed=3
    )
    return world, prepare.load(movielens.find(directory / "raw", directory), directory / "prepared")


@dataclasses.dataclass(frozen=True)
class Events:
    """Events as they are numbered.

    Attributes:
      users: item ids of each user, in order of time.
      times: seconds of each user's events; ticks if there are no times.
      levels: of each measured number or rating, of each user's events.
      titles, categories: by item id.
    """

    users: dict[str, list[str]]
    times: dict[str, list[float]]
    levels: dict[str, dict[str, list[int]]]
    titles: dict[str, str]
    categories: dict[str, list[str]]
    facts: dict


def number(raw: Raw) -> Events:
    """Return all events of a dataset as they are numbered, without writing them as records."""
    with tempfile.TemporaryDirectory() as scratch, number_events(raw, Path(scratch)) as table:
        rows = table.database.sql('SELECT * FROM kept ORDER BY "user", time, row').to_arrow_table().to_pylist()
        facts = prepare._facts(table, raw)
    users, times = {}, {}
    levels = {name: {} for own, name in raw.stored.items() if own.startswith("level")}
    for row in rows:
        users.setdefault(row["user"], []).append(row["item"])
        times.setdefault(row["user"], []).append(row["time"] / facts["ticks_per_second"])
        for own, name in raw.stored.items():
            if own.startswith("level"):
                levels[name].setdefault(row["user"], []).append(row[own])
    (bag,) = [*facts["bags"].values()] or [[[]] * len(facts["keys"])]
    (vocab,) = [*facts["vocab"].values()] or [[]]
    categories = {key: [vocab[i - 1] for i in names] for key, names in zip(facts["keys"], bag, strict=True)}
    return Events(users, times, levels, dict(zip(facts["keys"], facts["titles"], strict=True)), categories, facts)


@pytest.fixture(scope="session")
def numbered() -> Callable[[Raw], Events]:
    """Return `numbered(raw)`: what a dataset's events become."""
    return number
