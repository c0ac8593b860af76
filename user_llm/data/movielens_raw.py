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

from user_llm.data.fields import Fields, Number
from user_llm.data.opening import line_chunks
from user_llm.data.raw import ROWS, BadRows, Raw, pieces
from user_llm.data.values import EXACT, shown

NO_GENRES = "(no genres listed)"
RATINGS_HEADER = ["userId", "movieId", "rating", "timestamp"]
MOVIES_HEADER = ["movieId", "title", "genres"]
# The names of ratings.csv, for events in every layout; ratings are half stars.
FIELDS = Fields(
    "userId", "movieId", "timestamp", numbers={"rating": Number.of_scale("rating", (half / 2 for half in range(1, 11)))}
)
RATINGS_FILES = {"ratings.csv": ",", "ratings.dat": "::", "u.data": "\t"}
MOVIES_FILES = {",": ("movies.csv",), "::": ("movies.dat",), "\t": ("u.item", "u.genre")}
ALL_FILES = frozenset([*RATINGS_FILES, *(name for names in MOVIES_FILES.values() for name in names)])
ID = re.compile("[0-9]{1,18}")


def find_layout(directory: epath.Path) -> epath.Path:
    """Return the ratings file in `directory`, or else in the one folder of it that holds a release, as GroupLens' zips do.

    Raises:
      ValueError: no layout that we know, or several releases.
    """
    inner = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
    for folders in ([directory], inner):
        found = [folder / name for folder in folders for name in RATINGS_FILES if (folder / name).exists()]
        if len(found) > 1:
            raise ValueError(f"{directory} holds several MovieLens releases ({found[0]}, {found[1]}): name the folder of one.")
        if found:
            return found[0]
    raise ValueError(f"No MovieLens release in {directory}: it needs one of {', '.join(RATINGS_FILES)}.")


def open_release(directory: epath.PathLike, *, name: str, bad_rows: str = "refuse") -> Raw:
    """Return a release in its directory; half stars become the ratings 1 to 10.

    Args:
      bad_rows: `refuse`, or `skip` to leave rows out that cannot be read.

    Raises:
      ValueError: a missing file. A bad row, named by file and line, is refused when it is read.
    """
    ratings = find_layout(epath.Path(directory))
    separator = RATINGS_FILES[ratings.name]
    needed = [ratings.parent / name for name in MOVIES_FILES[separator]]
    for file in needed:
        if not file.exists():
            raise ValueError(f"{file} is missing: titles and genres are read from it.")
    raw = Raw(
        name=name, fields=FIELDS, files=(ratings, *needed), events=lambda: _events(ratings, separator, raw.event_schema, raw.bad_rows),
        items=lambda: _items(needed[0], separator, raw.item_schema, raw.bad_rows), ordinals={"rating": 10}, bags=("genres",),
        bad_rows=BadRows.of(bad_rows), settings=bad_rows,
    )  # fmt: skip
    return raw


def _events(path: epath.Path, separator: str, schema: pa.Schema, bad_rows: BadRows) -> Iterator[pa.RecordBatch]:
    for lines, table in _read_ratings(path, separator, bad_rows):
        rating, timestamp = table[:, 2], table[:, 3]
        ids = _ids(lines, table, separator)
        time = pa.array(timestamp.astype(np.int64))
        stars = pa.array(np.round(rating * 2).astype(np.int32))
        yield pa.RecordBatch.from_arrays([*ids, time, pa.array(np.zeros(len(table), np.int64)), stars], schema=schema)


def _ids(lines: list[bytes], table: Float[np.ndarray, "N 4"], separator: str) -> list[pa.Array]:
    """Return the ids of users and of movies as they are spelled: 007 is another id than 7."""
    plain = re.compile(rb"[1-9][0-9]*%b[1-9][0-9]*%b" % (separator.encode(), separator.encode()))
    if all(map(plain.match, lines)):  # as in all published files; numbers are quicker to turn into texts than lines to split
        return [pc.cast(pa.array(column.astype(np.int64)), pa.string()) for column in table.T[:2]]
    spelled = [line.decode("ascii").split(separator, 2)[:2] for line in lines]
    return [pa.array([one.strip() for one in column], pa.string()) for column in zip(*spelled, strict=True)]


def _items(path: epath.Path, separator: str, schema: pa.Schema, bad_rows: BadRows) -> Iterator[pa.RecordBatch]:
    rows = {",": _csv_movies, "::": _dat_movies, "\t": _tab_movies}[separator](path, bad_rows)
    kept = lambda names: [name for name in names if name and name != NO_GENRES]  # noqa: E731
    return pieces(((movie, readable_title(title), kept(names)) for movie, title, names in rows), schema)


def readable_title(title: str) -> str:
    """Turn "Matrix, The (1999)" into "The Matrix (1999)"; other titles only lose stray spaces."""
    title = " ".join(title.split())
    return re.sub(r"^(.*), (The|A|An|Les?|La|Il|El|Das|Der|Die)( \(.*)?$", r"\2 \1\3", title)


# Lines, and the numbers in them: user, movie, rating, timestamp as float64 (exact for ids and seconds up to 2^53).
Ratings = tuple[list[bytes], Float[np.ndarray, "N 4"]]


def _read_ratings(path: epath.Path, separator: str, bad_rows: BadRows) -> Iterator[Ratings]:
    """Yield pieces of ratings."""
    header, count, blank = separator == ",", 0, 0
    for first, lines in line_chunks(path, ROWS):
        if header and first == 1:
            if lines[0].decode(errors="replace").strip().split(",")[:4] != RATINGS_HEADER:
                raise ValueError(f"{path}, line 1: the header must begin with {','.join(RATINGS_HEADER)}; name the columns so.")
            first, lines = 2, lines[1:]
        if blank and lines:
            bad_rows(f"{path}, line {blank}: 1 columns where user, movie, rating and timestamp are needed")
            blank = 0
        end = len(lines)
        while end and not lines[end - 1].strip():  # blank lines at the file's end do no harm
            end -= 1
        blank = first + end if end < len(lines) else 0
        numbers = range(first, first + end)
        good = lines[:end]
        table = _parsed(good, separator)
        # A number cut short is still a number, so only the missing line end tells.
        whole = not end or lines[end - 1].endswith(b"\n")
        if table is None or not whole:
            good = []
            for number, line in zip(numbers, lines, strict=False):
                if fault := _fault(line, separator):
                    bad_rows(f"{path}, line {number}: {fault}")
                else:
                    good.append(line)
            table = _parsed(good, separator)
        if table is None:
            raise ValueError(f"{path} cannot be read between the lines {first} and {first + end}: download the release again.")
        count += len(table)
        if len(table):
            yield good, table
    if not count:
        raise ValueError(f"{path} holds no ratings: download the release again.")


def _parsed(lines: list[bytes], separator: str) -> Float[np.ndarray, "N 4"] | None:
    """Return a table of lines, None if one of them is bad."""
    if not lines:
        return np.zeros((0, 4))
    try:
        text = b"".join(lines).decode("ascii")
        text = text.replace("::", "\t") if separator == "::" else text
        delimiter = "," if separator == "," else "\t"
        table = np.loadtxt(io.StringIO(text), delimiter=delimiter, ndmin=2, usecols=(0, 1, 2, 3), comments=None)
    except ValueError:
        return None
    # numpy skips blank lines.
    return table if len(table) == len(lines) and _plausible(table).all() else None


def _plausible(table: Float[np.ndarray, "N 4"]) -> np.ndarray:
    user, movie, rating, timestamp = table.T
    half_steps = (rating * 2 == np.round(rating * 2)) & (rating >= 0.5) & (rating <= 5)
    whole = (table[:, [0, 1, 3]] == np.round(table[:, [0, 1, 3]])).all(axis=1) & np.isfinite(table).all(axis=1)
    return whole & (user > 0) & (movie > 0) & half_steps & (timestamp >= 0) & (table < EXACT).all(axis=1)


def _fault(line: bytes, separator: str) -> str:
    """Say what is wrong with a line of ratings; nothing if it is good."""
    try:
        fields = line.decode().rstrip("\r\n").split(separator)
    except UnicodeDecodeError:
        return "not utf-8; use the publisher's file"
    if len(fields) < 4:
        return f"{len(fields)} columns where user, movie, rating and timestamp are needed"
    text = shown(line.decode().rstrip("\r\n"))
    table = _parsed([line], separator)
    if table is None:
        try:
            row = np.array([[float(field) for field in fields[:4]]])
        except ValueError:
            return f"{text} does not hold four numbers"
        if not _plausible(row).all():
            return f"{text} is out of range; ids are positive whole numbers below 2^53, ratings 0.5 to 5, times not negative"
        return f"{text} does not hold four plain numbers"
    return "" if line.endswith(b"\n") else "no line end, so the file may be cut off; get it whole or end the line"


def _lines(path: epath.Path, *, latin: bool) -> Iterator[tuple[int, str]]:
    """Yield the numbers and lines of text that is utf-8, or as a whole latin-1 (ml-1m, ml-100k) where that is allowed."""
    encoding = "utf-8"
    if latin:
        try:
            for _, lines in line_chunks(path, ROWS):
                b"".join(lines).decode()
        except UnicodeDecodeError:
            encoding = "latin-1"
    for first, lines in line_chunks(path, ROWS):
        for number, line in enumerate(lines, first):
            try:
                # Split at line feeds alone: latin-1 bytes may decode to characters at which Python splits as well.
                yield number, line.decode(encoding)
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not utf-8; use the publisher's file.") from None


Movie = tuple[str, str, list[str]]  # id, title, genres


def _movie_rows(
    path: epath.Path, rows: Iterator[tuple[int, list[str]]], parse: Callable[[list[str]], Movie], bad_rows: BadRows
) -> Iterator[Movie]:
    count = 0
    for number, row in rows:
        try:
            if not ID.fullmatch(row[0].strip()):
                raise ValueError
            movie = parse(row)
        except (ValueError, IndexError):
            bad_rows(f"{path}, line {number}: {shown(row)} is no id, title and genres")
            continue
        count += 1
        yield movie
    if not count:
        raise ValueError(f"{path} holds no movies: download the release again.")


def _csv_rows(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(line for _, line in _lines(path, latin=False))
    try:
        header = next(rows, None)
        if header and header[:3] != MOVIES_HEADER:
            raise ValueError(f"{path}, line 1: the header must begin with {','.join(MOVIES_HEADER)}; name the columns so.")
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}; mend or delete the line.") from None


def _csv_movies(path: epath.Path, bad_rows: BadRows) -> Iterator[Movie]:
    return _movie_rows(path, _csv_rows(path), lambda row: (row[0].strip(), row[1], row[2].split("|")), bad_rows)


def _dat_movies(path: epath.Path, bad_rows: BadRows) -> Iterator[Movie]:
    rows = ((number, line.rstrip("\r\n").split("::")) for number, line in _lines(path, latin=True))
    return _movie_rows(path, rows, lambda row: (row[0].strip(), row[1], row[2].split("|")), bad_rows)


def _tab_movies(path: epath.Path, bad_rows: BadRows) -> Iterator[Movie]:
    names = [line.split("|")[0] for _, line in _lines(path.parent / "u.genre", latin=True) if line.strip()]
    rows = ((number, line.rstrip("\r\n").split("|")) for number, line in _lines(path, latin=True))

    def parse(row: list[str]) -> Movie:
        flags = row[5 : 5 + len(names)]
        return (
            row[0].strip(),
            row[1],
            [name for name, flag in zip(names, flags, strict=True) if flag == "1" and name != "unknown"],
        )

    return _movie_rows(path, rows, parse, bad_rows)
