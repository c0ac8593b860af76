"""Windows cover, packing keeps, iterators resume, processes share out, and examples agree with their timelines."""

import json
from collections import Counter
from itertools import islice, pairwise

import jax
import numpy as np
import pytest

from user_llm.data.pipeline import (
    ExampleConfig,
    Windows,
    contextual_batches,
    contextual_examples,
    history_batches,
    packed_text,
    packed_windows,
)
from user_llm.data.prompts.base import Lines
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.splits import leave_last_out
from user_llm.data.streams import Streams
from user_llm.data.tokenizer import train_bpe
from user_llm.tasks.next_item import NextItemExamples

LENGTHS = [0, 1, 2, 3, 6, 7, 9, 13, 14, 30, 41]  # of training; all sorts around a window of 5 inputs and beyond


@pytest.fixture(scope="module")
def unique(make_timelines):
    """Timelines of two more events than LENGTHS; item ids count on through all users and so tell user and position."""
    items = np.split(np.arange(1, sum(LENGTHS) + 2 * len(LENGTHS) + 1), np.cumsum(np.array(LENGTHS) + 2)[:-1])
    return make_timelines([row.tolist() for row in items])


def cut(windows, epoch):
    """All windows of an epoch."""
    found = (windows[epoch * len(windows) + slot] for slot in range(len(windows)))
    return [window for window in found if window is not None]


def inputs(windows):
    return Counter((w.user, t) for w in windows for t in range(w.start, w.stop))


@pytest.mark.parametrize("length", [1, 5, 12, 100])
def test_an_epoch_covers_every_pair_exactly_once(length):
    windows = Windows(np.array(LENGTHS), length, seed=0)
    every = {(user, t): 1 for user, stop in enumerate(LENGTHS) for t in range(stop - 1)}
    for epoch in range(4):
        found = cut(windows, epoch)
        assert inputs(found) == every
        assert all(0 < w.stop - w.start <= length for w in found)
        # The last next event is at `stop`, which training may use.
        assert all(w.stop < LENGTHS[w.user] for w in found)
    assert windows.total_inputs == len(every)


def test_the_grid_moves_from_epoch_to_epoch_and_by_seed():
    stops, length = np.array([101]), 10
    starts = lambda epoch, seed: tuple(w.start for w in cut(Windows(stops, length, seed), epoch))  # noqa: E731
    assert starts(0, seed=0) == starts(0, seed=0)
    assert len({starts(epoch, seed=0) for epoch in range(20)}) > 5
    assert len({starts(0, seed=seed) for seed in range(20)}) > 5
    # Over time a given event is seen with every amount of context.
    windows = (w for epoch in range(500) for w in cut(Windows(stops, length, 0), epoch))
    context = Counter(50 - w.start for w in windows if w.start <= 50 < w.stop)
    assert set(context) == set(range(length))
    assert min(context.values()) > 25


def place(timelines, event):
    """The user and position of an event."""
    user = int(timelines.users_of(event))
    return user, event - int(timelines.offsets[user])


def segments(batch):
    """Yield the columns of each segment of a packed batch."""
    for row in range(len(batch["segments"])):
        ids = batch["segments"][row]
        for segment in range(1, ids.max() + 1):
            yield row, np.flatnonzero(ids == segment)


@pytest.mark.parametrize("count", [1, 3])
def test_packing_keeps_windows_whole_and_streams_share_them(unique, count):
    stops, found = np.array(LENGTHS), Counter()
    options = {"window": 5, "rows": 3, "row_length": 12, "seed": 0}
    shares = [packed_windows(unique, stops, **options, stream=(index, count)) for index in range(count)]
    for batch in (batch for share in shares for batch in islice(share, 30 // count)):
        assert jax.tree.map(np.shape, batch) == {
            "events": (3, 12, 5), "next": (3, 12, 5), "segments": (3, 12), "positions": (3, 12),
        }  # fmt: skip
        assert all(array.dtype == np.int32 for array in batch.values())
        padding = batch["segments"] == 0
        assert not batch["events"][padding].any() and not batch["next"][padding].any()
        for row, columns in segments(batch):
            assert (np.diff(columns) == 1).all()
            np.testing.assert_array_equal(batch["positions"][row, columns], np.arange(len(columns)))
            first = int(batch["events"][row, columns[0], 0]) - 1  # row in the timelines' columns
            user, start = place(unique, first)
            stop = start + len(columns)
            np.testing.assert_array_equal(batch["events"][row, columns], unique.events(user, start, stop))
            np.testing.assert_array_equal(batch["next"][row, columns], unique.events(user, start + 1, stop + 1))
            assert stop < stops[user]
            found[user, start, stop] += 1
    windows, expected, epoch = Windows(stops, 5, 0), Counter(), 0
    first = Counter((w.user, w.start, w.stop) for w in cut(windows, 0))
    while expected.total() < found.total() + 8 * 3 * 12 * count:  # what is emitted and what may wait in bins
        expected.update((w.user, w.start, w.stop) for w in cut(windows, epoch))
        epoch += 1
    assert epoch > 3
    assert first <= found  # complete
    assert found <= expected  # disjoint


def test_rows_are_full_on_realistic_lengths(make_timelines):
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(75), 1.1, 500)), 20, 2_700).astype(int)  # like MovieLens: 35, 70, 162
    timelines = make_timelines([list(range(1, n + 1)) for n in lengths])
    stops = leave_last_out(timelines).train_stop
    for window, row_length in ((200, 200), (100, 100), (200, 512)):
        batches = islice(packed_windows(timelines, stops, window=window, rows=3, row_length=row_length, seed=0), 20)
        assert np.mean([batch["segments"] > 0 for batch in batches]) > 0.92


def test_rows_must_hold_a_window(unique):
    with pytest.raises(ValueError, match="Rows of 4 events cannot hold windows of 5"):
        packed_windows(unique, unique.lengths, window=5, rows=1, row_length=4, seed=0)


def test_packed_lines_are_kept_whole_and_long_ones_cut():
    lines = [np.arange(100 * i, 100 * i + n, dtype=np.int32) for i, n in enumerate([3, 5, 2, 40, 9, 6], 1)]
    found = set()
    for batch in islice(packed_text(lines, rows=2, row_length=12, seed=0), 30):
        for row, columns in segments(batch):
            tokens = batch["tokens"][row, columns]
            line = lines[tokens[0] // 100 - 1][:13]
            np.testing.assert_array_equal(tokens, line[:-1])
            np.testing.assert_array_equal(batch["next"][row, columns], line[1:])
            np.testing.assert_array_equal(batch["positions"][row, columns], np.arange(len(columns)))
            found.add(tokens[0] // 100)
    assert found == {1, 2, 3, 4, 5, 6}


@pytest.fixture(scope="module")
def make_prompts(unique, tmp_path_factory):
    tokenizer = train_bpe(unique.catalogue.titles, 300, tmp_path_factory.mktemp("bpe") / "tokenizer")

    def make(text_items=0):
        lines = Lines(tokenizer, unique.catalogue, max_title_tokens=16, history="titles", text_items=text_items)
        template = NextItem(lines, instruction="Films:", max_tokens=120)
        return tokenizer, NextItemExamples(template, unique, leave_last_out(unique))

    return make


@pytest.fixture(scope="module")
def make_examples(unique, make_prompts):
    def make(*, max_events, ends=1, text_items=0, batch_size=1, stream=(0, 1), seed=0):
        config, (_, prompts) = ExampleConfig(max_events, ends, text_items), make_prompts(text_items)
        stops = np.array(LENGTHS)
        examples = contextual_examples(unique, stops, prompts, config, seed=seed, stream=stream)
        return contextual_batches(examples, unique, batch_size)

    return make


def assert_equal(batch, other):
    assert jax.tree.structure(batch) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, batch, other)


@pytest.mark.parametrize("kind", ["packed", "contextual", "text"])
def test_the_iterator_resumes_exactly_in_mid_epoch(unique, make_examples, kind):
    def stream():
        if kind == "packed":
            return packed_windows(unique, np.array(LENGTHS), window=5, rows=2, row_length=12, seed=0)
        if kind == "text":
            lines = [np.arange(n, dtype=np.int32) for n in range(2, 40)]
            return packed_text(lines, rows=2, row_length=12, seed=0)
        return make_examples(max_events=5, ends=3, text_items=1, batch_size=4)

    for consumed in (0, 5):
        iterator = iter(stream())
        for _ in range(consumed):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = [next(iterator) for _ in range(4)]
        fresh = iter(stream())
        next(fresh)
        for resumed in (fresh, iterator):
            resumed.set_state(state)
            for batch in expected:
                assert_equal(next(resumed), batch)


def test_streams_are_disjoint_and_complete(make_examples):
    options = {"max_events": 50, "ends": 2, "text_items": 1}  # so long that each user with events is one window
    alone = list(islice(make_examples(**options), 30))
    for index in range(3):
        for mine, theirs in zip(make_examples(**options, stream=(index, 3)), alone[index::3], strict=False):
            assert_equal(mine, theirs)


def test_epochs_and_seeds_shuffle_anew(make_examples):
    options = {"max_events": 50, "ends": 2}
    order = lambda **seed: [int(b["events"][0, 0, 0]) for b in islice(make_examples(**options, **seed), 18)]  # noqa: E731
    first = order()
    assert sorted(first[:9]) == sorted(first[9:]) and len(set(first[:9])) == 9  # users with a next event
    assert first[:9] != first[9:]
    assert first == order()
    assert first != order(seed=1)


def titles_in(text, length, tokenizer):
    """Return the instruction and titles of a row of text."""
    return tokenizer.decode(text[:length]).split("\n")


@pytest.mark.parametrize("text_items", [0, 2])
def test_examples_agree_with_their_timelines(unique, make_prompts, make_examples, text_items):
    tokenizer, prompts = make_prompts()
    seen_ends = set()
    for batch in islice(make_examples(max_events=6, ends=3, text_items=text_items, batch_size=4), 40):
        assert jax.tree.map(np.shape, batch) == {
            "events": (4, 6, 5), "lengths": (4,), "prefix": (4, 3), "text": (4, 3, 120), "text_lengths": (4, 3),
            "answers": (4, 3, 1), "items": (4, 3, 1), "text_weight": {"next_item": (4,)},
        }  # fmt: skip
        for row in range(4):
            length = int(batch["lengths"][row])
            first = int(batch["events"][row, 0, 0]) - 1
            user, start = place(unique, first)
            np.testing.assert_array_equal(batch["events"][row, :length], unique.events(user, start, start + length))
            assert not batch["events"][row, length:].any()
            assert start + length < LENGTHS[user]
            prefix = batch["prefix"][row]
            real = prefix[prefix > 0]
            assert len(real) == min(length, 3) and (np.diff(real) > 0).all() and real[-1] <= length
            for k, end in enumerate(prefix):
                if not end:
                    assert not any(batch[name][row, k].any() for name in ("text", "text_lengths", "answers", "items"))
                    continue
                seen_ends.add(int(end))
                (item,), (answer,) = batch["items"][row, k], batch["answers"][row, k]
                assert item == unique.items(user, start + end, start + end + 1)[0]
                text, text_length = batch["text"][row, k], batch["text_lengths"][row, k]
                given = unique.items(user, max(start + end - text_items, 0), start + end)
                titles = [unique.catalogue.titles[i] for i in (*given, item)]
                assert titles_in(text, text_length, tokenizer) == ["Films:", *titles, ""]
                assert text[answer] == prompts.template.lines.end_id
                assert tokenizer.decode(text[answer + 1 : text_length]) == titles[-1] + "\n"
                assert not text[text_length:].any()
    assert seen_ends == {1, 2, 3, 4, 5, 6}


def test_without_an_encoder_every_title_after_the_first_is_an_answer(unique, make_prompts, make_examples):
    tokenizer, prompts = make_prompts()
    for batch in islice(make_examples(max_events=0, text_items=4, ends=3, batch_size=4), 20):
        assert jax.tree.map(np.shape, batch) == {
            "prefix": (4, 1), "text": (4, 1, 120), "text_lengths": (4, 1), "answers": (4, 1, 4), "items": (4, 1, 4), "text_weight": {"next_item": (4,)},
        }  # fmt: skip
        assert not batch["prefix"].any()
        columns = (batch[name][:, 0] for name in ("text", "text_lengths", "answers", "items"))
        for text, length, answers, items in zip(*columns, strict=True):
            real = items[items > 0]
            assert 1 <= len(real) <= 4 and (items[: len(real)] > 0).all()
            assert (np.diff(real) == 1).all() and len(set(unique.users_of(np.array([real[0] - 2, *(real - 1)])))) == 1
            titles = [unique.catalogue.titles[i] for i in (real[0] - 1, *real)]
            assert titles_in(text, length, tokenizer) == ["Films:", *titles, ""]
            for (begin, end), title in zip(pairwise([*answers[: len(real)], length - 1]), titles[1:], strict=True):
                assert text[begin] == prompts.template.lines.end_id
                assert tokenizer.decode(text[begin + 1 : end]) == title


@pytest.mark.parametrize("max_events", [1, 4, 100])
def test_history_batches_end_right_before_their_targets(unique, max_events):
    users, positions = leave_last_out(unique).targets["test"]
    users, positions = users[::-1], positions[::-1]
    found = []
    for indices, batch in history_batches(unique, users, positions, max_events=max_events, batch_size=4, bucket=8):
        assert batch.events.shape[0] == 4 and batch.events.shape[1] % 8 == 0
        assert batch.count == len(indices)
        found.extend(indices)
        for row in range(4):
            index = indices[min(row, batch.count - 1)]  # padding repeats the last user
            user, position, length = users[index], positions[index], min(positions[index], max_events)
            assert (batch.users[row], batch.positions[row], batch.lengths[row]) == (user, position, length)
            assert batch.targets[row] == unique.items(user, position, position + 1)[0]
            np.testing.assert_array_equal(batch.events[row, :length], unique.events(user, position - length, position))
            assert not batch.events[row, length:].any()
            assert set(batch.seen[row]) - {0} == set(unique.items(user, 0, position))
    assert sorted(found) == list(range(len(users)))


@pytest.mark.slow
def test_batches_do_not_depend_on_who_reads_the_streams(unique):
    """One process with four streams, two with two each, four with one: the same rows, the dataset once in each epoch."""
    stops = np.array(LENGTHS)

    def reader(numbers):
        make = lambda n: packed_windows(unique, stops, window=50, rows=2, row_length=50, seed=0, stream=(n, 4))  # noqa: E731
        return iter(Streams({n: make(n) for n in numbers}))

    alone = reader(range(4))
    whole = [next(alone) for _ in range(3)]
    readers = [reader([n]) for n in range(4)]
    for batch in whole:
        parts = [next(each) for each in readers]
        assert_equal(jax.tree.map(lambda *a: np.concatenate(a), *parts), batch)
    # Two go on from where one stopped, and one from where two stopped.
    state = json.loads(json.dumps(alone.get_state()))
    expected = [next(alone) for _ in range(3)]
    two = [reader((0, 1)), reader((2, 3))]
    for each in two:
        each.set_state(state)
    for batch in expected:
        assert_equal(jax.tree.map(lambda *a: np.concatenate(a), *[next(each) for each in two]), batch)
    after, again = alone.get_state(), reader(range(4))
    again.set_state({number: place for each in two for number, place in each.get_state().items()})
    assert again.get_state() == after
    with pytest.raises(ValueError, match="holds 2 streams of data and not number 2: set data.streams to 2"):
        again.set_state(two[0].get_state())
