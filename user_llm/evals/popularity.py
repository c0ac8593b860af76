"""The popularity baseline: every user is offered the items with most training events."""

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
