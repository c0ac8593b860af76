"""Reads every published layout of MovieLens (Harper and Konstan 2015) .

| layout | releases | ratings | movies |
|---|---|---|---|
| csv | ml-latest, ml-latest-small, ml-20m, ml-25m, ml-32m | ratings.csv | movies.csv |
| dat | ml-1m, ml-10m | ratings.dat, `::` | movies.dat, `::`, latin-1 or utf-8 |
| tab | ml-100k | u.data | u.item with one column per genre, latin-1 |
"""

import csv
import io
import re
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath
from jaxtyping import Float

from user_llm.data.raw import Raw, pieces

NO_GENRES = "(no genres listed)"
RATINGS_HEADER = ["userId", "movieId", "rating", "timestamp"]
RATINGS_FILES = {"ratings.csv": ",", "ratings.dat": "::", "u.data": "\t"}
MOVIES_FILES = {",": ("movies.csv",), "::": ("movies.dat",), "\t": ("u.item", "u.genre")}


def find_layout(directory: epath.Path) -> epath.Path:
    """Return the ratings file in `directory`, or else in the one folder of it that holds a release, as GroupLens' zips do.

    Raises:
      ValueError: no layout that we know, or several releases.
    """
    inner = sorted(path for path in directory.iterdir() if path.is_dir())
    for folders in ([directory], inner):
        found = [folder / name for folder in folders for name in RATINGS_FILES if (folder / name).exists()]
        if len(found) > 1:
            raise ValueError(f"{directory} holds several MovieLens releases ({found[0]}, {found[1]}): name the folder of one.")
        if found:
            return found[0]
    raise ValueError(f"No MovieLens release in {directory}: it needs one of {', '.join(RATINGS_FILES)}.")


def open_release(directory: epath.PathLike, *, name: str) -> Raw:
    """Return a release in its directory; half stars become the ratings 1 to 10.

    Raises:
      ValueError: a missing file. A bad row, named by file and line, is refused when it is read.
    """
    ratings = find_layout(epath.Path(directory))
    separator = RATINGS_FILES[ratings.name]
    needed = [ratings.parent / name for name in MOVIES_FILES[separator]]
    for file in needed:
        if not file.exists():
            raise ValueError(f"{file} is missing: titles and genres are read from it.")
    return Raw(
        name=name,
        files=(ratings, *needed),
        events=lambda: _events(ratings, separator),
        items=lambda: _items(needed[0], separator),
        ordinals={"rating": 10},
        bags=("genres",),
    )


def _events(path: epath.Path, separator: str) -> Iterator[pa.RecordBatch]:
    user, movie, rating, timestamp = _read_ratings(path, separator).T
    ids = (pc.cast(pa.array(column.astype(np.int64)), pa.string()) for column in (user, movie))
    numbers = (pa.array(timestamp.astype(np.int64)), pa.array(np.round(rating * 2).astype(np.int32)))
    yield pa.RecordBatch.from_arrays([*ids, *numbers], names=["user", "item", "time", "rating"])


def _items(path: epath.Path, separator: str) -> Iterator[pa.RecordBatch]:
    rows = {",": _csv_movies, "::": _dat_movies, "\t": _tab_movies}[separator](path)
    schema = pa.schema({"item": pa.string(), "title": pa.string(), "genres": pa.list_(pa.string())})
    kept = lambda names: [name for name in names if name and name != NO_GENRES]  # noqa: E731
    return pieces(((str(movie), readable_title(title), kept(names)) for movie, title, names in rows), schema)


def readable_title(title: str) -> str:
    """Turn "Matrix, The (1999)" into "The Matrix (1999)"; other titles only lose stray spaces."""
    title = " ".join(title.split())
    return re.sub(r"^(.*), (The|A|An|Les?|La|Il|El|Das|Der|Die)( \(.*)?$", r"\2 \1\3", title)


def _read_ratings(path: epath.Path, separator: str) -> Float[np.ndarray, "N 4"]:
    """Return user, movie, rating, timestamp as float64 (exact for ids and seconds up to 2^53)."""
    text = _utf8(path)
    header = separator == ","
    if header and text and text.partition("\n")[0].split(",")[:4] != RATINGS_HEADER:
        raise ValueError(f"{path}, line 1: the header must begin with {','.join(RATINGS_HEADER)}; name the columns so.")
    # A number cut short is still a number, so only the missing line end tells.
    if text and not text.endswith("\n"):
        raise ValueError(
            f"{path}, line {text.count(chr(10)) + 1}: no line end, so the file may be cut off; get it whole or end the line."
        )
    if separator == "::":
        text = text.replace("::", "\t")
    lines = io.StringIO(text)
    try:
        table = np.loadtxt(
            lines, delimiter="," if header else "\t", skiprows=int(header), ndmin=2, usecols=(0, 1, 2, 3), comments=None
        )
    except ValueError:
        table = None
    # A blank line, which numpy would skip, is a fault as well: row numbers stay line numbers.
    lines_of_text = text.rstrip().count("\n") + 1 - header
    if table is None or not table.size or len(table) != lines_of_text or not _plausible(table).all():
        raise ValueError(_first_fault(path, text.splitlines(), "," if header else "\t", header))
    return table


def _plausible(table: Float[np.ndarray, "N 4"]) -> np.ndarray:
    user, movie, rating, timestamp = table.T
    half_steps = (rating * 2 == np.round(rating * 2)) & (rating >= 0.5) & (rating <= 5)
    whole = (table[:, [0, 1, 3]] == np.round(table[:, [0, 1, 3]])).all(axis=1) & np.isfinite(table).all(axis=1)
    return whole & (user > 0) & (movie > 0) & half_steps & (timestamp >= 0)


def _first_fault(path: epath.Path, lines: list[str], separator: str, header: bool) -> str:
    """Say what is wrong with the first bad line."""
    if len(lines) <= int(header):
        return f"{path} holds no ratings: download the release again."
    for number, line in enumerate(lines[int(header) :], 1 + int(header)):
        fields = line.split(separator)
        if len(fields) < 4:
            return f"{path}, line {number}: {len(fields)} columns where user, movie, rating and timestamp are needed."
        try:
            row = np.array([[float(field) for field in fields[:4]]])
        except ValueError:
            return f"{path}, line {number}: {line[:80]!r} does not hold four numbers; mend or delete the line."
        if not _plausible(row).all():
            return (
                f"{path}, line {number}: {line[:80]!r} is out of range; ids are positive whole numbers, ratings 0.5 to 5, "
                "times not negative."
            )
    return f"{path} cannot be read: download the release again."


def _utf8(path: epath.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not utf-8; use the publisher's file.") from None


def _lines(path: epath.Path) -> list[str]:
    """Read the lines of text that is utf-8 (ml-10m) or latin-1 (ml-1m, ml-100k)."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # Not splitlines(), which also splits at characters that latin-1 bytes may decode to.
    return [line.rstrip("\r\n") for line in io.StringIO(text)]


def _movie_rows(path: epath.Path, rows, parse: Callable[[list[str]], tuple[int, str, list[str]]]):
    count = 0
    for number, row in rows:
        try:
            yield parse(row)
        except (ValueError, IndexError):
            raise ValueError(f"{path}, line {number}: {row!r} is no id, title and genres; mend or delete the line.") from None
        count += 1
    if not count:
        raise ValueError(f"{path} holds no movies: download the release again.")


def _csv_movies(path: epath.Path):
    rows = csv.reader(io.StringIO(_utf8(path)))
    next(rows, None)
    return _movie_rows(path, enumerate(rows, 2), lambda row: (int(row[0]), row[1], row[2].split("|")))


def _dat_movies(path: epath.Path):
    rows = enumerate((line.split("::") for line in _lines(path)), 1)
    return _movie_rows(path, rows, lambda row: (int(row[0]), row[1], row[2].split("|")))


def _tab_movies(path: epath.Path):
    names = [line.split("|")[0] for line in _lines(path.parent / "u.genre") if line]
    rows = enumerate((line.split("|") for line in _lines(path)), 1)

    def parse(row: list[str]) -> tuple[int, str, list[str]]:
        flags = row[5 : 5 + len(names)]
        return int(row[0]), row[1], [name for name, flag in zip(names, flags, strict=True) if flag == "1" and name != "unknown"]

    return _movie_rows(path, rows, parse)
