"""Your own events in every kind of file; what does not fit is explained."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from user_llm.data import prepare
from user_llm.data.event_files import Columns, find

ROWS = [
    {"who": 7, "what": "a", "when": 1_600_000_000, "name": "Apple", "kind": "fruit", "price": 1.5, "note": "fine"},
    {"who": 7, "what": "b", "when": 1_600_000_100, "name": "Bread", "kind": "bakery", "price": 2.5, "note": ""},
    {"who": 8, "what": "a", "when": 1_600_000_050, "name": "Apple", "kind": "fruit", "price": 1.5, "note": "again"},
    {"who": 7, "what": "a", "when": 1_600_000_200, "name": "Apple", "kind": "fruit", "price": None, "note": "more"},
]
COLUMNS = Columns(user="who", item="what", time="when", title="name", categories=("kind",), numbers=("price",), texts=("note",))


def _csv(rows) -> str:
    lines = [list(rows[0]), *([("" if v is None else str(v)) for v in row.values()] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


def _jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows):
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        return
    text = (_csv if ".csv" in path.suffixes else _jsonl)(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("name", ["e.parquet", "e.csv", "e.csv.gz", "e.jsonl", "e.jsonl.gz"])
@pytest.mark.parametrize("where", ["file", "folder", "glob"])
def test_every_kind_of_file_gives_the_same_timelines(tmp_path, name, where):
    folder = tmp_path / "events"
    folder.mkdir()
    write(folder / name, ROWS[:2])
    write(folder / f"f{name}", ROWS[2:])
    if where == "file":
        (folder / f"f{name}").unlink()
        write(folder / name, ROWS)
    source = {"file": folder / name, "folder": folder, "glob": folder / f"*{name[1:]}"}[where]
    timelines = prepare.load(find(str(source), COLUMNS, name="shop"), tmp_path / "prepared", min_events=1)
    assert timelines.name == "shop" and timelines.user_keys == ["7", "8"]
    np.testing.assert_array_equal(timelines.item, [1, 2, 1, 1])
    np.testing.assert_array_equal(timelines.columns["timestamp"][:3], [1_600_000_000, 1_600_000_100, 1_600_000_200])
    np.testing.assert_array_equal(timelines.columns["price"], [1, 2, 11, 1])  # two values, and one that is missing
    assert timelines.columns["note"].tolist() == ["fine", "", "more", "again"]
    assert timelines.catalogue.titles == ["", "Apple", "Bread"]
    assert timelines.catalogue.vocab == {"categories": ["", "bakery", "fruit"]}


@pytest.mark.parametrize(
    "times",
    [
        [1_600_000_000_000, 1_600_000_001_000, 1_600_000_002_000],
        ["2020-09-13 12:26:40", "2020-09-13 12:26:41", "2020-09-13 12:26:42"],
        ["2020-09-13T12:26:40", "2020-09-13T12:26:41", "2020-09-13T12:26:42"],
    ],
)
def test_times_in_milliseconds_or_as_text(tmp_path, times):
    write(tmp_path / "e.csv", [{"who": 1, "what": i, "when": time} for i, time in enumerate(times)])
    timelines = prepare.load(
        find(str(tmp_path / "e.csv"), Columns("who", "what", time="when"), name="t"), tmp_path / "prepared"
    )
    np.testing.assert_array_equal(timelines.columns["timestamp"], 1_600_000_000 + np.arange(3))


def test_many_values_become_equal_shares(tmp_path):
    write(tmp_path / "e.parquet", [{"who": 1, "what": i, "when": i, "price": i * i} for i in range(100)])
    columns = Columns("who", "what", order="when", numbers=("price",))
    timelines = prepare.load(find(str(tmp_path / "e.parquet"), columns, name="t"), tmp_path / "prepared")
    np.testing.assert_array_equal(np.bincount(timelines.columns["price"])[1:], [10] * 10)
    assert (np.diff(timelines.columns["price"]) >= 0).all() and "timestamp" not in timelines.columns


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (Columns("user", "what", time="when"), "has no column 'user'; it has 'who', 'what', 'when'"),
        (
            Columns("who", "what", time="when", numbers=("name",)),
            "e.csv, row 1: no number that can be read, as column 'name' holds 'Apple'; list columns of names under categories or texts",
        ),
    ],
)
def test_columns_that_do_not_fit_are_explained(tmp_path, columns, words):
    write(tmp_path / "e.csv", ROWS)
    with pytest.raises(ValueError, match=words):
        prepare.load(find(str(tmp_path / "e.csv"), columns, name="t"), tmp_path / "prepared")


def test_time_and_order_exclude_each_other():
    for both in ({}, {"time": "t", "order": "o"}):
        with pytest.raises(ValueError, match="Name one column of times .* or of the order"):
            Columns("who", "what", **both)


@pytest.mark.parametrize(
    ("column", "value", "words"), [("who", None, "user"), ("what", None, "item"), ("when", "soon", "time")]
)
def test_a_bad_row_is_named_by_file_and_row(tmp_path, column, value, words):
    rows = [*ROWS, {**ROWS[0], column: value}]
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.csv", rows)
    with pytest.raises(ValueError, match=rf"b\.csv, row 5: no {words} that can be read"):
        list(find(str(tmp_path), COLUMNS, name="t").events())


def test_no_file_and_files_of_two_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names no file of events"):
        find(str(tmp_path / "*.csv"), COLUMNS, name="t")
    for name in ("e.csv", "e.parquet"):
        write(tmp_path / name, ROWS)
    with pytest.raises(ValueError, match="holds files of several kinds"):
        find(str(tmp_path), COLUMNS, name="t")


def test_the_real_table_is_read_whole(data_dir, tmp_path):
    columns = Columns("user_id", "item_id", order="position", title="title")
    raw = find(str(data_dir / "events" / "video_games.parquet"), columns, name="video_games")
    assert sum(len(piece) for piece in raw.events()) == 440_264
    assert sum(len(piece) for piece in raw.items()) == 16_859


@pytest.mark.parametrize(
    ("times", "said"), [(("19844", "19845"), True), (("1700000000", "5"), False), (("1970-01-02", "1970-01-03"), False)]
)
def test_numbers_that_all_fall_into_1970_are_pointed_out(tmp_path, numbered, caplog, times, said):
    (tmp_path / "e.csv").write_text("u,i,t\n" + "".join(f"1,{k},{time}\n" for k, time in enumerate(times)))
    numbered(find(str(tmp_path / "e.csv"), Columns("u", "i", time="t"), name="case"))
    assert ("write them as dates" in caplog.text) == said
