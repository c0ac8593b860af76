"""Ranks, metrics, rows and numbers of targets, against answers by brute force and by hand."""

from unittest.mock import Mock

import jax
import numpy as np
import pytest

from user_llm.data.timelines import Timelines
from user_llm.evals.ranking import (
    Ranks,
    boundary_ties,
    ranking_values,
    result_rows,
    target_numbers,
)
from user_llm.evals.ranking import target_ranks as traced_ranks

target_ranks = jax.jit(traced_ranks)  # a program for each operation would take longer


def oracle_rank(scores, target, exclude, valid):
    """Average the target's place over the best and the worst order of its ties, by sorting."""
    candidates = [i for i in range(1, len(scores)) if valid[i] and i not in exclude]
    if target not in candidates:
        return np.inf
    ordered = sorted((scores[i] for i in candidates), reverse=True)
    places = [place for place, score in enumerate(ordered, 1) if score == scores[target]]
    return (places[0] + places[-1]) / 2


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("filtered", [False, True])
def test_ranks_equal_brute_force_with_many_ties(levels, filtered):
    rng = np.random.default_rng(levels)
    rows, columns = 64, 40
    scores = rng.integers(levels, size=(rows, columns)).astype(np.float32)
    targets = rng.integers(0, columns, rows)
    exclude = rng.integers(0, columns, (rows, 12))
    exclude[:, 6:] = 0
    valid = rng.random(columns) < 0.8
    ranks = target_ranks(scores, targets, exclude if filtered else None, valid)
    seen = [set(row) if filtered else set() for row in exclude]
    expected = [oracle_rank(scores[i], targets[i], seen[i], valid) for i in range(rows)]
    np.testing.assert_array_equal(ranks, expected)
    assert np.isinf(ranks).any() and np.isfinite(ranks).any()


def test_constant_scores_give_no_recall():
    ranks = target_ranks(np.zeros((5, 101)), np.arange(1, 6), None, np.ones(101, bool))
    np.testing.assert_array_equal(ranks, 50.5)
    values = ranking_values(ranks)
    assert not values["recall@10"].any() and not values["ndcg@10"].any()


def test_pad_and_invalid_columns_never_compete():
    scores = np.array([[9.0, 1.0, 2.0, 8.0]])
    valid = np.array([True, True, True, False])
    assert target_ranks(scores, np.array([1]), None, valid) == 2
    assert target_ranks(scores, np.array([3]), None, valid) == np.inf
    assert target_ranks(scores, np.array([0]), None, valid) == np.inf


def test_history_is_removed_and_a_target_within_it_is_a_miss():
    scores = np.array([[0.0, 3.0, 2.0, 1.0]] * 2)
    ranks = target_ranks(scores, np.array([3, 1]), np.array([[1, 1, 0], [1, 2, 0]]), np.ones(4, bool))
    np.testing.assert_array_equal(ranks, [2, np.inf])


def test_nan_never_helps():
    scores = np.array([[0.0, np.nan, 1.0, 0.5]] * 2)
    ranks = target_ranks(scores, np.array([1, 2]), None, np.ones(4, bool))
    np.testing.assert_array_equal(ranks, [np.inf, 2])


def test_metrics_by_hand():
    expected = {
        "recall@1": [1, 0, 0, 0, 0],
        "recall@5": [1, 1, 0, 0, 0],
        "recall@10": [1, 1, 1, 0, 0],
        "ndcg@10": [1, 0.5, 1 / np.log2(6.5), 0, 0],
        "mrr": [1, 1 / 3, 1 / 5.5, 1 / 20, 0],
    }
    values = ranking_values(np.array([1, 3, 5.5, 20, np.inf]))
    assert values.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_allclose(values[name], column)


def test_no_targets_is_an_error():
    with pytest.raises(ValueError, match="min_events"):
        ranking_values(np.array([]))


@pytest.fixture
def ranks():
    return Ranks(
        users=np.array([0, 1, 2]),
        positions=np.array([2, 3, 60]),
        everything=np.array([1.0, 20.0, 4.0]),
        unseen=np.array([1.0, 9.0, np.inf]),
    )


COUNTS = np.array([0, 3, 4, 2000])  # events of each item in training


def timelines(**columns):
    """Three users; their targets are of items 1, 2 and 3."""
    item = np.zeros(68, int)
    item[[2, 6, 67]] = [1, 2, 3]
    return Mock(spec=Timelines, columns=columns, offsets=np.array([0, 3, 7, 68]), item=item)


def test_rows_hold_every_metric_with_both_filters(ranks):
    facts = {"dataset": "toy", "seed": 3, "split": "leave_last_out", "config_hash": "abc"}
    rows = result_rows(ranks.metrics(), len(ranks), method="encoder", **facts)
    values = {row["metric"]: row["value"] for row in rows}
    assert len(values) == len(rows) == 10
    assert values["recall@10"] == values["recall@10/unseen"] == pytest.approx(2 / 3)
    assert values["recall@5"] == pytest.approx(2 / 3)
    assert values["recall@5/unseen"] == pytest.approx(1 / 3)
    for row in rows:
        assert row.items() >= {"task": "next_item", "method": "encoder", "n": 3, **facts}.items()


def test_numbers_of_targets_by_hand(ranks):
    timestamp = np.arange(68)
    timestamp[6] = timestamp[5]  # User 1: the target at position 3 and the event before it.
    timestamp[1] = timestamp[0]  # User 0: a tie, but not at the boundary.
    found = target_numbers(timelines(timestamp=timestamp), ranks.users, ranks.positions, COUNTS)
    assert {name: array.tolist() for name, array in found.items()} == {
        "history_length": [2, 3, 60],
        "item_popularity": [3, 4, 2000],
        "boundary_tie": [0, 1, 0],
    }


def test_first_event_has_nothing_to_tie_with(ranks):
    data = timelines(timestamp=np.zeros(68, int))
    tied = boundary_ties(data, ranks.users, np.zeros(3, int))
    assert not tied.any()


def test_events_without_times_have_no_ties(ranks):
    assert "boundary_tie" not in target_numbers(timelines(), ranks.users, ranks.positions, COUNTS)
