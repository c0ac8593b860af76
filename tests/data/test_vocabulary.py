"""A vocabulary by hand: what it reads of events of every form, what it refuses, and how it is stored."""

import dataclasses
import datetime
import json

import numpy as np
import pyarrow as pa
import pytest

from user_llm.data.fields import Fields, Number, Text
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import GAP_BUCKETS, Catalogue
from user_llm.data.vocabulary import Vocabulary

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
    found = toy.read([EVENTS[0] | {"n": "A <i>b</i> c"}, *EVENTS[1:]])
    read, unknown = found.timelines, found.unknown
    np.testing.assert_array_equal(
        toy.encode(EVENTS),
        [[3, 1, 0, 0, 0, 0, 1], [1, 6, 1, 2, 0, 0, 2 + 1], [2, 10, 2, 0, 0, 0, 2 + 6]],
    )
    assert read.columns["note"].tolist() == ["", "A b c", ""] and read.columns["rating"].tolist() == [1, 6, 10]
    assert read.ticks.tolist() == [98_000, 100_000, 200_500] and read.columns["timestamp"][-1] == 200.5
    assert read.user_keys == ["1"] and unknown.tolist() == [0]


def test_a_table_of_pandas_may_mix_types(toy):
    pandas = pytest.importorskip("pandas")
    np.testing.assert_array_equal(toy.encode(pandas.DataFrame(EVENTS, index=["x", "y", "z"])), toy.encode(EVENTS))


def test_a_dictionary_of_views_is_read(toy):
    items = pa.DictionaryArray.from_arrays([0, 1, 0], pa.array(["a", "b"], pa.string_view()))
    assert toy.encode(pa.table({"i": items, "t": [5, 7, 9], "r": [1, 2, 3]}))[:, 0].tolist() == [1, 2, 1]


def test_unknown_items_are_counted_and_left_out(toy):
    more = [{"u": 2, "i": "new", "t": 5, "r": 1}, {"u": 1, "i": "A", "t": 150, "r": 1}, {"u": 1, "i": "A", "t": 150, "r": 1}]
    found = toy.read([*EVENTS, *more])
    read, unknown = found.timelines, found.unknown
    assert read.user_keys == ["1", "2"] and read.lengths.tolist() == [3, 0] and unknown.tolist() == [1, 1]
    assert (np.diff(found.unknown_offsets) == 1).all() and len(found.unknown_ticks) == 2
    np.testing.assert_array_equal(read.features(np.arange(3)), toy.encode(EVENTS))


def test_the_same_event_counts_once_in_whatever_spelling(toy):
    twice = [EVENTS[1] | {"t": 98}, EVENTS[1] | {"t": "98.0"}, EVENTS[0] | {"r": 1}, *EVENTS]
    read = toy.read([*EVENTS, *twice]).timelines
    np.testing.assert_array_equal(read.features(np.arange(len(read.item))), toy.encode(EVENTS))  # the first one's rating


def test_no_events_and_no_users(toy):
    assert toy.encode([]).shape == (0, 7)
    found = toy.read([])
    read, unknown = found.timelines, found.unknown
    assert len(read) == 0 and len(unknown) == 0
    alone = [{key: value for key, value in event.items() if key != "u"} for event in EVENTS]
    assert toy.read(alone).timelines.user_keys == [""]
    np.testing.assert_array_equal(toy.encode(alone), toy.encode(EVENTS))


def test_users_that_only_later_lines_name_are_refused(toy, tmp_path):
    lines = [json.dumps({"i": "a", "t": 1, "r": 1})] * 1000 + [json.dumps({"u": 5, "i": "a", "t": 1, "r": 1})]
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="e.jsonl, row 1: no user .* holds nothing"):
        toy.read(str(tmp_path / "e.jsonl"))
    (tmp_path / "e.jsonl").write_text("\n".join(lines[:-1]))
    assert toy.encode(tmp_path / "e.jsonl").shape == (1, 7)


def test_orders_too_large_for_their_ticks_are_refused(toy):
    schema = Schema(tuple(feature for feature in toy.schema if feature.kind != "time"))
    ordered = dataclasses.replace(toy, schema=schema, fields=dataclasses.replace(toy.fields, timed=False))
    assert ordered.encode([]).shape == (0, 6)
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
        ([{"u": 1, "i": "a", "r": 2}], "The list of events has no column 't'; it has 'u', 'i', 'r'"),
        (pa.table({"i": ["a"], "t": [1]}), "The table of events has no column 'r'; it has 'i', 't'"),
        (pa.table([["a"], [1], [1], [2]], names=["i", "t", "r", "r"]), "has 2 columns 'r'"),
        (pa.table({"i": [["a"]], "t": [1], "r": [1]}), "column 'i' is of type list.*, which is no item"),
        (pa.table({"i": pa.RunEndEncodedArray.from_arrays([1], pa.array(["a"], pa.string_view())), "t": [1], "r": [1]}), "no item"),
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


@pytest.mark.parametrize(
    "part", [None, -1, 0, 10**400, 1.5, float("nan"), True, "", "x", [], ["x"], {}, {"x": 1}], ids=lambda part: repr(part)[:9]
)
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
