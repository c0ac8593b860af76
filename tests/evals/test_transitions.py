"""Ranks by transitions, of validation and test, and the weight that ranks best beside a model."""

from types import SimpleNamespace

import numpy as np

from user_llm.data.splits import leave_last_out
from user_llm.evals.transitions import best_weight, transition_ranks
from user_llm.models.transitions import Transitions


def test_ranks_are_those_of_the_scores_after_each_history(make_timelines):
    rng = np.random.default_rng(0)
    timelines = make_timelines([rng.integers(1, 13, rng.integers(3, 9)).tolist() for _ in range(20)], num_items=12)
    split = leave_last_out(timelines)
    graph = Transitions.counted(timelines, split)
    trained = {int(i) for u, stop in enumerate(split.train_stop) for i in timelines.items(u, 0, stop)}
    for part in ("validation", "test"):
        ranks = transition_ranks(timelines, split, part)
        assert len(ranks) == 20
        for user, position, rank in zip(ranks.users, ranks.positions, ranks.everything, strict=True):
            *history, target = timelines.items(user, 0, position + 1).tolist()
            scores = graph.scores(np.array([[*history[:-3:-1], 0][:2]], np.int32))[0, 1:]
            better, equal = (scores > scores[target - 1]).sum(), (scores == scores[target - 1]).sum() - 1
            assert rank == (1 + better + equal / 2 if target in trained else np.inf)


def test_the_best_weight_is_the_smallest_of_those_that_rank_best():
    ranks = [SimpleNamespace(metrics=lambda value=value: {"ndcg@10": value}) for value in (0.1, 0.3, 0.3, 0.2)]
    assert best_weight((0.0, 2.0, 0.5, 1.0), ranks) == 0.5
