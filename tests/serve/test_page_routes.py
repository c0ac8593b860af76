"""What the page is told: what the model reads, sample users whom it can read, and the items that a search finds."""

import dataclasses
import datetime

import pyarrow as pa
import pytest

from user_llm.data.fields import Fields, Number, Text
from user_llm.data.vocabulary import Vocabulary
from user_llm.serve.page_routes import EVENTS, columns, samples, search
from user_llm.serve.users import readable

NOW = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
RATING = Number.of_scale("stars", range(1, 11))


@pytest.fixture(scope="module")
def vocabulary(make_timelines):
    """Return `make(**fields)`: a vocabulary of 9 items with these fields; each item has one or two of 4 genres."""
    timelines = make_timelines([[1, 2]], num_items=9)

    def make(**fields) -> Vocabulary:
        return Vocabulary.of(dataclasses.replace(timelines, fields=Fields(**{"numbers": {"rating": RATING}} | fields)))

    return make


def test_the_columns_of_events(vocabulary):
    of = vocabulary(
        user="u", item="i", time="t", unit="ms", texts={"note": Text("said")},
        numbers={"rating": RATING, "hours": Number("hours", (1.0, 5.0), missing=1)},
    )  # fmt: skip
    assert columns(of) == {
        "user": "u", "item": "i", "time": "t", "timed": True, "unit": "ms", "texts": ["said"],
        "numbers": [
            {"column": "stars", "allowed": [float(n) for n in range(1, 11)], "required": True, "high": 10.0},
            {"column": "hours", "allowed": [], "required": False, "high": 5.0},
        ],
    }  # fmt: skip


def test_a_sample_user_for_each_of_the_largest_categories(vocabulary):
    made = samples(vocabulary(), NOW)
    # Items 2, 4, 6 and 8 are of War; Action has 3, 6 and 9, Comedy 1, 4 and 7, Drama 2, 5 and 8.
    assert [sample["name"] for sample in made] == ["War", "Action", "Comedy", "Drama"]
    assert [[event["item"] for event in sample["events"]] for sample in made] == [
        ["20", "40", "60", "80"], ["30", "60", "90"], ["10", "40", "70"], ["20", "50", "80"],
    ]  # fmt: skip
    assert made[1]["events"][-2:] == [
        {"item": "60", "timestamp": "2024-04-30T12:00:00+00:00", "stars": 10.0},
        {"item": "90", "timestamp": "2024-05-01T12:00:00+00:00", "stars": 10.0},
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"unit": "ms", "ticks_per_second": 1000},
        {"unit": "YYYYMMDD"},
        {"item": "user", "user": "item"},
        {"numbers": {"rating": Number("stars", (0.5, 2.0))}},
        {"numbers": {"rating": Number("stars", missing=1)}, "texts": {"note": Text("said")}},
    ],
)
def test_the_model_reads_its_sample_users(vocabulary, fields):
    of = vocabulary(**fields)
    for sample in samples(of, NOW):
        found = readable(of, sample["events"], "page-1", None, 1 << 16)
        assert not found.refused and not found.unknown and len(found.events["page-1"]) == len(sample["events"])


def test_sample_users_of_orders_without_categories(vocabulary):
    whole = vocabulary()
    schema = dataclasses.replace(whole.schema, features=tuple(f for f in whole.schema if f.kind not in ("multi", "time")))
    catalogue = dataclasses.replace(whole.catalogue, multi={}, vocab={})
    of = Vocabulary("toy", schema, catalogue, Fields(timed=False, unit="", numbers={"rating": RATING}))
    (sample,) = samples(of, NOW)
    assert [event["timestamp"] for event in sample["events"]] == list(range(1, EVENTS + 1))
    items = [event["item"] for event in sample["events"]]
    assert len(set(items)) == EVENTS and (items[0], items[-1]) == ("10", "90")
    assert not readable(of, sample["events"], "page-1", None, 1 << 16).refused


def test_search_of_titles():
    titles = pa.array(["The Last Star", "Starlight", "Über (star)", "100% STAR", "star", "Night"])
    assert search(titles, "star", 10) == [2, 5, 1, 3, 4]  # those that begin so are first
    assert search(titles, "STAR", 2) == [2, 5]
    assert search(titles, "über", 10) == [3]
    assert search(titles, "%", 10) == [4] and search(titles, "(star)", 10) == [3]  # a text, and no pattern
    assert search(titles, "absent", 10) == [] and search(titles, "", 2) == [1, 2]


def test_titles_by_id(vocabulary):
    assert vocabulary().title("30") == "Film 3 (2000)"
    assert vocabulary().title("") is None and vocabulary().title("31") is None
