"""What a vocabulary reads of raw events is what training made of them, in every family of datasets."""

import datetime
import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from user_llm.data import amazon, event_files, google_local, movielens, prepare, synthetic_files
from user_llm.data.event_files import Columns
from user_llm.data.vocabulary import Vocabulary

TS = datetime.datetime
HOUR = 1_714_543_200  # 2024-05-01 06:00 UTC


def check_same(timelines, events, *, ticks=True):
    """Compare what is read of events with what training holds, user by user."""
    found = Vocabulary.of(timelines).read(events)
    read, unknown = found.timelines, found.unknown
    assert not unknown.any() and sorted(read.user_keys) == sorted(timelines.user_keys)
    for user, key in enumerate(timelines.user_keys):
        here = timelines.offsets[user] + np.arange(timelines.lengths[user])
        there = read.offsets[read.user_keys.index(key)] + np.arange(timelines.lengths[user])
        assert read.lengths[read.user_keys.index(key)] == timelines.lengths[user]
        np.testing.assert_array_equal(read.features(there), timelines.features(here))
        assert read.columns.keys() == timelines.columns.keys()
        for name, column in timelines.columns.items():
            np.testing.assert_array_equal(read.columns[name][there], column[here])
        if ticks:
            np.testing.assert_array_equal(read.ticks[there], timelines.ticks[here])


def shuffled(rows, seed=0):
    return random.Random(seed).sample(rows, len(rows))


# Readers of the four families, and the events of each as a published file holds them.
FAMILIES = {
    "movielens": lambda folder: movielens.find(folder, folder),
    "amazon": lambda folder: amazon.find(folder, synthetic_files.NAME),
    "google_local": lambda folder: google_local.find(folder, (synthetic_files.NAME,)),
    "events": lambda folder: event_files.find(str(folder), Columns(**synthetic_files.COLUMNS), name="events"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_of_a_world_is_read_as_in_training(tmp_path, family):
    synthetic_files.write(tmp_path / "raw", layout=family, num_users=8, num_items=30, events_per_user=8, seed=5)
    raw = FAMILIES[family](tmp_path / "raw")
    timelines = prepare.load(raw, tmp_path / "prepared", words=3)
    check_same(timelines, str(raw.files[0]))


@pytest.mark.parametrize("separator", [",", "::"])
def test_ids_of_movielens_are_texts_as_they_are_spelled(tmp_path, separator):
    """007 is another user than 7, and 07 another film, in training and in serving."""
    names = ("ratings.csv", "movies.csv") if separator == "," else ("ratings.dat", "movies.dat")
    headers = ("userId,movieId,rating,timestamp\n", "movieId,title,genres\n") if separator == "," else ("", "")
    rows = [(user, film, "4", str(100 * n)) for user in ("007", "7") for n, film in enumerate(("07", "7", "8", "10"))]
    films = [
        ("07", "One (2000)", "Drama"),
        ("7", "Two (2000)", "Drama"),
        ("8", "Three (2000)", "War"),
        ("10", "Four (2000)", "War"),
    ]
    (tmp_path / "raw").mkdir()
    for name, header, table in zip(names, headers, (rows, films), strict=True):
        (tmp_path / "raw" / name).write_text(header + "".join(separator.join(row) + "\n" for row in table))
    timelines = prepare.load(movielens.find(tmp_path / "raw", tmp_path), tmp_path / "prepared")
    assert sorted(timelines.user_keys) == ["007", "7"]
    titles = dict(zip(timelines.catalogue.keys[1:], timelines.catalogue.titles[1:], strict=True))
    assert titles == {film: title for film, title, _ in films}
    check_same(timelines, [dict(zip(("userId", "movieId", "rating", "timestamp"), row, strict=True)) for row in rows])


@pytest.mark.parametrize("layout", ["csv", "dat", "tab"])
def test_movielens_has_one_form_of_events_whatever_its_layout(tmp_path, write_release, layout):
    ratings = [
        (user, movie, stars, 500 + movie // 9) for user in (4, 9, 17) for stars, movie in enumerate((7, 2, 3, 11, 40), 1)
    ]
    if layout == "csv":
        ratings += [(4, 5, 0.5, 77), (9, 5, 4.5, 77)]
    raw = movielens.find(write_release(tmp_path / "raw", layout, ratings), tmp_path)
    timelines = prepare.load(raw, tmp_path / "prepared", seed=3)
    rows = [dict(zip(("userId", "movieId", "rating", "timestamp"), row, strict=True)) for row in ratings]
    check_same(timelines, rows)
    check_same(timelines, shuffled(rows))
    assert timelines.fields.seed == 3
    with pytest.raises(ValueError, match=r"row 2: no number .* 'rating' holds 4\.2; it is one of 0\.5, 1, 1\.5"):
        Vocabulary.of(timelines).read([rows[0], rows[0] | {"rating": 4.2}])


REVIEWS = {
    "2018": [
        {"reviewerID": f"A{k % 3}", "asin": f"B{k % 4}", "overall": 1.0 + k % 5, "unixReviewTime": HOUR + k // 5 * 5,
         "summary": "good &amp; <b>cheap</b>", "reviewText": None if k % 4 else "I  like\nit"} for k in range(12)
    ],
    "2023": [
        {"user_id": f"A{k % 3}", "parent_asin": f"B{k % 4}", "rating": 1 + k % 5, "timestamp": 1000 * HOUR + k // 5 * 1501,
         "title": "a<br />b", "text": "fine", "asin": "other"} for k in range(12)
    ],
}  # fmt: skip


@pytest.mark.parametrize("year", REVIEWS)
def test_reviews_are_read_by_the_layout_of_their_file(tmp_path, year):
    lines = ["", "no JSON", *map(json.dumps, REVIEWS[year])]
    (tmp_path / "Toys.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    timelines = prepare.load(amazon.find(tmp_path, "Toys", bad_rows="skip"), tmp_path / "prepared", min_events=1)
    assert timelines.fields.ticks_per_second == (1000 if year == "2023" else 1)
    check_same(timelines, REVIEWS[year])
    check_same(timelines, shuffled(REVIEWS[year]))
    time = timelines.fields.time
    seconds = {"2018": 1, "2023": 1000}[year]
    dates = [row | {time: datetime.datetime.fromtimestamp(row[time] / seconds, datetime.UTC)} for row in REVIEWS[year]]
    check_same(timelines, [*REVIEWS[year][:5], *dates[5:]])  # each time by itself


def log(times, **more):
    """Return two users' events at these times."""
    rows = [{"u": f"user {k % 2}", "i": f"{k // 2}", "t": time} for k, time in enumerate(times)]
    return [row | {name: values[k] for name, values in more.items()} for k, row in enumerate(rows)]


T, O = {"user": "u", "item": "i", "time": "t"}, {"user": "u", "item": "i", "order": "t"}  # noqa: E741
OWN = {  # the events and their columns
    "dates": (log(["2024-05-01", "2024-05-01T06:00:00Z", "2024-05-02 08:00+02:00", "2024-05-01T06:00:00.25"]), T),
    "milliseconds": (log([HOUR * 1000 + k for k in (1501, 0, 1501, 999, 7, 40_000)]), T),
    "nanoseconds": (log([HOUR * 10**9 + k for k in (3, 2, 10**9 + 2, 1)]), T),
    "fractions": (log([HOUR + 0.25, HOUR + 1.125, HOUR + 0.5, HOUR + 0.0625]), T),
    "before_1970": (log([-1.5, -2.25, -0.5, 3]), T),
    "unit_given": (log([100, 200, 1150, 300]), T | {"time_unit": "ms"}),
    "compact": (log([20240501, 20240502, 20240429, 20240501]), T),
    "compact_text": (log(["20240501060000", "20240501060001", "20240501060003", "20240429060000"]), T),
    "compact_given": (log(["20240501", "20240502", "20240429", "20240501"]), T | {"time_unit": "YYYYMMDD"}),
    "ties": (log([HOUR] * 40), T),
    "orders": (log([3, 2, -1, 2, 2**60, 7]), O),
    "close_orders": (log([1.5, 0.1, 1.25, 0.10000000000000002, 1.2501, -7]), O),
    "numbers": (
        log(range(60), n=[None if k % 7 == 0 else k * k for k in range(60)], m=[True] * 30 + [0.1] * 20 + [-4] * 10),
        T | {"numbers": ("n", "m")},
    ),
    "texts": (log(range(4), n=["One two, two three", None, "<b>ÉTÉ</b>", ""]), T | {"texts": ("n",)}),
    "categories": (log(range(4), c=[["x", "y"], "z", ["y"], []]), T | {"categories": ("c",)}),
    "odd_names": (
        [dict(zip(("a.b", "", "t'", "item", "gap"), row, strict=True)) for row in ((1, "x", 5, 2, "g"), (1, "y", 5, 3, "h"))],
        {"user": "a.b", "item": "item", "time": "t'", "numbers": ("item",), "texts": ("gap",)},
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_own_events_are_read_as_in_training(tmp_path, case):
    rows, columns = OWN[case]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = event_files.find(str(tmp_path / "raw"), Columns(**columns), name="own")
    timelines = prepare.load(raw, tmp_path / "prepared", min_events=1, seed=7)
    # Fractions of orders are kept to a thousandth, of which training has the ranks.
    exact = case != "close_orders"
    check_same(timelines, str(tmp_path / "raw"), ticks=exact)
    check_same(timelines, shuffled(rows), ticks=exact)
    stored = json.loads(json.dumps(Vocabulary.of(timelines).to_json()))
    again = Vocabulary.from_json(stored, timelines.catalogue)
    assert (again.name, again.schema, again.fields) == ("own", timelines.schema, timelines.fields)


def test_typed_tables_are_read_as_in_training(tmp_path):
    moments = [TS(2024, 5, 1, 6, 0, second, tzinfo=datetime.UTC) for second in (3, 1, 2, 59)]
    views = pa.DictionaryArray.from_arrays([0, 1, 0, 1], pa.array(["x", "y"], pa.string_view()))
    table = pa.table(
        {
            "u": [7, 7, 8, 8],
            "i": [1.0, 2.0, 1.0, 2.0],
            "t": pa.array(moments, pa.timestamp("us", "UTC")),
            "n": [1.5, 2, None, 1],
        }
    )
    pq.write_table(table, tmp_path / "e.parquet")
    raw = event_files.find(str(tmp_path / "e.parquet"), Columns(**T, numbers=("n",)), name="own")
    timelines = prepare.load(raw, tmp_path / "prepared", min_events=1)

    class Table:  # as polars' and pandas' are
        def __arrow_c_stream__(self, requested_schema=None):
            return table.append_column("more", views).__arrow_c_stream__(requested_schema)

    for events in (table, Table(), table.to_batches()[0], table.to_pylist()):
        check_same(timelines, events)
    scalars = [{name: np.array([value])[0] for name, value in row.items() if value is not None} for row in table.to_pylist()]
    for row, moment in zip(scalars, moments, strict=True):
        row["t"] = np.datetime64(moment.replace(tzinfo=None), "ns")
    check_same(timelines, scalars)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_decimals_are_the_same_times_as_floats(tmp_path, kind):
    """In floats, 2.3 - 1.3 is less than 1; the gap between these times is a whole second all the same."""
    moments = [HOUR + 0.123, HOUR + 1.123, HOUR + 1.3, HOUR + 2.3, -7.25, -8.001, HOUR + 2.000001, HOUR + 9.000001]
    rows = [{"u": "1", "i": str(k), "t": time} for k, time in enumerate(moments)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    elif kind == "jsonl":
        (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (tmp_path / "e.csv").write_text("u,i,t\n" + "".join(f"1,{row['i']},{row['t']!r}\n" for row in rows))
    raw = event_files.find(str(tmp_path / f"e.{kind}"), Columns(**T), name="own")
    timelines = prepare.load(raw, tmp_path / "prepared", min_events=1)
    assert timelines.ticks_per_second == 1_000_000
    check_same(timelines, rows)
    check_same(timelines, pa.Table.from_pylist(rows))


def test_ties_of_the_file_stay_in_its_order(tmp_path):
    rows = log([HOUR] * 20)
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = event_files.find(str(tmp_path / "e.jsonl"), Columns(**T), name="own")
    timelines = prepare.load(raw, tmp_path / "prepared", ties="file")
    check_same(timelines, rows)
    assert Vocabulary.of(timelines).encode(rows[10::2])[:, 0].tolist() == [6, 7, 8, 9, 10]
