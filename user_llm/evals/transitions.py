"""Ranks by transitions, alone and beside a model, and the weight that they get there."""

from collections.abc import Sequence

from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.evals.evaluator import rank_targets
from user_llm.evals.ranking import Ranks
from user_llm.models.transitions import ENTRIES, Transitions, last_items

TOGETHER = "+transitions"  # what is added to the method's name where a model and transitions rank together


def transition_ranks(timelines: Timelines, split: Split, part: str) -> Ranks:
    """Rank the targets of `part` by the transitions of training events alone."""
    graph = Transitions.counted(timelines, split)
    rows = min(max(ENTRIES // (timelines.schema.num_items + 1), 1), 256)
    score = lambda batch: graph.scores(last_items(timelines, batch.users, batch.positions))  # noqa: E731
    return rank_targets(score, timelines, split, part, max_events=1, batch_size=rows)


def best_weight(weights: Sequence[float], ranks: Sequence[Ranks]) -> float:
    """Return the weight that ranks best by NDCG@10; of equals it is the smallest.

    Args:
      ranks: those of the same targets by each of the weights.
    """
    return max(zip(weights, ranks, strict=True), key=lambda pair: (pair[1].metrics()["ndcg@10"], -pair[0]))[0]
