"""Ranks of targets in the full catalogue, their metrics, and the rows that end in results.json.

A target that ties with others gets the mean of the ranks that they take together, so that a
constant scorer earns no recall. Left out on purpose: sampled metrics (Krichene and Rendle 2020).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from user_llm.data.timelines import Timelines
from user_llm.evals.measured import Measured

CUTOFFS = (1, 5, 10)
# Upper ends of the buckets of a breakdown; histories of 10, 50, 100 and 200 events are the paper's.
HISTORY_LENGTHS = (10, 20, 50, 100, 200, 500)
ITEM_POPULARITIES = (3, 10, 30, 100, 300, 1000)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The target's rank for each user of a split part; infinite where it can never be found.

    Attributes:
      users, positions: the targets.
      everything: rank with nothing filtered.
      unseen: rank with the items of the user's history removed.
    """

    users: Int[np.ndarray, "n"]
    positions: Int[np.ndarray, "n"]
    everything: Float[np.ndarray, "n"]
    unseen: Float[np.ndarray, "n"]

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
    targets: Int[Array, "B"],
    exclude: Int[Array, "B X"] | None,
    valid: Bool[Array, "V"],
) -> Float[Array, "B"]:
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


def ranking_values(ranks: Float[np.ndarray, "n"]) -> dict[str, Float[np.ndarray, "n"]]:
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
    timelines: Timelines, users: Int[np.ndarray, "n"], positions: Int[np.ndarray, "n"]
) -> Bool[np.ndarray, "n"] | None:
    """Say which targets share their timestamp with the event before; None without times."""
    if "timestamp" not in timelines.columns:
        return None
    timestamp = timelines.columns["timestamp"]
    target = timelines.offsets[users] + positions
    return (positions > 0) & (timestamp[target] == timestamp[np.maximum(target - 1, 0)])


def by_bucket(ranks: Ranks, number: Int[np.ndarray, "n"], ends: Sequence[int]) -> list[dict]:
    """Return the metrics for each bucket of a number of each target: `from` to `to`, None = no end; empty ones are left out."""
    bucket = np.searchsorted(ends, number)
    starts = (0, *(end + 1 for end in ends))
    return [{"from": starts[b], "to": (*ends, None)[b], **_part(ranks, bucket == b)} for b in np.unique(bucket)]


def breakdown(method: str, ranks: Ranks, timelines: Timelines, train_counts: Int[np.ndarray, "V"]) -> dict:
    """Return a phase's breakdown.json: metrics by history length, item popularity and tie at the split boundary.

    A history's length is its target's position, an item's popularity its events in training. `boundary_tie` has the groups `tied`
    and `untied`; a group without users is left out, and both are for events without times.
    """
    tied = boundary_ties(timelines, ranks.users, ranks.positions)
    groups = {} if tied is None else {"tied": tied, "untied": ~tied}
    popularity = train_counts[timelines.item[timelines.offsets[ranks.users] + ranks.positions]]
    return {
        "method": method,
        "history_length": by_bucket(ranks, ranks.positions, HISTORY_LENGTHS),
        "item_popularity": by_bucket(ranks, popularity, ITEM_POPULARITIES),
        "boundary_tie": {name: _part(ranks, chosen) for name, chosen in groups.items() if chosen.any()},
    }


def _part(ranks: Ranks, chosen: Bool[np.ndarray, "n"]) -> dict:
    part = Ranks(*(array[chosen] for array in (ranks.users, ranks.positions, ranks.everything, ranks.unseen)))
    return {"n": int(chosen.sum()), **part.metrics()}
