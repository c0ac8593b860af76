"""Ranks every test user's target among the whole catalogue with any scorer (DESIGN section 4)."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from user_llm.common import mesh as meshes
from user_llm.data.pipeline import BUCKET, HistoryBatch, history_batches
from user_llm.data.splits import Split, train_counts
from user_llm.data.timelines import Timelines
from user_llm.evals.ranking import Ranks, target_ranks

_ranks = jax.jit(target_ranks)


def rank_targets(
    scorer: Callable[[HistoryBatch], Float[Array | np.ndarray, "B V"]],
    timelines: Timelines,
    split: Split,
    part: str,
    *,
    max_events: int,
    batch_size: int,
    limit: int | None = None,
    bucket: int = BUCKET,
) -> Ranks:
    """Rank the targets of `part` (`validation` or `test`) by a scorer of all items; the first `limit` users only, if given.

    Histories are padded to a multiple of `bucket` events, and the scorer compiles once for each such length.

    A target without a single event in training is a miss: no trained scorer can know it, and its untrained score is noise.
    """
    score = lambda batch: [scorer(batch)]  # noqa: E731
    return rank_each(
        score, 1, timelines, split, part, max_events=max_events, batch_size=batch_size, limit=limit, bucket=bucket
    )[0]


def rank_each(
    scorer: Callable[[HistoryBatch], Sequence[Float[Array | np.ndarray, "B V"]]],
    count: int,
    timelines: Timelines,
    split: Split,
    part: str,
    *,
    max_events: int,
    batch_size: int,
    limit: int | None = None,
    bucket: int = BUCKET,
) -> list[Ranks]:
    """Rank the targets in several ways at once, by a scorer that returns `count` arrays of scores; the rest as in `rank_targets`.

    Raises:
      ValueError: the scorer returns more or fewer arrays.
    """
    counts = train_counts(timelines, split)

    def ranks(scores: Float[Array | np.ndarray, "B V"], batch: HistoryBatch) -> list[np.ndarray]:
        valid = np.zeros(scores.shape[1], bool)
        valid[1 : len(counts)] = True
        both = [meshes.fetch(_ranks(scores, batch.targets, exclude, valid)) for exclude in (None, batch.seen)]
        return [np.where(counts[batch.targets] > 0, found, np.inf) for found in both]

    def rank(batch: HistoryBatch) -> list[list[np.ndarray]]:
        arrays = scorer(batch)
        if len(arrays) != count:
            raise ValueError(f"The scorer returned {len(arrays)} arrays of scores, not {count}.")
        return [ranks(scores, batch) for scores in arrays]

    return _rank_all(rank, count, timelines, split, part, max_events, batch_size, limit, bucket)


def rank_listed(
    proposer: Callable[[HistoryBatch], Int[np.ndarray, "B X"]],
    timelines: Timelines,
    split: Split,
    part: str,
    *,
    max_events: int,
    batch_size: int,
    limit: int | None = None,
    bucket: int = BUCKET,
) -> Ranks:
    """Rank the targets by their place in a list of item ids, best first, 0 = none; `bucket` as in `rank_targets`.

    What is not listed is a miss, and so is a target without a single event in training, as in `rank_targets`.
    """
    counts = train_counts(timelines, split)

    def rank(batch: HistoryBatch) -> list[list[np.ndarray]]:
        listed = proposer(batch)
        hit = (listed == batch.targets[:, None]) & (counts[batch.targets] > 0)[:, None]
        listed_before = np.stack([np.isin(items, seen) for items, seen in zip(listed, batch.seen, strict=True)])
        fresh = (listed > 0) & ~listed_before
        found, found_unseen = hit.any(1), (hit & fresh).any(1)
        place = hit.argmax(1)
        # Its rank among the listed items that are not in the history.
        place_unseen = np.cumsum(fresh, axis=1)[np.arange(len(listed)), place]
        return [[np.where(found, place + 1.0, np.inf), np.where(found_unseen, place_unseen, np.inf)]]

    return _rank_all(rank, 1, timelines, split, part, max_events, batch_size, limit, bucket)[0]


def _rank_all(
    rank: Callable[[HistoryBatch], list[list[np.ndarray]]],
    count: int,
    timelines: Timelines,
    split: Split,
    part: str,
    max_events: int,
    batch_size: int,
    limit: int | None,
    bucket: int,
) -> list[Ranks]:
    """Collect the ranks of all batches in the order of the targets: `count` times those of everything, and those of the unseen."""
    users, positions = (array[:limit] for array in split.targets[part])
    ranks = np.full((count, 2, len(users)), np.inf)
    batches = history_batches(timelines, users, positions, max_events=max_events, batch_size=batch_size, bucket=bucket)
    for indices, batch in batches:
        ranks[:, :, indices] = np.stack(rank(batch))[:, :, : batch.count]
    return [Ranks(users, positions, everything, unseen) for everything, unseen in ranks]
