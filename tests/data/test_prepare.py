"""From pieces to timelines: duplicates, numbering, order, users that span pieces, faults in a reader's own words."""

import numpy as np
import pytest
from etils import epath

from user_llm.data import prepare, raw
from user_llm.data.raw import Raw, pieces
from user_llm.data.timelines import word_ids

ROWS = [  # user, item, time, stars, text
    ("u10", "b", 5, 1, "Bad"),
    ("9", "10", 7, 5, "good, good"),
    ("u10", "b", 5, 4, "Bad again"),  # a duplicate: the first counts
    ("9", "9", 3, 2, ""),
    ("10", "b", 1, 3, "so so"),
    ("u10", "9", 6, 5, "zoë 漢字"),
]
ITEMS = [("b", "Bread", ["food"]), ("9", None, []), ("b", "Broom", ["tools"]), ("unseen", "Unseen", ["none"])]


@pytest.fixture
def make_raw(tmp_path):
    """Return `make(rows, **changes)`: a dataset of these rows."""

    def make(rows=ROWS, **changes) -> Raw:
        (tmp_path / "file").write_text(repr(rows))
        whole = lambda: ((user, item, time, 0, *rest) for user, item, time, *rest in rows)  # noqa: E731
        found = Raw(
            name="toy", files=(epath.Path(tmp_path / "file"),), events=lambda: pieces(whole(), found.event_schema),
            items=lambda: pieces(iter(ITEMS), found.item_schema), ordinals={"stars": 5}, texts=("text",), bags=("kinds",),
            **changes,
        )  # fmt: skip
        return found

    return make


@pytest.mark.parametrize("rows", [1, 2, 50_000])
def test_events_become_timelines(make_raw, tmp_path, monkeypatch, rows):
    """Whatever the size of the pieces, in which users begin and end, and if there are more files than records."""
    monkeypatch.setattr(prepare, "SHARD", 1)
    monkeypatch.setattr(raw, "ROWS", rows)
    monkeypatch.setattr(prepare, "ROWS", rows)
    timelines = prepare.load(make_raw(), tmp_path / "prepared", min_events=1)
    # Ids that are numbers come first and in their order.
    assert timelines.user_keys == ["9", "10", "u10"]
    assert timelines.catalogue.keys == ["", "9", "10", "b"]
    assert timelines.catalogue.titles == ["", "9", "10", "Bread"]
    np.testing.assert_array_equal(timelines.offsets, [0, 2, 3, 5])
    np.testing.assert_array_equal(timelines.item, [1, 2, 3, 3, 1])
    np.testing.assert_array_equal(timelines.columns["timestamp"], [3, 7, 1, 5, 6])
    np.testing.assert_array_equal(timelines.columns["stars"], [2, 5, 3, 1, 5])
    assert timelines.columns["text"].tolist() == ["", "good, good", "so so", "Bad", "zoë 漢字"]
    assert timelines.catalogue.vocab == {"kinds": ["", "food"]}
    np.testing.assert_array_equal(timelines.catalogue.multi["kinds"], [[0], [0], [0], [1]])
    assert timelines.facts == {
        "rows": 6, "duplicates_dropped": 1, "users_before_min_events": 3, "bad_rows_left_out": 0, "time_unit": "s",
        "ticks_per_second": 1, "events_before_1970": 0, "events_after_2100": 0, "times_rounded": 0,
    }  # fmt: skip
    assert [(f.name, f.kind, f.size) for f in timelines.schema] == [
        ("item", "item", 4), ("stars", "ordinal", 6), ("kinds", "multi", 2), ("text", "text", 4096), ("gap", "time", 28),
    ]  # fmt: skip


def test_records_hold_whole_users_and_files_whole_records(make_raw, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ROWS", 10)
    monkeypatch.setattr(prepare, "SHARD", 2)
    rows = [(str(user), str(item), item, 1, "") for user in range(100, 130) for item in range(user % 7)]
    builder = prepare.prepare(make_raw(rows), tmp_path / "prepared")
    source = builder.as_data_source(split="train")
    records = [source[i] for i in range(len(source))]
    assert 3 < len(builder.info.splits["train"].shard_lengths) < len(records) < 20
    users = [user for record in records for user in record["user"].decode().split(prepare.SEPARATOR)]
    assert users == [str(user) for user in range(100, 130) if user % 7]
    for record in records:
        assert sum(record["events"]) == len(record["item"]) < 20


def test_separators_in_texts_do_no_harm(make_raw, tmp_path):
    texts = [f"one{prepare.SEPARATOR}two", f"{prepare.ESCAPE}1{prepare.SEPARATOR}0", prepare.ESCAPE * 2, "", "0"]
    rows = [(f"u{text}", "b", time, 1, text) for text in texts for time in range(3)]
    timelines = prepare.load(make_raw(rows), tmp_path / "prepared")
    assert sorted(timelines.user_keys) == sorted(f"u{text}" for text in texts)
    for user, key in enumerate(timelines.user_keys):
        assert timelines.columns["text"][timelines.offsets[user] : timelines.offsets[user + 1]].tolist() == [key[1:]] * 3


def test_an_order_is_no_time(make_raw, tmp_path):
    timelines = prepare.load(make_raw(timed=False), tmp_path / "prepared", min_events=1)
    assert "timestamp" not in timelines.columns and "gap" not in timelines.schema.names
    np.testing.assert_array_equal(timelines.item, [1, 2, 3, 3, 1])


def test_what_a_reader_refuses_is_said_in_its_words_and_leaves_nothing(make_raw, tmp_path):
    def rows():
        yield ROWS[0]
        raise ValueError("file, line 2: bad")

    class Faulty(list):
        __iter__ = lambda self: rows()  # noqa: E731

    with pytest.raises(ValueError, match="^file, line 2: bad"):
        prepare.load(make_raw(Faulty()), tmp_path / "prepared")
    assert not list((tmp_path / "prepared").rglob("*.array_record*")) and not list((tmp_path / "prepared").rglob("*.duckdb"))


def test_no_events_and_no_long_users_are_refused(make_raw, tmp_path):
    with pytest.raises(ValueError, match="holds no events"):
        prepare.load(make_raw([]), tmp_path / "prepared")
    with pytest.raises(ValueError, match="No user in .* has 3 events"):
        prepare.load(make_raw(), tmp_path / "prepared")


def test_words_of_a_text_by_checksum():
    texts = np.array(["Good, good DAY today", "", "good"], np.dtypes.StringDType())
    ids = word_ids(texts, 100, 3)
    assert ids.shape == (3, 3) and ids.max() < 100
    assert ids[0, 0] == ids[0, 1] == ids[2, 0] > 0 and ids[0, 2] not in (0, ids[0, 0])
    np.testing.assert_array_equal(ids[1], 0)
    np.testing.assert_array_equal(ids[2, 1:], 0)
