"""Timelines that are mapped from files, against a plain reference in memory; other protocols, altered files, names, and orders."""

import dataclasses
import hashlib
import re
import subprocess
import sys
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from user_llm.data import loading, prepare
from user_llm.data.audits import audit
from user_llm.data.pipeline import history_batches, packed_windows
from user_llm.data.raw import Raw, pieces
from user_llm.data.splits import global_time, leave_last_out, quantile, train_counts
from user_llm.data.timelines import chunks

ROOT = Path(__file__).parents[2]
WORDS = ["good", "Bad", "", "zoë", "漢字", "so-so fine", "a b c d e f g h i j"]


def random_rows(count=600, seed=0):
    """Events of 40 users at 12 moments: many ties, in no order, and none twice."""
    rng = np.random.default_rng(seed)
    names = [str(n) if n % 3 else f"u{n}" for n in range(1, 41)]
    rows = {}
    while len(rows) < count:
        user, item, time = names[int(40 * rng.random() ** 2)], f"i{rng.integers(30)}", int(rng.integers(12)) * 50 - 100
        rows[user, item, time] = (user, item, time, int(rng.integers(1, 6)), " ".join(rng.choice(WORDS, 2)).strip())
    return list(rows.values())


@pytest.fixture(scope="module")
def rows():
    return random_rows()


@pytest.fixture(scope="module")
def prepared(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return make_raw(folder, rows), folder / "data"


def make_raw(folder, rows, **changes):
    (folder / "file").write_text(repr(rows))
    items = [(f"i{n}", f"Item {n}", [["x", "y", "z"][n % 3]] * (n % 5 > 0)) for n in range(30)]
    raw = Raw(
        name="toy", files=(epath.Path(folder / "file"),), events=lambda: pieces(((*row[:3], 0, *row[3:]) for row in rows), raw.event_schema),
        items=lambda: pieces(iter(items), raw.item_schema),
        **({"ordinals": {"stars": 5}, "texts": ("text",), "bags": ("kinds",)} | changes),
    )  # fmt: skip
    return raw


MASK = 2**64 - 1


def hashed(user, item, seed):
    key = int(user) if user.isdecimal() else int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big")
    z = (key * 0x9E3779B97F4A7C15 + item) & MASK
    z = (z * 0xD1B54A32D192ED03 + seed) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & MASK
    return z ^ (z >> 31)


def reference(rows, ties, seed, min_events):
    """Return each user's events in order, as (item, stars, kinds, words, gap) and their times: one dict, no arrays."""
    key = lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)  # noqa: E731
    number = {item: n for n, item in enumerate(sorted({row[1] for row in rows}, key=key), 1)}
    kinds = {f"i{n}": n % 3 + 1 if n % 5 else 0 for n in range(30)}
    out = {}
    for user in sorted({row[0] for row in rows}, key=key):
        events = [row for row in rows if row[0] == user]
        if len(events) < min_events:
            continue
        tie = (lambda row: hashed(user, number[row[1]], seed)) if ties == "hashed" else (lambda row: 0)  # noqa: B023
        events.sort(key=lambda row: (row[2], tie(row)))  # noqa: B023
        features, before = [], events[0][2]
        for _, item, time, stars, text in events:
            words = [1 + zlib.crc32(word.encode()) % 4095 for word in re.findall(r"\w+", text.lower())[:8]]
            gap = time - before
            features.append(
                [number[item], stars, kinds[item], *words, *[0] * (8 - len(words)), 1 + gap.bit_length() if gap else 1]
            )
            before = time
        out[user] = features, [row[2] for row in events], [row[4] for row in events]
    return out


@pytest.mark.parametrize(
    ("ties", "seed", "min_events", "chunk"),
    [("hashed", 0, 3, 50), ("hashed", 5, 1, 1), ("hashed", 5, 16, 1 << 18), ("file", 5, 3, 50)],
)
def test_timelines_equal_the_reference(rows, prepared, tmp_path, monkeypatch, ties, seed, min_events, chunk):
    monkeypatch.setattr("user_llm.data.timelines.CHUNK", chunk)
    monkeypatch.setattr(prepare, "ROWS", 100)  # several records
    raw, _ = prepared
    timelines = prepare.load(raw, tmp_path, ties=ties, seed=seed, min_events=min_events)
    expected = reference(rows, ties, seed, min_events)
    assert timelines.user_keys == list(expected) and 3 < len(expected) <= 40
    assert sum(chunk.last - chunk.first for chunk in timelines.chunks()) == len(expected)
    for user, (features, times, texts) in enumerate(expected.values()):
        stretch = slice(timelines.offsets[user], timelines.offsets[user + 1])
        np.testing.assert_array_equal(timelines.events(user, 0, len(features)), features)
        np.testing.assert_array_equal(timelines.events(user, 1, 3), features[1:3])
        np.testing.assert_array_equal(timelines.columns["timestamp"][stretch], times)
        assert timelines.columns["text"][stretch].tolist() == texts
        np.testing.assert_array_equal(timelines.items(user, 0, 3), [row[0] for row in features[:3]])


def test_protocols_share_the_columns(prepared):
    raw, folder = prepared
    one, two = (prepare.load(raw, folder, seed=seed) for seed in (1, 2))
    assert (one.item[:] != two.item[:]).any()
    names = sorted(path.parent.name for path in folder.rglob("columns.json"))
    assert names == ["columns", "order-hashed-1-3", "order-hashed-2-3", "words-4096-8"]
    orders = [path.stat().st_size for path in folder.rglob("order-*/rows")]
    assert orders == [4 * len(one.item)] * 2


@pytest.mark.parametrize("name", ["columns/item", "columns/text_0.utf8", "order-hashed-0-3/rows", "words-4096-8/text_0"])
def test_altered_files_are_made_again(prepared, tmp_path, caplog, name):
    raw, _ = prepared
    whole = prepare.load(raw, tmp_path)
    items, texts = np.asarray(whole.item), whole.columns["text"].tolist()
    (path,) = tmp_path.rglob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    again = prepare.load(raw, tmp_path)
    assert f"{path} is not as it was written" in caplog.text
    np.testing.assert_array_equal(again.item, items)
    assert again.columns["text"].tolist() == texts


def test_unknown_ties_are_refused_before_anything_is_written(prepared, tmp_path):
    raw, folder = prepared
    with pytest.raises(ValueError, match=r"Unknown order of ties '\.\./x': choose hashed or file"):
        prepare.load(raw, folder, ties="../x")


def test_columns_may_have_the_names_of_ours(rows, tmp_path):
    names = {"gap": 5, "timestamp": 5, "kinds": 5}
    wide = [(user, item, time, stars, stars, stars, text) for user, item, time, stars, text in rows]
    timelines = prepare.load(make_raw(tmp_path, wide, ordinals=names), tmp_path / "data")
    expected = reference(rows, "hashed", 0, 3)
    stars = [row[1] for features, *_ in expected.values() for row in features]
    times = [time for _, of_user, _ in expected.values() for time in of_user]
    assert timelines.schema.names == ("item", "gap", "timestamp_2", "kinds_2", "kinds", "text", "gap_2")
    for name in ("gap", "timestamp_2", "kinds_2"):
        np.testing.assert_array_equal(timelines.columns[name], stars)
    np.testing.assert_array_equal(timelines.columns["timestamp"], times)
    audit(timelines, leave_last_out(timelines))


def test_names_that_are_taken_get_a_number(tmp_path):
    raw = make_raw(tmp_path, [], ordinals=dict.fromkeys(("item", "item_2", "kinds", "a'); --"), 5), texts=("a'); --", "user"))
    numbers, texts = loading._names(raw)
    assert numbers == {"item_2": "level_0", "item_2_2": "level_1", "kinds_2": "level_2", "a'); --": "level_3"}
    assert texts == {"a'); --_2": "text_0", "user": "text_1"}


def test_ticks_are_finer_than_seconds(tmp_path):
    """A thousand ticks a second: the order is exact, gaps are whole seconds, and the audit takes near events for two."""
    base = 1_600_000_000_000
    ticks = [base, base + 1, base + 999, base + 1000, base + 1999, base + 4000]
    near = [("u", "i1", time, 1, "") for time in reversed(ticks)]
    timelines = prepare.load(make_raw(tmp_path, near, unit="ms"), tmp_path / "data")
    np.testing.assert_array_equal(timelines.columns["timestamp"], np.array(ticks) / 1000)
    assert timelines.columns["timestamp"].dtype == np.float64
    np.testing.assert_array_equal(timelines.events(0, 0, 6)[:, -1], [1, 1, 1, 1, 1, 3])  # 2.001 s are 2 s: bucket 3
    assert audit(timelines, leave_last_out(timelines))["tie_share"] == 0


def test_an_item_may_come_again_where_only_the_order_is_known(tmp_path):
    repeated = [("u", "i1", order, 1, "") for order in range(5)]
    timelines = prepare.load(make_raw(tmp_path, repeated, timed=False), tmp_path / "data")
    assert "timestamp" not in timelines.columns and timelines.ordered
    assert audit(timelines, leave_last_out(timelines))["events"] == 5


@pytest.mark.parametrize("kind", ["int", "float", "equal"])
def test_quantiles_without_a_sort(make_timelines, kind):
    rng = np.random.default_rng(0)
    times = {"int": rng.integers(-(2**62), 2**62, 999), "float": rng.normal(0, 1e9, 999), "equal": np.full(999, -7)}[kind]
    timelines = dataclasses.replace(make_timelines([[1] * 333] * 3), columns={"timestamp": times})
    for share in (0.0, 0.001, 0.5, 0.9, 0.95, 1.0):
        assert quantile(timelines, share) == np.sort(times)[int(np.ceil(share * 998))]


def test_what_is_counted_does_not_depend_on_chunks(prepared, monkeypatch):
    raw, folder = prepared
    timelines, results = prepare.load(raw, folder), []
    for chunk in (1, 33, 1 << 18):
        monkeypatch.setattr("user_llm.data.timelines.CHUNK", chunk)
        splits = leave_last_out(timelines), global_time(timelines)
        results.append([(audit(timelines, s), train_counts(timelines, s).tolist(), s.train_stop.tolist()) for s in splits])
    assert results[0] == results[1] == results[2]


def test_chunks_hold_whole_users():
    offsets = np.array([0, 3, 3, 5, 30, 31, 32, 32])
    found = [(chunk.first, chunk.last, chunk.events) for chunk in chunks(offsets, 5)]
    assert found == [(0, 3, slice(0, 5)), (3, 4, slice(5, 30)), (4, 7, slice(30, 32))]


def test_seen_items_are_no_more_than_the_catalogue(make_timelines):
    timelines = make_timelines([[1, 2, 3] * 1000, [2, 1, 3]])
    users, positions = leave_last_out(timelines).targets["test"]
    ((_, batch),) = history_batches(timelines, users, positions, max_events=10, batch_size=2)
    assert batch.seen.shape == (2, 4)
    assert [sorted({*row} - {0}) for row in batch.seen.tolist()] == [[1, 2], [1, 2, 3]]


def test_batches_of_mapped_timelines_are_those_of_arrays(prepared):
    raw, folder = prepared
    mapped = prepare.load(raw, folder)
    plain = dataclasses.replace(
        mapped, item=np.asarray(mapped.item), columns={name: np.asarray(column) for name, column in mapped.columns.items()},
        ticks=None, words={}, user_keys=list(mapped.user_keys), offsets=mapped.offsets.copy(),
    )  # fmt: skip
    stops = leave_last_out(mapped).train_stop
    options = {"window": 6, "rows": 3, "row_length": 12, "seed": 0}
    pairs = zip(*(packed_windows(timelines, stops, **options) for timelines in (mapped, plain)), strict=True)
    for one, other in islice(pairs, 20):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


LOADS = """
import sys
sys.path.insert(0, "tests/data")
from pathlib import Path
from test_loading import make_raw, random_rows
from user_llm.data import loading, prepare
folder = Path(sys.argv[1])
print(int(prepare.load(make_raw(folder, random_rows()), folder / "data").item[:].sum()))
"""


@pytest.mark.slow  # half a minute of imports; test_mapped.py has the same of the files alone
def test_two_processes_open_at_once(rows, tmp_path):
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    expected = sum(row[0] for features, *_ in reference(rows, "hashed", 0, 3).values() for row in features)
    assert [out.split()[-1] for out, _ in outputs] == [str(expected)] * 2, outputs
    assert not list(tmp_path.rglob("*.unfinished"))
