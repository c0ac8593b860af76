"""Ranks by transitions, alone and beside a model, and the weight that they get there."""

from collections.abc import Callable, Sequence

from absl import logging

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


def weighted_transitions(
    rank: Callable[[Transitions, Sequence[float]], Sequence[Ranks]],
    timelines: Timelines,
    split: Split,
    weights: Sequence[float],
) -> Transitions | None:
    """Return the transitions of training events with the weight that ranks validation targets best beside a model.

    The result is None if there are no weights, or if this weight is 0: the model then ranks best alone.

    Args:
      rank: returns the ranks of these targets by the model and some transitions, for each of some weights.
      weights: the weights to choose from.
    """
    if not weights:
        return None
    graph = Transitions.counted(timelines, split)
    weight = best_weight(weights, rank(graph, weights))
    logging.info("The transitions have the weight %g, which ranks best on validation.", weight)
    return graph.weighted(weight) if weight else None


def best_weight(weights: Sequence[float], ranks: Sequence[Ranks]) -> float:
    """Return the weight that ranks best by NDCG@10; of equals it is the smallest.

    Args:
      ranks: those of the same targets by each of the weights.
    """
    return max(zip(weights, ranks, strict=True), key=lambda pair: (pair[1].metrics()["ndcg@10"], -pair[0]))[0]
