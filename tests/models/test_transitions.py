"""Transitions against plain Python: what counts as a step, how items are scored, beside a model, with added items, and in a file."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import sparse

from user_llm.data.splits import leave_last_out, train_counts
from user_llm.models import transitions as module
from user_llm.models.export import TRANSITIONS_FILE, load_transitions, save_transitions
from user_llm.models.transitions import Transitions, count_steps, item_words, largest, last_items

ITEMS = 12
TITLES = ["", "Red Fox", "red dog", "Blue Whale", *(f"thing {n}" for n in range(4, ITEMS + 1))]
ENDS = np.array([0, 1, 2, 3] * 5)  # of the histories of 20 users


@pytest.fixture
def timelines(make_timelines):
    rng = np.random.default_rng(0)
    found = make_timelines(
        [rng.integers(1, ITEMS + 1, max(rng.integers(-2, 9), 3)).tolist() for _ in range(20)], num_items=ITEMS
    )
    genres = {"genres": np.arange(2 * (ITEMS + 1)).reshape(-1, 2) % 4}
    genres["genres"][0] = 0  # PAD
    return dataclasses.replace(found, catalogue=dataclasses.replace(found.catalogue, titles=TITLES, multi=genres))


@pytest.fixture
def graph(timelines):
    return Transitions.counted(timelines, leave_last_out(timelines))


@pytest.fixture
def last(timelines):
    return last_items(timelines, np.arange(20), ENDS)


def test_steps_are_those_within_one_user_in_training(make_timelines):
    timelines = make_timelines([[1, 2, 1, 2, 3, 4], [2, 2, 5, 1]], num_items=5)
    expected = np.zeros((6, 6))
    expected[1, 2], expected[2, 1], expected[2, 2] = 2, 1, 1  # the last two events of each user are for validation and test
    np.testing.assert_array_equal(count_steps(timelines, leave_last_out(timelines)).toarray(), expected)


def test_many_chunks_add_up(timelines, monkeypatch):
    split = leave_last_out(timelines)
    whole = count_steps(timelines, split).toarray()
    monkeypatch.setattr("user_llm.data.timelines.CHUNK", 7)
    np.testing.assert_array_equal(count_steps(timelines, split).toarray(), whole)


def test_the_last_items_are_those_before_the_end(make_timelines):
    timelines = make_timelines([[5, 6, 7], [1, 2, 3]], num_items=7)
    found = last_items(timelines, np.array([0, 1, 1, 1]), np.array([3, 0, 1, 2]))
    np.testing.assert_array_equal(found, [[7, 6], [0, 0], [1, 0], [2, 1]])


def expected_scores(timelines, history):
    """Score all items after a history in plain Python."""
    items = range(1, ITEMS + 1)
    steps = np.zeros((ITEMS + 1, ITEMS + 1))
    share = np.zeros(ITEMS + 1)
    for user, stop in enumerate(leave_last_out(timelines).train_stop):
        trained = timelines.items(user, 0, stop).tolist()
        for a, b in zip(trained, trained[1:], strict=False):
            steps[a, b] += 1
            steps[b, a] += 0.5
        for a in trained:
            share[a] += 1
    share /= share.sum()
    chance = steps / (steps.sum(1, keepdims=True) + 20)
    missing = 20 / (steps.sum(1) + 20)
    bags = [{*title.lower().split()} | {("genre", g) for g in row if g} for title, row in zip(TITLES, timelines.catalogue.multi["genres"].tolist(), strict=True)]  # fmt: skip
    rare = {word: np.log((2 + ITEMS) / (1 + sum(word in bag for bag in bags))) for bag in bags for word in bag}
    norm = [np.sqrt(sum(rare[word] ** 2 for word in bag)) for bag in bags]
    out = np.zeros(ITEMS + 1)
    for back, weight in ((1, 1.0), (2, 0.5)):
        if len(history) < back:
            out += share * (back == 1)
            continue
        last = history[-back]
        for item in items:
            two = sum(chance[last, mid] * chance[mid, item] for mid in items)
            alike = sum(rare[word] ** 2 for word in bags[last] & bags[item]) / (norm[last] * norm[item])
            out[item] += weight * (chance[last, item] + two + missing[last] * share[item] + 0.01 * alike)
    return out


def test_scores_are_those_of_plain_python(timelines, graph, last):
    """Of a history of one item there is none before the last, and without a history items are scored by popularity."""
    expected = [expected_scores(timelines, timelines.items(user, 0, end).tolist()) for user, end in enumerate(ENDS)]
    np.testing.assert_allclose(graph.scores(last)[:, 1:], np.array(expected)[:, 1:], rtol=1e-5)


def test_scores_of_many_items_are_computed_a_part_at_a_time(graph, last, monkeypatch):
    whole, rows, part = graph.scores(last), [], Transitions._scores
    monkeypatch.setattr(module, "ENTRIES", 3 * (ITEMS + 1))
    monkeypatch.setattr(Transitions, "_scores", lambda self, last: rows.append(len(last)) or part(self, last))
    np.testing.assert_array_equal(graph.scores(last), whole)
    assert rows == [3] * 6 + [2]


def test_of_an_item_with_many_steps_the_likeliest_are_kept_and_the_rest_goes_by_popularity(timelines, graph, monkeypatch):
    matrix = sparse.csr_array(np.array([[0.0, 3, 1, 2], [5, 0, 0, 0], [1, 1, 1, 0]]))
    expected = [[0, 3, 0, 2], [5, 0, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(largest(matrix, 2).toarray(), expected)
    assert matrix.nnz == 7  # the one that was given is as it was
    monkeypatch.setattr(module, "NEIGHBOURS", 1)
    few = Transitions.counted(timelines, leave_last_out(timelines))
    assert np.diff(few.chance.indptr).max() == 1 < np.diff(graph.chance.indptr).max()
    item = int(np.argmax(np.diff(graph.chance.indptr)))
    steps, nameless = few.chance.toarray(), dataclasses.replace(timelines.catalogue, titles=[""] * (ITEMS + 1), multi={})
    found = few.extended(nameless).scores(np.array([[item, 0]], np.int32))[0]
    np.testing.assert_allclose(found, steps[item] + steps[item] @ steps + (1 - steps[item].sum()) * few.share, rtol=1e-5)


def test_words_and_bags_make_vectors_of_length_one(timelines):
    words = item_words(timelines.catalogue, ITEMS + 1).toarray()
    np.testing.assert_allclose(np.linalg.norm(words[1:], axis=1), 1, atol=1e-6)
    nameless = dataclasses.replace(timelines.catalogue, titles=[""] * (ITEMS + 1), multi={})
    assert not item_words(nameless, ITEMS + 1).nnz


def test_beside_a_model_they_count_by_their_weighted_logarithm(graph, last, monkeypatch):
    """Rows without an item keep their scores, and what has no logarithm counts as 1e-7."""
    known = np.tile(np.array([0.0, 0.5, *[0.25] * (ITEMS - 1)], np.float32), (20, 1))
    monkeypatch.setattr(Transitions, "scores", lambda self, last: known)
    scores = np.concatenate([np.zeros((20, ITEMS + 1)), np.full((20, 1), 7), np.full((20, 1), -np.inf)], 1).astype(np.float32)
    alone, both = graph.sums(scores, last, (0.0, 2.0))
    np.testing.assert_array_equal(alone, scores)
    expected = [2 * np.log(1e-7), 2 * np.log(0.5), *[2 * np.log(0.25)] * (ITEMS - 1), 7, -np.inf]
    np.testing.assert_allclose(both, np.tile(expected, (20, 1)), rtol=1e-6)


def test_an_added_item_is_scored_by_the_least_share_and_its_words_and_changes_no_other_score(graph, timelines, last):
    first, old = ITEMS + 1, timelines.catalogue
    genres = np.concatenate([old.multi["genres"], [[0, 0], [2, 0]]])
    keys = [*old.keys, "a", "b"]
    larger = dataclasses.replace(old, titles=[*TITLES, "Red Fox", "thing"], keys=keys, multi={"genres": genres})
    grown = graph.extended(larger)
    scores = grown.scores(last)
    np.testing.assert_array_equal(scores[:, :first], graph.scores(last))
    own = item_words(larger, first).toarray()
    weight = np.array([1, 0.5]) * (last > 0)
    missing = 1 - graph.chance.toarray().sum(1)
    alike = 0.01 * np.einsum("bl,blw,vw->bv", weight, own[last], own[first:])
    by_share = (missing[last[:, 0]] + weight[:, 1] * missing[last[:, 1]]) * graph.share[1:].min()
    np.testing.assert_allclose(scores[:, first:], alike + by_share[:, None], rtol=1e-5)
    assert (alike > 0).any()
    # From an added item no step leads on: popularity, and the words.
    after = grown.scores(np.array([[first, 0]], np.int32))[0]
    np.testing.assert_allclose(after[:first], graph.share + 0.01 * own[:first] @ own[first], rtol=1e-5)


def test_an_item_without_events_lies_beside_one_that_was_seen_once(make_timelines):
    """After an item from which no step leads to either. Item 5 has no event in training, and 6 is added; no item has a word."""
    timelines = make_timelines([[1, 2, 1, 2, 3, 5, 5], [1, 2, 4, 1, 2, 1]], num_items=5)
    split = leave_last_out(timelines)
    assert train_counts(timelines, split).tolist() == [0, 4, 3, 1, 1, 0]
    graph = Transitions.counted(timelines, split)
    old = dataclasses.replace(timelines.catalogue, titles=[""] * 6, multi={})
    grown = graph.extended(dataclasses.replace(old, titles=[""] * 7, keys=[*old.keys, "added"]))
    last = np.array([[0, 0], [6, 3]], np.int32)
    [sums] = grown.sums(np.zeros((2, 7)), last, (1.0,))
    assert sums[0, 3] == sums[0, 4] == sums[0, 5] == sums[0, 6] < sums[0, 1]
    np.testing.assert_allclose(sums[0, 6], np.log(1 / 9), rtol=1e-6)
    assert sums[1, 5] == sums[1, 6] > np.log(1 / 9)


def test_everything_is_computed_before_the_first_scores(timelines, last, monkeypatch):
    """Another weight computes nothing again; a larger catalogue is computed where it is taken."""
    calls = []
    monkeypatch.setattr(module, "item_words", lambda *about: calls.append(1) or item_words(*about))
    graph = Transitions.counted(timelines, leave_last_out(timelines))
    assert len(calls) == 1
    graph.scores(last)
    weighted = graph.weighted(2.0)
    weighted.scores(last)
    assert weighted.weight == 2 and len(calls) == 1
    grown = weighted.extended(timelines.catalogue)
    assert grown.weight == 2 and len(calls) == 2
    grown.scores(last)
    assert len(calls) == 2


def test_a_file_holds_the_steps(graph, timelines, last, tmp_path):
    counts = train_counts(timelines, leave_last_out(timelines))
    save_transitions(tmp_path, graph)
    read = load_transitions(tmp_path, timelines.catalogue, counts, 0.5)
    assert read.weight == 0.5
    np.testing.assert_array_equal(read.scores(last), graph.scores(last))


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: save_file({"first": np.zeros(ITEMS + 2, np.int64)}, file),
        lambda file: _set(file, "item", 0, ITEMS + 1),
        lambda file: _set(file, "item", 0, 0),
        lambda file: _set(file, "chance", 0, np.nan),
        lambda file: _set(file, "chance", 0, -1),
        lambda file: _set(file, "chance", 0, 2),
        lambda file: _set(file, "first", 0, 1),
        lambda file: _set(file, "first", 3, 10**6),
        lambda file: _set(file, "first", -1, 1),
    ],
)
def test_a_file_of_other_steps_is_refused(graph, timelines, tmp_path, change):
    save_transitions(tmp_path, graph)
    change(tmp_path / TRANSITIONS_FILE)
    with pytest.raises(ValueError, match=rf"{TRANSITIONS_FILE} (is missing|is truncated|does not fit)") as error:
        load_transitions(tmp_path, timelines.catalogue, np.ones(ITEMS + 1, np.int64), 1.0)
    assert "\n" not in str(error.value)


def _set(file, name, place, value):
    arrays = load_file(file)
    arrays[name][place] = value
    save_file(arrays, file)
