"""The transition baseline against plain Python; what counts as a step, and that training alone counts."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from user_llm.data.splits import leave_last_out
from user_llm.evals import transitions as module
from user_llm.evals.transitions import item_words, largest, transition_ranks, transition_scorer, transitions

ITEMS = 12
TITLES = ["", "Red Fox", "red dog", "Blue Whale", *(f"thing {n}" for n in range(4, ITEMS + 1))]


@pytest.fixture
def timelines(make_timelines):
    rng = np.random.default_rng(0)
    found = make_timelines(
        [rng.integers(1, ITEMS + 1, max(rng.integers(-2, 9), 3)).tolist() for _ in range(20)], num_items=ITEMS
    )
    genres = {"genres": np.arange(2 * (ITEMS + 1)).reshape(-1, 2) % 4}
    return dataclasses.replace(found, catalogue=dataclasses.replace(found.catalogue, titles=TITLES, multi=genres))


def test_steps_are_those_within_one_user_in_training(make_timelines):
    timelines = make_timelines([[1, 2, 1, 2, 3, 4], [2, 2, 5, 1]], num_items=5)
    expected = np.zeros((6, 6))
    expected[1, 2], expected[2, 1], expected[2, 2] = 2, 1, 1  # the last two events of each user are for validation and test
    np.testing.assert_array_equal(transitions(timelines, leave_last_out(timelines)).toarray(), expected)


def test_many_chunks_add_up(timelines, monkeypatch):
    split = leave_last_out(timelines)
    whole = transitions(timelines, split).toarray()
    monkeypatch.setattr("user_llm.data.timelines.CHUNK", 7)
    np.testing.assert_array_equal(transitions(timelines, split).toarray(), whole)


def _scores(timelines, split, history):
    """Score all items after a history in plain Python."""
    items = range(1, ITEMS + 1)
    steps = np.zeros((ITEMS + 1, ITEMS + 1))
    share = np.zeros(ITEMS + 1)
    for user, stop in enumerate(split.train_stop):
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
            continue
        last = history[-back]
        for item in items:
            two = sum(chance[last, mid] * chance[mid, item] for mid in items)
            alike = sum(rare[word] ** 2 for word in bags[last] & bags[item]) / (norm[last] * norm[item])
            out[item] += weight * (chance[last, item] + two + missing[last] * share[item] + 0.01 * alike)
    return out


@pytest.mark.parametrize("part", ["validation", "test"])
def test_ranks_are_those_of_plain_python(timelines, part):
    split = leave_last_out(timelines)
    ranks = transition_ranks(timelines, split, part)
    assert len(ranks.users) == 20
    assert part == "test" or (ranks.positions == 1).sum() > 5  # a history of one item has none before it
    for user, position, rank in zip(ranks.users, ranks.positions, ranks.everything, strict=True):
        scores = _scores(timelines, split, timelines.items(user, 0, position).tolist())
        target = int(timelines.items(user, position, position + 1)[0])
        trained = {int(i) for u, stop in enumerate(split.train_stop) for i in timelines.items(u, 0, stop)}
        others = [scores[item] for item in range(1, ITEMS + 1) if item != target]
        assert rank == (1 + sum(other > scores[target] for other in others) if target in trained else np.inf)


def test_scores_of_many_items_are_computed_a_part_at_a_time(timelines, monkeypatch):
    split = leave_last_out(timelines)
    batch = SimpleNamespace(users=np.arange(20), positions=timelines.lengths - 1)
    whole, rows = transition_scorer(timelines, split)(batch), []
    monkeypatch.setattr(module, "ENTRIES", 3 * (ITEMS + 1))
    concatenate = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda parts, **how: rows.extend(map(len, parts)) or concatenate(parts, **how))
    scored = transition_scorer(timelines, split)
    rows.clear()
    np.testing.assert_array_equal(scored(batch), whole)
    assert rows == [3] * 6 + [2]


def test_a_second_step_leads_to_the_likeliest_alone(timelines, monkeypatch):
    matrix = sparse.csr_array(np.array([[0.0, 3, 1, 2], [5, 0, 0, 0], [1, 1, 1, 0]]))
    expected = [[0, 3, 0, 2], [5, 0, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(largest(matrix, 2).toarray(), expected)
    assert matrix.nnz == 7  # the one that was given is as it was
    split = leave_last_out(timelines)
    whole = transition_ranks(timelines, split, "test").everything
    monkeypatch.setattr(module, "SECOND", 1)
    assert (transition_ranks(timelines, split, "test").everything != whole).any()


def test_words_and_bags_make_vectors_of_length_one(timelines):
    words = item_words(timelines.catalogue).toarray()
    np.testing.assert_allclose(np.linalg.norm(words[1:], axis=1), 1, atol=1e-6)
    nameless = dataclasses.replace(timelines.catalogue, titles=[""] * (ITEMS + 1), multi={})
    assert not item_words(nameless).nnz
