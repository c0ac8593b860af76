"""The popularity baselines: every user is offered the items with most training events, of all time or of the days before."""

import numpy as np

from user_llm.data.pipeline import HistoryBatch
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.evals.evaluator import rank_targets, train_counts
from user_llm.evals.ranking import Ranks


def popularity_ranks(timelines: Timelines, split: Split, part: str) -> Ranks:
    """Rank the targets of `part` by how often each item occurs in training."""
    counts = train_counts(timelines, split).astype(np.float32)

    def score(batch: HistoryBatch) -> np.ndarray:
        return np.broadcast_to(counts, (len(batch.targets), len(counts)))

    return rank_targets(score, timelines, split, part, max_events=1, batch_size=256)


def recent_popularity_ranks(timelines: Timelines, split: Split, part: str, *, days: float) -> Ranks:
    """Rank the targets of `part` by training events in the days before each target; equal counts by those of all time.

    Raises:
      ValueError: events without times.
    """
    if "timestamp" not in timelines.columns:
        raise ValueError(f"{timelines.name} has no timestamps: what is recent cannot be said.")
    counts = train_counts(timelines, split)
    trains = np.flatnonzero(timelines.positions < split.train_stop[timelines.users])
    time = timelines.columns["timestamp"]
    order = trains[np.argsort(time[trains], kind="stable")]
    times, items = time[order], timelines.item[order]
    tie_break = (counts / (counts.max() + 1)).astype(np.float32)

    def score(batch: HistoryBatch) -> np.ndarray:
        now = time[timelines.offsets[batch.users] + batch.positions]
        windows = np.searchsorted(times, [now - days * 86_400, now])  # from its first moment, and before the target's
        return np.stack([np.bincount(items[start:stop], minlength=len(counts)) + tie_break for start, stop in windows.T])

    return rank_targets(score, timelines, split, part, max_events=1, batch_size=256)
