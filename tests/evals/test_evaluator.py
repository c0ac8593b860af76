"""Ranks of whole splits against an oracle in plain Python: padded batches, histories cut short, cold targets."""

import dataclasses

import numpy as np
import pytest

from user_llm.data.splits import Split, leave_last_out, train_counts
from user_llm.evals.evaluator import rank_each, rank_listed, rank_targets
from user_llm.evals.popularity import popularity_ranks, recent_popularity_ranks

ITEMS = 30


@pytest.fixture(scope="module")
def timelines(make_timelines):
    """23 users of 3 to 20 events; items 28 to 30 stand at the very end only, so as test targets they are cold."""
    rng = np.random.default_rng(0)
    rows = [(rng.permutation(27)[: rng.integers(3, 21)] + 1).tolist() for _ in range(20)]
    rows += [[1, 2, 3, 28], [4, 5, 6, 29], [7, 8, 9, 10, 7]]  # the last one's target lies in its history
    return make_timelines(rows, num_items=ITEMS)


@pytest.fixture(scope="module")
def split(timelines):
    return leave_last_out(timelines)


def score(user, history):
    """Score all items by something that depends on the user and on the history as given, with ties."""
    rng = np.random.default_rng((user, *history))
    return rng.integers(8, size=ITEMS + 1).astype(np.float32)


def scorer(extra_columns=0):
    """Return a scorer that sees the batch's part of the history alone; columns beyond the catalogue score best."""

    def scores(batch):
        rows = [
            score(user, events[:length, 0])
            for user, events, length in zip(batch.users, batch.events, batch.lengths, strict=True)
        ]
        return np.pad(np.stack(rows), [(0, 0), (0, extra_columns)], constant_values=99)

    return scores


def oracle(timelines, split, part, max_events):
    """Rank every target in plain Python: (everything, unseen)."""
    trained = {int(i) for u, stop in enumerate(split.train_stop) for i in timelines.items(u, 0, stop)}
    out = []
    for user, position in zip(*split.targets[part], strict=True):
        history = timelines.items(user, 0, position)
        target = int(timelines.items(user, position, position + 1)[0])
        scores = score(user, history[-max_events:])
        ranks = []
        for removed in (set(), set(history.tolist())):
            candidates = [i for i in range(1, ITEMS + 1) if i not in removed]
            if target not in trained or target in removed:
                ranks.append(np.inf)
                continue
            better = sum(scores[i] > scores[target] for i in candidates)
            equal = sum(scores[i] == scores[target] for i in candidates if i != target)
            ranks.append(1 + better + equal / 2)
        out.append(ranks)
    return np.array(out).T


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("max_events", [4, 100])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_ranks_equal_the_oracle(timelines, split, part, max_events, batch_size):
    ranks = rank_targets(scorer(2), timelines, split, part, max_events=max_events, batch_size=batch_size)
    everything, unseen = oracle(timelines, split, part, max_events)
    np.testing.assert_array_equal(ranks.everything, everything)
    np.testing.assert_array_equal(ranks.unseen, unseen)
    np.testing.assert_array_equal(ranks.users, split.targets[part][0])
    np.testing.assert_array_equal(ranks.positions, split.targets[part][1])
    if part == "test":
        assert np.isinf(ranks.everything[[20, 21]]).all()  # cold
        assert np.isfinite(ranks.everything[22]) and np.isinf(ranks.unseen[22])  # seen before


def test_unseen_removes_the_whole_history_not_only_what_the_encoder_sees(timelines, split):
    def loves_history(batch):
        scores = np.zeros((len(batch.users), ITEMS + 1), np.float32)
        for row, (user, position) in enumerate(zip(batch.users, batch.positions, strict=True)):
            scores[row, timelines.items(user, 0, position)] = 2
            scores[row, batch.targets[row]] = 1
        return scores

    ranks = rank_targets(loves_history, timelines, split, "test", max_events=2, batch_size=8)
    np.testing.assert_array_equal(ranks.unseen[:20], 1)
    np.testing.assert_array_equal(ranks.everything[:20], split.targets["test"][1][:20] + 1)


def test_only_the_first_users_are_ranked_where_a_limit_is_given(timelines, split):
    options = {"max_events": 100, "batch_size": 8}
    few = rank_targets(scorer(), timelines, split, "test", **options, limit=5)
    whole = rank_targets(scorer(), timelines, split, "test", **options)
    np.testing.assert_array_equal(few.everything, whole.everything[:5])
    np.testing.assert_array_equal(few.users, whole.users[:5])


def test_counts_are_of_training_events_alone(make_timelines):
    timelines = make_timelines([[1, 2, 3, 4], [1, 3], [2, 2, 1]], num_items=5)
    np.testing.assert_array_equal(train_counts(timelines, leave_last_out(timelines)), [0, 2, 2, 1, 0, 0])


def test_popularity_by_hand(make_timelines):
    timelines = make_timelines([[1, 2, 3, 1], [1, 2, 5, 3], [1, 3, 2, 4]])
    # Training holds 1 three times, 2 twice, 3 once; 4 and 5 never.
    ranks = popularity_ranks(timelines, leave_last_out(timelines), "test")
    np.testing.assert_array_equal(ranks.everything, [1, 3, np.inf])
    np.testing.assert_array_equal(ranks.unseen, [np.inf, 1, np.inf])
    assert ranks.metrics()["recall@1"] == pytest.approx(1 / 3)
    assert ranks.metrics()["recall@5"] == pytest.approx(2 / 3)
    assert ranks.metrics()["recall@5/unseen"] == pytest.approx(1 / 3)


def test_popularity_of_the_last_days_by_hand(make_timelines):
    """Training alone counts, from seven days before a target on and strictly before it; all time decides between equals."""
    items = [[1, 2, 3, 4, 2], [3, 3, 5, 1, 3], [5, 1, 4, 2, 4], [1, 2, 5]]
    days = [[0, 1, 2, 20, 21], [15, 16, 17, 18, 23], [10, 14, 30, 31, 32], [32, 33, 50]]
    timelines = make_timelines(items, [[86_400 * day for day in row] for row in days])
    ranks = recent_popularity_ranks(timelines, leave_last_out(timelines), "test", days=7)
    # Of all time: 1 and 3 three times, 5 twice, 2 and 4 once. Before the targets: 3 3 1 5 | 3 5 | 4 | nothing.
    np.testing.assert_array_equal(ranks.everything, [4.5, 1, 1, 3])
    timeless = dataclasses.replace(timelines, columns={})
    with pytest.raises(ValueError, match="toy has no timestamps"):
        recent_popularity_ranks(timeless, leave_last_out(timelines), "test", days=7)


def test_listed_items_rank_by_their_place(make_timelines):
    timelines = make_timelines([[1, 2, 3, 4], [1, 2, 4, 3], [1, 2, 4, 2], [3, 4, 1, 2]], num_items=6)
    lists = {
        0: [1, 5, 3, 4, 0],  # target 4: place 4, and 2 behind the unseen 5
        1: [1, 2, 5, 6, 0],  # target 3: not listed
        2: [6, 2, 0, 0, 0],  # target 2: place 2, but seen
        3: [2, 0, 0, 0, 0],  # target 2: first
    }

    def proposer(batch):
        return np.array([lists[user] for user in batch.users])

    for batch_size in (1, 3, 8):
        ranks = rank_listed(proposer, timelines, leave_last_out(timelines), "test", max_events=2, batch_size=batch_size)
        np.testing.assert_array_equal(ranks.everything, [4, np.inf, 2, 1])
        np.testing.assert_array_equal(ranks.unseen, [2, np.inf, np.inf, 1])


def test_a_full_list_ranks_like_its_scores(timelines, split):
    """Listing all items by distinct scores gives the ranks that the scores give."""

    def scores(batch):
        return np.stack([np.random.default_rng(user).permutation(ITEMS + 1).astype(np.float32) for user in batch.users])

    def proposer(batch):
        order = np.argsort(-scores(batch), axis=1)
        return order[order > 0].reshape(len(order), ITEMS)

    options = {"max_events": 3, "batch_size": 7}
    scored = rank_targets(scores, timelines, split, "test", **options)
    listed = rank_listed(proposer, timelines, split, "test", **options)
    warm = train_counts(timelines, split)[timelines.item[timelines.offsets[scored.users] + scored.positions]] > 0
    np.testing.assert_array_equal(scored.everything[warm], listed.everything[warm])
    np.testing.assert_array_equal(scored.unseen[warm], listed.unseen[warm])


def test_a_target_without_history_can_be_ranked(make_timelines):
    timelines = make_timelines([[1, 2, 3], [2, 3]])
    split = Split("toy", np.array([3, 0]), {"test": (np.array([1]), np.array([0]))})
    ranks = popularity_ranks(timelines, split, "test")
    np.testing.assert_array_equal(ranks.everything, [2])
    np.testing.assert_array_equal(ranks.unseen, [2])


def test_several_ways_of_scoring_rank_as_each_does_alone(timelines, split):
    where, sizes = (timelines, split, "test"), {"max_events": 5, "batch_size": 7}
    ways = [scorer(2), lambda batch: -scorer(2)(batch)]
    together = rank_each(lambda batch: [score(batch) for score in ways], 2, *where, **sizes)
    for found, score in zip(together, ways, strict=True):
        alone = rank_targets(score, *where, **sizes)
        np.testing.assert_array_equal(found.everything, alone.everything)
        np.testing.assert_array_equal(found.unseen, alone.unseen)
    assert (together[0].everything != together[1].everything).any()
    with pytest.raises(ValueError, match="^The scorer returned 1 arrays of scores, not 2.$"):
        rank_each(lambda batch: [scorer(2)(batch)], 2, *where, **sizes)
