"""Files that hold something else than their readers expect, in all families: right, or one sentence, in bounded memory and time."""

import dataclasses
import gzip
import json
import os
import resource
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from user_llm.data import amazon, event_files, google_local, movielens, movielens_raw
from user_llm.data.prepare import fingerprint
from user_llm.data.raw import clean

SECONDS, MEMORY = 20, 400  # that a hostile file may take: of a busy machine, and MiB
COLUMNS = event_files.Columns("user", "item", time="time", title="title")
REVIEW = {"reviewerID": "A", "asin": "B", "overall": 5.0, "unixReviewTime": 1, "summary": "s", "reviewText": "t"}
VISIT = {"user_id": "1", "gmap_id": "g", "time": 1001, "rating": 4, "text": "t"}
EVENT = {"user": "1", "item": "a", "time": 1, "title": "é"}


def lines(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@dataclasses.dataclass(frozen=True)
class Family:
    """A dataset of three events: its main file, what else it needs, and how it is read."""

    main: str
    content: bytes
    find: Callable
    others: dict = dataclasses.field(default_factory=dict)
    header: int = 0  # lines of it
    json: bool = False

    def write(self, folder: Path, content: bytes | None = None) -> Path:
        for name, other in self.others.items():
            (folder / name).write_bytes(other)
        if content is not None:
            (folder / self.main).write_bytes(content)
        return folder / self.main


FILMS = {"movies.csv": b'movieId,title,genres\n2,"Heat, The (1995)",Drama\n3,Emma,Comedy|Drama\n'}
FAMILIES = {
    "csv": Family("e.csv", "user,item,time,title\n1,a,1,é\n1,b,2,é\n2,a,3,é\n".encode(),
                  lambda path, **more: event_files.find(str(path), COLUMNS, name="e", **more), header=1),
    "jsonl": Family("e.jsonl", lines(EVENT, EVENT | {"item": "b"}, EVENT | {"user": "2"}),
                    lambda path, **more: event_files.find(str(path), COLUMNS, name="e", **more), json=True),
    "amazon": Family("Toys_5.json", lines(REVIEW, REVIEW | {"asin": "C", "summary": "é"}, REVIEW | {"reviewerID": "D"}),
                     lambda path, **more: amazon.find(path.parent, "Toys", **more), json=True),
    "google": Family("review-Ohio_10.json", lines(VISIT, VISIT | {"gmap_id": "h"}, VISIT | {"user_id": "2", "text": "é"}),
                     lambda path, **more: google_local.find(path.parent, ("Ohio",), **more),
                     {"meta-Ohio.json": lines({"gmap_id": "g", "name": "G", "category": "Cafe"})}, json=True),
    "movielens": Family("ratings.csv", b"userId,movieId,rating,timestamp\n1,2,5,1\n1,3,4.5,2\n2,2,1,3\n",
                        lambda path, **more: movielens.find(path.parent, path.parent / "kept", **more), FILMS, header=1),
}  # fmt: skip
DEEP = b"[" * 200_000 + b"]" * 200_000


def long_gzip(start: bytes, repeated: bytes, count: int) -> bytes:
    """Pack the start and then `count` MiB of something repeated, which is packed once: a full flush forgets what came before."""
    packer = zlib.compressobj(9, wbits=31)
    start = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + count * (packer.compress(repeated * ((1 << 20) // len(repeated))) + packer.flush(zlib.Z_FULL_FLUSH))


# What becomes of the main file's content, and the words that refuse it; none if it must be read as it was.
HOSTILE = {
    "packed": (lambda c: gzip.compress(c), ()),
    "packed in two": (lambda c: gzip.compress(c[:30]) + gzip.compress(c[30:]), ()),
    "byte order mark": (lambda c: b"\xef\xbb\xbf" + c, ()),
    "windows": (lambda c: c.replace(b"\n", b"\r\n"), ()),
    "cut off": (lambda c: gzip.compress(c + os.urandom(4000).hex().encode())[:-1500], ("cut off",)),
    "garbled": (lambda c: gzip.compress(c, mtime=0)[:14] + b"\xff" * 20 + gzip.compress(c)[34:], ("cut off",)),
    "long line": (lambda c: c + b"x" * (40 << 20), ("row", "MiB")),
    "long packed line": (lambda c: long_gzip(c, b"x", 10_000), ("MiB",)),
    "endless lines": (lambda c: long_gzip(c, b"\n", 10_000), ("which no data",)),
    "endless zeros": (lambda c: long_gzip(b"", b"\0", 10_000), ()),
    "utf-16": (lambda c: c.decode().encode("utf-16"), ("UTF-16", "save it as UTF-8")),
    "zip": (lambda c: b"PK\x03\x04" + c, ("zip", "unpack")),
    "zstd": (lambda c: b"\x28\xb5\x2f\xfd" + c, ("zstd", "unpack")),
    "parquet": (lambda c: b"PAR1" + c + b"PAR1", ("Parquet",)),
    "latin-1": (lambda c: c + c.splitlines(keepends=True)[-1][:-3] + b"\xe9\n", ()),
    "empty": (lambda c: b"", ()),
}
REFUSED_ANYHOW = {"endless zeros", "latin-1", "empty"}


def bounded(read: Callable) -> object:
    """Return what reading gives or the sentence that refuses, within bounds of time and memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = read()
    except ValueError as error:
        assert str(error).count("\n") == 0 and len(str(error)) < 600, error
        result = str(error)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY << 10
    return result


def pairs(kinds: Iterable[str], names: list[str]) -> Iterator:
    """Yield each kind with each family. A kind is fast with one family, and the families take turns; the other pairs are slow."""
    for n, kind in enumerate(kinds):
        for m, name in enumerate(names):
            yield pytest.param(name, kind, id=f"{name}-{kind}", marks=() if n % len(names) == m else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind"), pairs(HOSTILE, [*FAMILIES]))
def test_a_file_that_is_not_what_it_seems(tmp_path, numbered, name, kind):
    family, (change, words) = FAMILIES[name], HOSTILE[kind]
    if kind == "latin-1" and name == "movielens":
        pytest.skip("ratings hold digits alone")
    wanted = numbered(family.find(family.write(tmp_path, family.content)))
    path = family.write(tmp_path, change(family.content))
    result = bounded(lambda: numbered(family.find(path)))
    if not words and kind not in REFUSED_ANYHOW:
        assert result == wanted
        return
    assert isinstance(result, str), result
    assert path.name in result
    if not (kind == "long line" and name in ("csv", "movielens")):  # which end with other words
        assert all(word in result.replace("line", "row") for word in words), result


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name):
    family = FAMILIES[name]
    path = family.write(tmp_path)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        make(path)
        result = bounded(lambda: [list(family.find(path).events()), fingerprint(family.find(path).files)])
        assert isinstance(result, str) and any(word in result for word in (f"{path.name} is no regular file", "names no file"))
        path.rmdir() if path.is_dir() else path.unlink()


BAD_LINES = {  # a line of JSON that is no row of any family
    "deep": (b'{"user": ' + DEEP + b"}", "deep"),
    "deep literal": (b"{'user': " + b"(" * 5000 + b"}", "no JSON object"),
    "negated": (b"{'user': " + b"-" * 100_000 + b"1}", "no JSON object"),
    "array": (b"[1, 2]", "no JSON object"),
    "cut": (b'{"user": "1", "it', "no JSON object"),
    "two objects": (b'{"a": 1} {"a": 2}', "no JSON object"),
    "not utf-8": (b'{"user": "\xff"}', "not UTF-8"),
    "long number": (b'{"user": ' + b"9" * 10_000 + b"}", ""),
    "nothing known": (b'{"nobody": 5}', "no "),
}


@pytest.mark.parametrize(("name", "kind"), pairs(BAD_LINES, [name for name, family in FAMILIES.items() if family.json]))
def test_a_bad_line_of_json_is_named_or_left_out(tmp_path, numbered, name, kind):
    family, (line, word) = FAMILIES[name], BAD_LINES[kind]
    wanted = numbered(family.find(family.write(tmp_path, family.content)))
    first, rest = family.content.split(b"\n", 1)
    path = family.write(tmp_path, first + b"\n" + line + b"\n" + rest)
    refused = bounded(lambda: numbered(family.find(path)))
    assert (
        isinstance(refused, str) and f"{path.name}, {'row' if name == 'jsonl' else 'line'} 2: " in refused and word in refused
    )
    read = numbered(family.find(path, bad_rows="skip"))
    assert (read.users, read.titles, read.facts["audit"]["bad_rows_left_out"]) == (wanted.users, wanted.titles, 1)


CHANGED = {  # a value of a review in each family of reviews: (key of Amazon, of Google), value, and the word that refuses it
    "no user": (("reviewerID", "user_id"), None, "no "),
    "blank user": (("reviewerID", "user_id"), " ", "no "),
    "nan user": (("reviewerID", "user_id"), float("nan"), "no "),
    "null word": (("asin", "gmap_id"), "NULL", "no "),
    "object": (("asin", "gmap_id"), {"a": 1}, "an object"),
    "list": (("asin", "gmap_id"), ["a"], "a list"),
    "half of a pair": (("asin", "gmap_id"), "a\ud83d", "surrogate"),
    "half of a pair in text": (("reviewText", "text"), "a\udc00", "surrogate"),
    "text is a list": (("reviewText", "text"), ["a"], "a list"),
    "flag for stars": (("overall", "rating"), True, "True"),
    "underscore": (("overall", "rating"), "0_5", "0_5"),
    "infinite stars": (("overall", "rating"), float("inf"), "no whole number"),
    "no time": (("unixReviewTime", "time"), None, "no whole number"),
    "half a second": (("unixReviewTime", "time"), 1.5, "no whole number"),
    "far time": (("unixReviewTime", "time"), 10**30, "no whole number"),
}


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("name", ["amazon", "google"])
def test_a_bad_value_of_a_review_is_named(tmp_path, name, kind):
    family, (keys, value, word) = FAMILIES[name], CHANGED[kind]
    row = (REVIEW if name == "amazon" else VISIT) | {keys[name == "google"]: value}
    path = family.write(tmp_path, family.content + json.dumps(row).encode() + b"\n")
    result = bounded(lambda: list(family.find(path).events()))
    assert isinstance(result, str) and f"{path.name}, line 4: " in result and word in result


@pytest.mark.parametrize("name", ["amazon", "google"])
def test_ids_are_text_and_times_keep_milliseconds(tmp_path, numbered, name):
    if name == "google":
        rows = [VISIT | {"user_id": user, "time": at} for user, at in ((10**20 + 1, 1001), ("007", -1500), (7.0, 2))]
        want = {str(10**20 + 1): [1.001], "007": [-1.5], "7": [0.002]}
    else:
        new = {"user_id": 10**20 + 1, "parent_asin": 5, "rating": 5, "timestamp": 1001, "title": 1917, "text": None}
        rows = [new, new | {"user_id": "007", "timestamp": -1500, "parent_asin": "5"}, new | {"user_id": 7.0, "timestamp": 2}]
        want = {str(10**20 + 1): [1.001], "007": [-1.5], "7": [0.002]}
    events = numbered(FAMILIES[name].find(FAMILIES[name].write(tmp_path, lines(*rows))))
    assert events.times == want
    assert events.facts["audit"]["events_before_1970"] == 1 and len(events.titles) == 1


@pytest.mark.parametrize(
    ("value", "names"),
    [("Cafe", ["Cafe"]), (["Cafe", "Bar"], ["Cafe", "Bar"]), (None, []), ([], []), ([None, "", "Cafe"], ["Cafe"]), (5, ["5"]), ("", [])],
)  # fmt: skip
def test_categories_may_be_lists_or_single(tmp_path, numbered, value, names):
    for name, key, file, field in (("google", "gmap_id", "meta-Ohio.json", "category"), ("amazon", "asin", "meta_Toys.json", "category"),
                                   ("amazon", "asin", "meta_Toys.json", "categories")):  # fmt: skip
        path = FAMILIES[name].write(tmp_path, FAMILIES[name].content)
        item = "g" if name == "google" else "B"
        (tmp_path / file).write_bytes(lines({key: item, field: value, "name": "N", "title": "N"}))
        assert numbered(FAMILIES[name].find(path)).categories[item] == names


@pytest.mark.parametrize(
    ("films", "words"),
    [
        (b"2,Heat,Drama\n3,Emma,Comedy\n", ("movies.csv, line 1", "movieId,title,genres")),
        (b"movieId,title,genres\n2,Heat,Drama\n1_0,Emma,Comedy\n", ("movies.csv, line 3", "1_0")),
        ("movieId,title,genres\n٣,Heat,Drama\n".encode(), ("movies.csv, line 2", "no id")),
        (b'movieId,title,genres\n2,"Heat,Drama\n' + b"3,Emma,Comedy\n" * 20_000, ("movies.csv, line", "")),
        (b"movieId,title,genres\n2,\xff,Drama\n", ("movies.csv, line 2", "utf-8")),
        (b"\xef\xbb\xbfmovieId,title,genres\n2,Heat,Drama\n3,Emma,Comedy\n", ()),
        (gzip.compress(FILMS["movies.csv"], mtime=0), ()),
    ],
)
def test_films_that_are_not_what_they_seem(tmp_path, numbered, films, words):
    path = FAMILIES["movielens"].write(tmp_path, FAMILIES["movielens"].content)
    (tmp_path / "movies.csv").write_bytes(films)
    result = bounded(lambda: numbered(FAMILIES["movielens"].find(path)))
    assert all(word in result for word in words) if words else result.users == {"1": ["2", "3"], "2": ["2"]}


@pytest.mark.parametrize("row", [b"9007199254740993,2,5,1\n", b"1,2,5\n", b"1,2,x,1\n", b"\xff,2,5,1\n", b"1,2,5,1_0\n", b"\n"])
def test_bad_ratings_are_named_or_left_out(tmp_path, numbered, row):
    family = FAMILIES["movielens"]
    path = family.write(tmp_path, family.content + row + b"2,3,5,9\n")
    with pytest.raises(ValueError, match=r"ratings\.csv, line 5: "):
        numbered(family.find(path))
    events = numbered(family.find(path, bad_rows="skip"))
    assert events.users == {"1": ["2", "3"], "2": ["2", "3"]} and events.facts["audit"]["bad_rows_left_out"] == 1


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


RELEASE = FILMS | {"ratings.csv": FAMILIES["movielens"].content}


def test_a_zip_writes_nothing_but_its_own_files(tmp_path, numbered):
    evil = {
        "../ratings.csv": b"x",
        "/ratings.csv": b"x",
        "../../../evil.csv": b"x",
        "m/deep/er/movies.csv": b"x",
        "__MACOSX/._ratings.csv": b"x",
    }
    path = zipped(tmp_path / "m.zip", {f"m/{name}": content for name, content in RELEASE.items()} | evil)
    events = numbered(movielens.find(path, tmp_path / "kept" / "inner"))
    assert events.users == {"1": ["2", "3"], "2": ["2"]}
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"m.zip", "ratings.csv", "movies.csv"}
    assert not (tmp_path / "kept" / "ratings.csv").exists()


def test_a_zip_that_is_endless_or_encrypted_is_refused(tmp_path):
    bomb = zipped(tmp_path / "m.zip", RELEASE | {"movies.csv": b"0" * (100 << 20)})
    assert "times as large" in bounded(lambda: movielens.find(bomb, tmp_path / "kept"))
    locked = bytearray(zipped(tmp_path / "n.zip", RELEASE).read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = locked.find(start)
        locked[at + flags] |= 1
    (tmp_path / "n.zip").write_bytes(locked)
    assert "n.zip is no complete zip without a password" in bounded(
        lambda: movielens.find(tmp_path / "n.zip", tmp_path / "kept")
    )
    assert not list((tmp_path / "kept").rglob("m")) and set(RELEASE) <= movielens_raw.ALL_FILES


@pytest.mark.parametrize(
    "part",
    ["<script>", "<style", "<", "<script>x</script>", "</script>", "&", "&#", "&lt;script&gt;", "<b>", "<script", "ſcript<"],
)
def test_html_is_cleaned_in_linear_time(part):
    seconds = []
    for count in (20_000, 80_000):
        start = time.process_time()
        clean(part * count)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 12 * max(seconds[0], 0.02)


def test_scripts_are_dropped_and_open_ones_kept():
    assert clean("a<script>b</SCRIPT >c") == "a b c"
    assert clean("a<SCRIPT x='<b>'>b<style></script>c<style>d</style>e") == "a c e"
    assert clean("İ<script>b</script>c<script>d") == "İ c d"


@pytest.mark.parametrize("place", [0, 5, 40, 200, -30, -9])
def test_a_damaged_parquet_file_is_one_sentence(tmp_path, place):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"user": ["1"] * 99, "item": ["a"] * 99, "time": range(99), "title": ["t"] * 99}), path)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    content[place + 1] ^= 0xFF
    path.write_bytes(content)
    result = bounded(lambda: list(FAMILIES["csv"].find(path).events()))
    assert isinstance(result, list) or "e.parquet" in result
    path.write_bytes(content[:50])
    assert "e.parquet is no Parquet file" in bounded(lambda: list(FAMILIES["csv"].find(path).events()))
