"""Every published layout gives the same timelines, bad rows are named, prepared data is never stale or half-done."""

import functools
import hashlib
import http.server
import os
import shutil
import threading
import zipfile

import numpy as np
import pyarrow as pa
import pytest

from user_llm.data import download, movielens, movielens_raw, prepare
from user_llm.data.audits import audit
from user_llm.data.movielens_raw import readable_title
from user_llm.data.splits import leave_last_out
from user_llm.data.titles import unique_titles


def load(source, prepared, *, base_url=movielens.BASE_URL, **options):
    """Find MovieLens and load its timelines."""
    return prepare.load(movielens.find(source, prepared, base_url=base_url), prepared, **options)


def read(directory):
    """Read all of a release, and return its titles."""
    raw = movielens_raw.open_release(directory, name="release")
    list(raw.events())
    return {int(row["item"]): row["title"] for piece in raw.items() for row in piece.to_pylist()}


def assert_tiny(timelines, tied=(2, 3, 4)):
    """Check all that is known of the tiny release; `tied` is the order of the three events of user 9 that tie."""
    assert timelines.user_keys == ["4", "9"]
    np.testing.assert_array_equal(timelines.offsets, [0, 3, 8])
    np.testing.assert_array_equal(timelines.item, [3, 5, 1, 1, *tied, 5])
    stars = {2: 6, 3: 8, 4: 4}
    np.testing.assert_array_equal(timelines.columns["rating"], [4, 10, 2, 10, *map(stars.get, tied), 2])
    np.testing.assert_array_equal(timelines.columns["timestamp"][[0, 1, 2]], 1_000_000_000 + np.array([0, 1, 3]))
    np.testing.assert_array_equal(timelines.columns["timestamp"][3:], [100, 500, 500, 500, 900])
    catalogue = timelines.catalogue
    # Only rated films have ids; articles stand in front; a title names one film.
    assert catalogue.keys == ["", "2", "3", "7", "11", "40"]
    assert catalogue.titles[:3] == ["", "The Matrix (1999)", "Les Misérables (1995)"]
    assert catalogue.titles[3:] == ["Emma (1996)", "Emma (1996) [2]", "The American President (1995)"]
    assert catalogue.vocab == {"genres": ["", "Action", "Comedy", "Drama"]}
    np.testing.assert_array_equal(catalogue.multi["genres"], [[0, 0], [1, 3], [3, 0], [2, 3], [0, 0], [2, 0]])
    assert [(f.name, f.size, f.width) for f in timelines.schema] == [
        ("item", 6, 1), ("rating", 11, 1), ("genres", 4, 2), ("gap", 28, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["csv", "dat", "tab"])
def test_every_layout_gives_the_same_timelines(write_release, tmp_path, layout):
    directory = write_release(tmp_path / "ml-tiny", layout)
    timelines = load(directory, tmp_path / "prepared", ties="file")
    assert timelines.name == "ml-tiny"
    assert_tiny(timelines, tied=(3, 2, 4))


def zipped(directory, path, compression=zipfile.ZIP_STORED):
    """Zip a release as GroupLens does: one folder with everything."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(directory.iterdir()):
            archive.write(file, f"{directory.name}/{file.name}")
    return path


@pytest.mark.parametrize("layout", ["csv", "dat", "tab"])
def test_a_zip_is_read_like_its_directory(write_release, tmp_path, layout):
    path = zipped(write_release(tmp_path / "ml-tiny", layout), tmp_path / "ml-tiny.zip")
    shutil.rmtree(tmp_path / "ml-tiny")
    timelines = load(path, tmp_path / "prepared", ties="file")
    assert timelines.name == "ml-tiny"
    assert_tiny(timelines, tied=(3, 2, 4))


@pytest.fixture
def served(write_release, tmp_path):
    """Serve ml-100k.zip from a thread; yields its URL, the zip, and the paths that were asked for."""
    directory = tmp_path / "served"
    directory.mkdir()
    path = zipped(write_release(tmp_path / "ml-100k", "tab"), directory / "ml-100k.zip")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=directory))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", path, asked
    server.shutdown()
    server.server_close()


def test_a_release_is_downloaded_once_and_verified(served, tmp_path, monkeypatch):
    url, path, asked = served
    known = (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(movielens.CHECKSUMS, "ml-100k", known)
    for _ in range(2):
        timelines = load("ml-100k", tmp_path / "prepared", ties="file", base_url=url)
        assert timelines.name == "ml-100k"
        assert_tiny(timelines, tied=(3, 2, 4))
    assert asked == ["/ml-100k.zip"]


def test_a_download_with_a_wrong_checksum_is_refused(served, tmp_path, monkeypatch):
    url, path, asked = served
    monkeypatch.setitem(movielens.CHECKSUMS, "ml-100k", (path.stat().st_size, "0" * 64))
    with pytest.raises(ValueError, match=r"ml-100k\.zip cannot be downloaded or is not what was published"):
        load("ml-100k", tmp_path / "prepared", base_url=url)
    assert asked == ["/ml-100k.zip"]
    assert not list((tmp_path / "prepared").rglob("*.array_record*"))


def test_a_release_without_known_checksum_is_downloaded(served, tmp_path, monkeypatch):
    url, _, _ = served
    monkeypatch.setitem(movielens.CHECKSUMS, "ml-100k", None)
    assert_tiny(load("ml-100k", tmp_path / "prepared", ties="file", base_url=url), tied=(3, 2, 4))


@pytest.mark.parametrize("release", ["ml-32m", "ml-1m"])
def test_a_release_that_the_server_lacks_is_one_sentence(served, tmp_path, release):
    url, _, _ = served
    with pytest.raises(ValueError, match=rf"{release}\.zip cannot be downloaded"):
        load(release, tmp_path / "prepared", base_url=url)


def test_an_unknown_source_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"'ml-99'.*ml-100k.*ml-latest"):
        load("ml-99", tmp_path)


def test_hashed_ties_do_not_depend_on_the_files_order(write_release, tmp_path):
    one = write_release(tmp_path / "one")
    rows = (one / "ratings.csv").read_text().splitlines()
    two = write_release(tmp_path / "two")
    (two / "ratings.csv").write_text("\n".join([rows[0], *rows[:0:-1], ""]))
    orders = {}
    for ties, seed in (("hashed", 0), ("hashed", 1), ("hashed", 2), ("file", 0)):
        first, second = (load(d, tmp_path / "prepared", ties=ties, seed=seed) for d in (one, two))
        tied = first.item[4:7].tolist()
        assert_tiny(first, tied)
        if ties == "hashed":
            assert_tiny(second, tied)
        else:
            assert_tiny(second, tied[::-1])
        orders[ties, seed] = tuple(tied)
    assert len({orders["hashed", seed] for seed in range(3)}) > 1


def test_short_users_are_left_out_and_leaving_out_all_is_an_error(write_release, tmp_path):
    directory = write_release(tmp_path / "raw")
    timelines = load(directory, tmp_path / "prepared", min_events=4)
    assert timelines.user_keys == ["9"]
    assert len(timelines.item) == 5
    with pytest.raises(ValueError, match="has 6 events: lower min_events"):
        load(directory, tmp_path / "prepared", min_events=6)


def test_half_stars_and_windows_line_ends(write_release, tmp_path):
    ratings = [(1, 2, rating, 10 + i) for i, rating in enumerate(np.arange(0.5, 5.5, 0.5))]
    directory = write_release(tmp_path / "raw", "csv", ratings)
    for name in ("ratings.csv", "movies.csv"):
        (directory / name).write_bytes((directory / name).read_bytes().replace(b"\n", b"\r\n"))
    timelines = load(directory, tmp_path / "prepared")
    np.testing.assert_array_equal(timelines.columns["rating"], np.arange(1, 11))


def test_titles_in_utf8_or_with_bytes_that_look_like_line_ends(write_release, tmp_path):
    movies = [(2, "Amélie (2001)", ["Drama"]), (3, "Wait\x85 (1990)", ["Drama"])]
    directory = write_release(tmp_path / "raw", "dat", [(1, 2, 3, 4), (1, 3, 3, 5)], movies)
    assert read(directory) == {2: "Amélie (2001)", 3: "Wait (1990)"}
    text = (directory / "movies.dat").read_text(encoding="latin-1")
    (directory / "movies.dat").write_text(text, encoding="utf-8")
    assert read(directory)[2] == "Amélie (2001)"


@pytest.mark.parametrize(
    ("published", "readable"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Toy  Story (1995) ", "Toy Story (1995)"),
        ("Bug's Life, A (1998)", "A Bug's Life (1998)"),
        ("American in Paris, An", "An American in Paris"),
        ("Postman, The (Postino, Il) (1994)", "The Postman (Postino, Il) (1994)"),
        ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly (1966)"),
        ("Girl, Interrupted (1999)", "Girl, Interrupted (1999)"),
    ],
)
def test_titles_are_made_readable(published, readable):
    assert readable_title(published) == readable


def test_repeated_titles_are_numbered():
    assert unique_titles(["Emma", "Hamlet", "Emma", "Emma"]) == ["Emma", "Hamlet", "Emma [2]", "Emma [3]"]
    assert unique_titles(["Emma", "Emma [2]", "Emma"]) == ["Emma", "Emma [2]", "Emma [3]"]
    assert unique_titles(["Emma", "Emma", "Emma [2]"]) == ["Emma", "Emma [2]", "Emma [2] [2]"]


RATING_FILES = {"csv": ("ratings.csv", ",", 1), "dat": ("ratings.dat", "::", 0), "tab": ("u.data", "\t", 0)}


@pytest.mark.parametrize("layout", RATING_FILES)
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("9 7 4", "3 columns"),
        ("9 7 good 500", "does not hold four numbers"),
        ("9 7 4 ", "does not hold four numbers"),
        ("", "1 columns"),
        ("0 7 4 500", "out of range"),
        ("1.5 7 4 500", "out of range"),
        ("9 7.5 4 500", "out of range"),
        ("9 7 0 500", "out of range"),
        ("9 7 5.5 500", "out of range"),
        ("9 7 3.3 500", "out of range"),
        ("9 7 nan 500", "out of range"),
        ("9 7 4 -1", "out of range"),
        ("9 7 4 inf", "out of range"),
    ],
)
def test_a_bad_rating_is_refused_naming_file_and_line(write_release, tmp_path, layout, row, words):
    directory = write_release(tmp_path, layout)
    name, separator, header = RATING_FILES[layout]
    lines = (directory / name).read_text().splitlines()
    lines[header + 3] = row.replace(" ", separator)
    (directory / name).write_text("\n".join([*lines, ""]))
    with pytest.raises(ValueError, match=rf"{name}, line {header + 4}: .*{words}"):
        read(directory)


@pytest.mark.parametrize("header", ["movieId,userId,rating,timestamp\n", "9,7,4,500\n"])
def test_other_columns_or_none_named_are_refused(write_release, tmp_path, header):
    path = write_release(tmp_path) / "ratings.csv"
    path.write_text(header + path.read_text().partition("\n")[2])
    with pytest.raises(ValueError, match=r"ratings\.csv, line 1: the header must begin with userId,movieId,rating,timestamp"):
        read(tmp_path)


@pytest.mark.parametrize("layout", RATING_FILES)
def test_a_file_cut_off_within_a_number_is_refused(write_release, tmp_path, layout):
    name, _, header = RATING_FILES[layout]
    path = write_release(tmp_path, layout) / name
    path.write_text(path.read_text()[:-2])
    with pytest.raises(ValueError, match=rf"{name}, line {8 + header}: no line end"):
        read(tmp_path)


def test_a_comment_sign_does_not_cut_a_number(write_release, tmp_path):
    path = write_release(tmp_path) / "ratings.csv"
    path.write_text(path.read_text().replace("9,7,4,500", "9,7,4,5#0"))
    with pytest.raises(ValueError, match=r"ratings\.csv, line 2: .* does not hold four numbers"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["ratings.csv", "movies.csv"])
def test_bytes_that_are_no_utf8_are_named(write_release, tmp_path, name):
    path = write_release(tmp_path) / name
    path.write_bytes(path.read_bytes() + b"9,\xff\n")
    with pytest.raises(ValueError, match=rf"{name}, line \d+: not utf-8") as caught:
        read(tmp_path)
    assert type(caught.value) is ValueError


def test_two_releases_in_one_folder_are_not_guessed_between(write_release, tmp_path):
    write_release(tmp_path / "one")
    assert movielens_raw.find_layout(tmp_path).parent.name == "one"
    write_release(tmp_path / "two", "tab")
    with pytest.raises(ValueError, match="holds several MovieLens releases .*one.*two"):
        load(tmp_path, tmp_path / "prepared")


def test_films_without_any_genre(write_release, tmp_path):
    movies = [(i, f"Film {i} (2000)", []) for i in (2, 3)]
    directory = write_release(tmp_path / "raw", "csv", [(1, 2, 3, 4), (1, 3, 3, 5), (2, 3, 1, 6)], movies)
    timelines = load(directory, tmp_path / "prepared", min_events=1)
    np.testing.assert_array_equal(timelines.features(np.arange(len(timelines.item)))[:, 2], 0)


@pytest.mark.parametrize("layout", RATING_FILES)
def test_a_film_without_title_is_kept_and_counted(write_release, tmp_path, layout):
    directory = write_release(
        tmp_path / "raw", layout, [(9, 2, 5, 100), (9, 3, 3, 500), (9, 6, 4, 600), (4, 2, 1, 5), (4, 6, 4, 6), (4, 7, 2, 7)]
    )
    timelines = load(directory, tmp_path / "prepared")
    item = timelines.catalogue.keys.index("6")
    assert timelines.catalogue.titles[item] == "6"
    assert not timelines.catalogue.multi["genres"][item].any()
    facts = audit(timelines, leave_last_out(timelines))
    assert (facts["untitled_items"], facts["untitled_events"], facts["events"]) == (1, 2, 6)


MOVIE_FILES = {"csv": ("movies.csv", ",", 1), "dat": ("movies.dat", "::", 0), "tab": ("u.item", "|", 0)}


@pytest.mark.parametrize("layout", MOVIE_FILES)
@pytest.mark.parametrize("row", ["3 Heat", "three Heat Drama Drama Drama 0 0 0 1", "", "3"])
def test_a_bad_movie_is_refused_naming_file_and_line(write_release, tmp_path, layout, row):
    directory = write_release(tmp_path, layout)
    name, separator, header = MOVIE_FILES[layout]
    encoding = "utf-8" if layout == "csv" else "latin-1"
    lines = (directory / name).read_text(encoding=encoding).splitlines()
    lines[header + 1] = row.replace(" ", separator)
    (directory / name).write_text("\n".join([*lines, ""]), encoding=encoding)
    with pytest.raises(ValueError, match=rf"{name}, line {header + 2}: .* is no id, title and genres"):
        read(directory)


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize("layout", RATING_FILES)
def test_empty_and_missing_files_are_named(write_release, tmp_path, layout):
    directory = write_release(tmp_path, layout)
    ratings, _, header = RATING_FILES[layout]
    movies, _, _ = MOVIE_FILES[layout]
    whole = {name: (directory / name).read_bytes() for name in (ratings, movies)}
    for name, content, words in (
        (ratings, b"", f"{ratings} holds no ratings"),
        (ratings, b"userId,movieId,rating,timestamp\n" * header, f"{ratings} holds no ratings"),
        (movies, b"", f"{movies} holds no movies"),
    ):
        (directory / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read(directory)
        (directory / name).write_bytes(whole[name])
    (directory / ("u.genre" if layout == "tab" else movies)).unlink()
    with pytest.raises(ValueError, match=f"{'u.genre' if layout == 'tab' else movies} is missing"):
        read(directory)
    (directory / ratings).unlink()
    with pytest.raises(ValueError, match="No MovieLens release in .*ratings.csv, ratings.dat, u.data"):
        read(directory)


def change_first_rating(path):
    """Change one digit and restore the time of change: neither size nor time betray it."""
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"9,7,4,500", b"9,7,3,500"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rating_of_user_9(timelines):
    return timelines.columns["rating"][4 + timelines.item[4:7].tolist().index(3)]


def test_changed_raw_files_are_read_anew(write_release, tmp_path):
    directory = write_release(tmp_path / "raw")
    assert rating_of_user_9(load(directory, tmp_path / "prepared")) == 8
    change_first_rating(directory / "ratings.csv")
    assert rating_of_user_9(load(directory, tmp_path / "prepared")) == 6
    movies = directory / "movies.csv"
    movies.write_text(movies.read_text().replace("Matrix", "Metric"))
    assert load(directory, tmp_path / "prepared").catalogue.titles[1] == "The Metric (1999)"


def test_a_changed_zip_is_unpacked_anew(write_release, tmp_path):
    directory = write_release(tmp_path / "raw")
    path = zipped(directory, tmp_path / "ml.zip")
    assert rating_of_user_9(load(path, tmp_path / "prepared")) == 8
    size, stat = path.stat().st_size, path.stat()
    change_first_rating(directory / "ratings.csv")
    zipped(directory, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == size
    assert rating_of_user_9(load(path, tmp_path / "prepared")) == 6


def test_prepared_data_serves_again_whatever_the_protocol(write_release, tmp_path, monkeypatch):
    directory = write_release(tmp_path / "raw")
    load(directory, tmp_path / "prepared")

    def never(*args):
        raise AssertionError("read twice")

    monkeypatch.setattr(movielens_raw, "_read_ratings", never)
    (directory / "README.txt").write_text("not data")
    assert_tiny(load(directory, tmp_path / "prepared", ties="file", seed=1, min_events=1), tied=(3, 2, 4))


def test_a_half_written_dataset_is_never_accepted(write_release, tmp_path, monkeypatch):
    directory, prepared, killed = write_release(tmp_path / "raw"), tmp_path / "prepared", tmp_path / "killed"
    whole = prepare.Events._generate_examples

    def interrupted(*args):
        examples = whole(*args)
        yield next(examples)
        shutil.copytree(prepared, killed)  # what is left where the process dies now
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Events, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(directory, prepared)
    assert list(killed.rglob("*incomplete*"))
    for place in (prepared, killed):
        assert_tiny(load(directory, place, ties="file"), tied=(3, 2, 4))


def test_a_half_unpacked_zip_is_never_accepted(write_release, tmp_path, monkeypatch):
    path = zipped(write_release(tmp_path / "raw"), tmp_path / "ml.zip")

    def interrupted(archive, entry, target, most):
        whole(archive, entry, target, most)
        raise OSError("No space left on device")

    whole = download.extract
    with monkeypatch.context() as patch:
        patch.setattr(download, "extract", interrupted)
        with pytest.raises(OSError, match="No space"):
            load(path, tmp_path / "prepared")
    assert_tiny(load(path, tmp_path / "prepared", ties="file"), tied=(3, 2, 4))


def test_a_broken_zip_is_refused(write_release, tmp_path):
    path = zipped(write_release(tmp_path / "raw"), tmp_path / "ml.zip", zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    garbled = bytearray(whole)
    start = whole.find(b"ratings.csv") + len("ratings.csv")
    garbled[start : start + 4] = b"\xff" * 4
    for broken in (whole[:200], bytes(garbled)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"ml\.zip is no complete zip"):
            load(path, tmp_path / "prepared")


def test_the_real_small_release_is_read_whole(data_dir):
    raw = movielens.find(data_dir / "movielens" / "ml-latest-small", "unused")
    events = pa.Table.from_batches(raw.events())
    items = {row["item"]: row for piece in raw.items() for row in piece.to_pylist()}
    assert len(events) == 100_836
    assert len(events["user"].unique()) == 610
    assert len(items) == 9_742
    assert items["2571"]["title"] == "The Matrix (1999)"
    assert items["1"]["genres"] == ["Adventure", "Animation", "Children", "Comedy", "Fantasy"]
