"""What a model reads of raw events is what training made of them; what does not fit is one sentence."""

import dataclasses
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
from user_llm.data.fields import Fields, Number, Text
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import GAP_BUCKETS, Catalogue
from user_llm.data.vocabulary import Vocabulary

TS = datetime.datetime
HOUR = 1_714_543_200  # 2024-05-01 06:00 UTC


def check_same(timelines, events, *, ticks=True):
    """Compare what is read of events with what training holds, user by user."""
    read, unknown = Vocabulary.of(timelines).read(events)
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


def test_a_table_of_pandas_may_mix_types(toy):
    pandas = pytest.importorskip("pandas")
    np.testing.assert_array_equal(toy.encode(pandas.DataFrame(EVENTS, index=["x", "y", "z"])), toy.encode(EVENTS))


def test_a_dictionary_of_views_is_read(toy):
    items = pa.DictionaryArray.from_arrays([0, 1, 0], pa.array(["a", "b"], pa.string_view()))
    assert toy.encode(pa.table({"i": items, "t": [5, 7, 9], "r": [1, 2, 3]}))[:, 0].tolist() == [1, 2, 1]


def test_ties_of_the_file_stay_in_its_order(tmp_path):
    rows = log([HOUR] * 20)
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = event_files.find(str(tmp_path / "e.jsonl"), Columns(**T), name="own")
    timelines = prepare.load(raw, tmp_path / "prepared", ties="file")
    check_same(timelines, rows)
    assert Vocabulary.of(timelines).encode(rows[10::2])[:, 0].tolist() == [6, 7, 8, 9, 10]


EVENTS = [
    {"u": 1, "i": "a", "t": 100, "r": 3},
    {"u": 1, "i": 7, "t": "1970-01-01T00:01:38", "r": 0.5},
    {"u": "1", "i": "b", "t": 200.5, "r": "5"},
]


@pytest.fixture(scope="module")
def toy() -> Vocabulary:
    """Three items of two genres; ratings of half stars, a text, times in ticks of a thousandth."""
    genres = np.array([[0, 0], [1, 2], [2, 0], [0, 0]], np.int32)
    return Vocabulary(
        "toy",
        Schema(
            (
                Feature("item", "item", 4),
                Feature("rating", "ordinal", 11),
                Feature("genres", "multi", 3, 2),
                Feature("note", "text", 50, 2),
                Feature("gap", "time", GAP_BUCKETS),
            )
        ),
        Catalogue(["", "A", "B", "C"], ["", "a", "b", "7"], {"genres": genres}, {"genres": ["", "x", "y"]}),
        Fields(
            "u", "i", "t", ticks_per_second=1000, texts={"note": Text("n", html=True)},
            numbers={"rating": Number.of_scale("r", [half / 2 for half in range(1, 11)])},
        ),
    )  # fmt: skip


def test_events_of_many_forms_become_features_by_hand(toy):
    read, unknown = toy.read([EVENTS[0] | {"n": "A <i>b</i> c"}, *EVENTS[1:]])
    np.testing.assert_array_equal(
        toy.encode(EVENTS),
        [[3, 1, 0, 0, 0, 0, 1], [1, 6, 1, 2, 0, 0, 2 + 1], [2, 10, 2, 0, 0, 0, 2 + 6]],
    )
    assert read.columns["note"].tolist() == ["", "A b c", ""] and read.columns["rating"].tolist() == [1, 6, 10]
    assert read.ticks.tolist() == [98_000, 100_000, 200_500] and read.columns["timestamp"][-1] == 200.5
    assert read.user_keys == ["1"] and unknown.tolist() == [0]


def test_unknown_items_are_counted_and_left_out(toy):
    more = [{"u": 2, "i": "new", "t": 5, "r": 1}, {"u": 1, "i": "A", "t": 150, "r": 1}, {"u": 1, "i": "A", "t": 150, "r": 1}]
    read, unknown = toy.read([*EVENTS, *more])
    assert read.user_keys == ["1", "2"] and read.lengths.tolist() == [3, 0] and unknown.tolist() == [1, 1]
    np.testing.assert_array_equal(read.features(np.arange(3)), toy.encode(EVENTS))


def test_the_same_event_counts_once_in_whatever_spelling(toy):
    twice = [EVENTS[1] | {"t": 98}, EVENTS[1] | {"t": "98.0"}, EVENTS[0] | {"r": 1}, *EVENTS]
    read, _ = toy.read([*EVENTS, *twice])
    np.testing.assert_array_equal(read.features(np.arange(len(read.item))), toy.encode(EVENTS))  # the first one's rating


def test_no_events_and_no_users(toy):
    assert toy.encode([]).shape == (0, 7)
    read, unknown = toy.read([])
    assert len(read) == 0 and len(unknown) == 0
    alone = [{key: value for key, value in event.items() if key != "u"} for event in EVENTS]
    assert toy.read(alone).timelines.user_keys == [""]
    np.testing.assert_array_equal(toy.encode(alone), toy.encode(EVENTS))


def test_users_that_only_later_lines_name_are_refused(toy, tmp_path):
    lines = [json.dumps({"i": "a", "t": 1, "r": 1})] * 1000 + [json.dumps({"u": 5, "i": "a", "t": 1, "r": 1})]
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="e.jsonl, row 1001: no user .* holds 5, while the first events name none"):
        toy.read(str(tmp_path / "e.jsonl"))
    (tmp_path / "e.jsonl").write_text("\n".join(lines[:-1]))
    assert toy.encode(tmp_path / "e.jsonl").shape == (1, 7)


def test_orders_too_large_for_their_ticks_are_refused(toy):
    schema = Schema(tuple(feature for feature in toy.schema if feature.kind != "time"))
    ordered = dataclasses.replace(toy, schema=schema, fields=dataclasses.replace(toy.fields, timed=False))
    assert ordered.read(EVENTS[::2]).timelines.ticks.tolist() == [100_000, 200_500]
    with pytest.raises(ValueError, match="row 1: no order .* too large"):
        ordered.read([EVENTS[0] | {"t": 2**60}])
    with pytest.raises(ValueError, match="row 2: no order .* holds '1970-01-01T00:01:38'"):
        ordered.read(EVENTS)


def test_a_number_that_is_no_feature_may_be_missing(toy):
    fewer = dataclasses.replace(toy, schema=Schema(tuple(toy.schema[name] for name in ("item", "gap"))))
    alone = [{"i": event["i"], "t": event["t"]} for event in EVENTS]
    np.testing.assert_array_equal(fewer.encode(alone), toy.encode(EVENTS)[:, [0, -1]])


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ({"i": "a"}, "Events are a list of dicts, a table .*, not dict"),
        (7, "not int"),
        ([EVENTS[0], 5], "The list of events, row 2: 5 is no dict"),
        ([{"u": 1, "i": "a", "r": 2}], "The list of events has no column 't'; it has u, i, r"),
        (pa.table({"i": ["a"], "t": [1]}), "The table of events has no column 'r'; it has i, t"),
        (pa.table([["a"], [1], [1], [2]], names=["i", "t", "r", "r"]), "has 2 columns 'r'"),
        (pa.table({"i": [["a"]], "t": [1], "r": [1]}), "column 'i' is of type list.*, which is no item"),
        ([*EVENTS, EVENTS[0] | {"i": None}], "The list of events, row 4: no item .* column 'i' holds nothing; mend the row"),
        ([*EVENTS, EVENTS[0] | {"u": ""}], "row 4: no user"),
        ([EVENTS[0] | {"t": "soon"}], "row 1: no time .* 't' holds 'soon'"),
        ([EVENTS[0] | {"t": datetime.time(5)}], "row 1: no time"),
        ([EVENTS[0] | {"t": 2**62}], "row 1: no time .* holds 4611686018427387904, too far from 1970"),
        ([EVENTS[0] | {"r": None}], "row 1: no number .* 'r' holds nothing; it is one of 0.5, 1"),
        ([EVENTS[0] | {"r": 5.5}], "row 1: no number .* holds 5.5"),
        ([EVENTS[0] | {"n": {"x": 1}}], "row 1: no text"),
        ([EVENTS[0] | {"i": b"\xff"}], "row 1: no item"),
        ("/nowhere/e.csv", "names no file of events"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(toy, events, words):
    with pytest.raises(ValueError, match=words) as caught:
        toy.read(events)
    assert "\n" not in str(caught.value)


def test_events_of_several_users_are_not_encoded_as_one(toy):
    with pytest.raises(ValueError, match="are of 2 users, such as '1' and '2'"):
        toy.encode([EVENTS[0], EVENTS[0] | {"u": 2}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": (Feature("item", "item", 5),)}, "the schema has 4 items and the catalogue 3"),
        (
            {"features": (Feature("item", "item", 4), Feature("stars", "ordinal", 9))},
            "'stars' is read from no column of numbers",
        ),
        ({"features": (Feature("item", "item", 4), Feature("rating", "ordinal", 9))}, "9 ids and levels up to 10"),
        ({"features": (Feature("item", "item", 4), Feature("genres", "multi", 3, 1))}, "'genres' has 1 columns, and 2"),
        ({"features": (Feature("item", "item", 4), Feature("genres", "multi", 2, 2))}, "2 ids for 2 names"),
        ({"features": (Feature("item", "item", 4), Feature("tags", "multi", 3, 2))}, "'tags' is no bag"),
        ({"features": (Feature("item", "item", 4), Feature("title", "text", 9))}, "'title' is read from no column of texts"),
        ({"features": (Feature("item", "item", 4), Feature("note", "text", 9, 1 << 20))}, "more than 65536"),
        ({"fields": Fields("u", "i", "t", timed=False)}, "'gap' needs times"),
        ({"fields": Fields("u", "i", "t", unit="")}, "the unit of times is not said"),
    ],
)
def test_parts_that_do_not_fit_one_another_are_refused(toy, change, words):
    if "features" in change:
        change = {"schema": Schema(change["features"])}
    else:
        change = {"fields": dataclasses.replace(change["fields"], numbers=toy.fields.numbers, texts=toy.fields.texts)}
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(toy, **change)


def parts(value, path=()):
    """Yield the paths of all parts of a value of JSON."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from parts(value[key], (*path, key))


def changed(value, path, part):
    if not path:
        return part
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], part)
    return copy


@pytest.mark.parametrize("part", [None, -1, 0, 10**400, 1.5, float("nan"), True, "", "x", [], ["x"], {}, {"x": 1}], ids=repr)
def test_hostile_json_is_refused_or_reads_events(toy, part):
    """Whatever part another value stands for, the vocabulary is refused in one sentence or holds together."""
    stored = json.loads(json.dumps(toy.to_json()))
    for path in parts(stored):
        try:
            vocabulary = Vocabulary.from_json(changed(stored, path, part), toy.catalogue)
            vocabulary.read([])
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
    for path in (("fields",), ("schema",), ("fields", "ticks_per_second")):
        with pytest.raises(ValueError):
            Vocabulary.from_json(changed(stored, path, part), toy.catalogue)


@pytest.mark.parametrize(
    ("path", "part", "words"),
    [
        (("name",), 3, "The vocabulary: 'name' is no text"),
        (("schema", 1, "kind"), "tensor", "feature 'rating' is of the unknown kind 'tensor'"),
        (("schema", 1, "size"), 0, "'schema' 2: 'size' is no positive whole number"),
        (("names", "genres"), ["x"], "names of categories are not those of the catalogue"),
        (("fields", "unit"), "weeks", "Unknown unit of times 'weeks'"),
        (("fields", "ties"), "any", "Unknown order of ties 'any'"),
        (("fields", "seed"), -1, "The seed of ties"),
        (("fields", "numbers", "rating", "edges"), [2, 1], "The edges of 'r' do not ascend"),
        (("fields", "numbers", "rating", "missing"), -1, "The level of a missing 'r'"),
        (("fields", "texts", "note", "html"), 1, "fields: 'note' 'html' is no true or false"),
    ],
)
def test_a_bad_value_of_json_is_named(toy, path, part, words):
    with pytest.raises(ValueError, match=words):
        Vocabulary.from_json(changed(toy.to_json(), path, part), toy.catalogue)
