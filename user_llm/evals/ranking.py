"""Ranks of targets in the full catalogue, their metrics, and the rows that end in results.json.

A target that ties with others gets the mean of the ranks that they take together, so that a
constant scorer earns no recall. Left out on purpose: sampled metrics (Krichene and Rendle 2020).
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from user_llm.data.timelines import Timelines
from user_llm.evals.measured import Measured

CUTOFFS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The target's rank for each user of a split part; infinite where it can never be found.

    Attributes:
      users, positions: the targets.
      everything: rank with nothing filtered.
      unseen: rank with the items of the user's history removed.
    """

    users: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    everything: Float[np.ndarray, " n"]
    unseen: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.users)

    def measured(self) -> Measured:
        """Return every metric of every target, with nothing filtered and `/unseen`."""
        removed = {f"{name}/unseen": values for name, values in ranking_values(self.unseen).items()}
        return Measured(self.users, self.positions, ranking_values(self.everything) | removed)

    def metrics(self) -> dict[str, float]:
        """Return the mean of every metric."""
        return self.measured().metrics


def target_ranks(
    scores: Float[Array, "B V"],
    targets: Int[Array, " B"],
    exclude: Int[Array, "B X"] | None,
    valid: Bool[Array, " V"],
) -> Float[Array, " B"]:
    """Return each target's rank among the candidates: 1 + #(better) + #(equal others) / 2.

    Candidates are the `valid` columns without PAD 0 and, if given, without the row's `exclude` ids
    (0-padded, repeats allowed). A target that is no candidate itself, or whose score is NaN, has
    rank infinity; another's NaN counts as better.
    """
    rows = jnp.arange(scores.shape[0])
    candidate = jnp.broadcast_to(valid & (jnp.arange(scores.shape[1]) > 0), scores.shape)
    if exclude is not None:
        candidate = candidate.at[rows[:, None], exclude].set(False)
    own = scores[rows, targets][:, None]
    better = jnp.sum(candidate & ~(scores <= own), axis=1)
    equal_others = jnp.sum(candidate & (scores == own), axis=1) - 1
    found = candidate[rows, targets] & ~jnp.isnan(own[:, 0])
    return jnp.where(found, 1 + better + 0.5 * equal_others, jnp.inf)


def ranking_values(ranks: Float[np.ndarray, " n"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return each target's recall@1/5/10, NDCG@10 and reciprocal rank (mrr); rank infinity gives 0.

    With one relevant item NDCG@10 is 1 / log2(1 + rank) up to rank 10. MRR is not cut off.

    Raises:
      ValueError: no ranks at all.
    """
    ranks = np.asarray(ranks, np.float64)
    if not len(ranks):
        raise ValueError("No target to rank: no user has enough events; lower the split's min_events.")
    recalls = {f"recall@{k}": (ranks <= k).astype(np.float64) for k in CUTOFFS}
    return {**recalls, "ndcg@10": np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0), "mrr": 1 / ranks}


# The names of the metrics of a ranking, whatever is ranked.
RANKING = (*ranking_values(np.ones(1)), *(f"{name}/unseen" for name in ranking_values(np.ones(1))))


def result_rows(
    metrics: Mapping[str, float],
    n: int,
    *,
    dataset: str,
    method: str,
    seed: int,
    split: str,
    config_hash: str,
    task: str = "next_item",
) -> list[dict]:
    """Return a row for results.json per metric; n is the number of targets that it is a mean over."""
    return [
        {
            "dataset": dataset,
            "task": task,
            "method": method,
            "metric": metric,
            "value": value,
            "n": n,
            "seed": seed,
            "split": split,
            "config_hash": config_hash,
        }
        for metric, value in metrics.items()
    ]


def boundary_ties(
    timelines: Timelines, users: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"] | None:
    """Say which targets share their timestamp with the event before; None without times."""
    if "timestamp" not in timelines.columns:
        return None
    timestamp = timelines.columns["timestamp"]
    target = timelines.offsets[users] + positions
    return (positions > 0) & (timestamp[target] == timestamp[np.maximum(target - 1, 0)])


def target_numbers(
    timelines: Timelines, users: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"], train_counts: Int[np.ndarray, " V"]
) -> dict[str, Int[np.ndarray, " n"]]:
    """Return what a report breaks results down by.

    Of each target the events before it, its item's events in training, and, with times, 1 where it ties with the event before it.
    """
    popularity = train_counts[timelines.item[timelines.offsets[users] + positions]]
    tied = boundary_ties(timelines, users, positions)
    ties = {} if tied is None else {"boundary_tie": tied.astype(int)}
    return {"history_length": positions, "item_popularity": popularity, **ties}
