"""The popularity baselines: every user is offered the items with most training events, of all time or of the days before."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from user_llm.data.mapped import stored
from user_llm.data.pipeline import HistoryBatch
from user_llm.data.splits import Split, train_counts
from user_llm.data.timelines import CHUNK, Timelines
from user_llm.evals.evaluator import rank_targets
from user_llm.evals.ranking import Ranks

MEMORY = "500MB"  # of DuckDB, beyond which it sorts on disk


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
    time, span = timelines.order, days * 86_400 * timelines.ticks_per_second
    tie_break = (counts / (counts.max() + 1)).astype(np.float32)

    def score(batch: HistoryBatch) -> np.ndarray:
        now = time[timelines.offsets[batch.users] + batch.positions]
        windows = np.searchsorted(times, [now - span, now])  # from its first moment, and before the target's
        return np.stack([np.bincount(items[start:stop], minlength=len(counts)) + tie_break for start, stop in windows.T])

    with tempfile.TemporaryDirectory() as folder:
        times, items = _by_time(timelines, split, Path(folder))
        return rank_targets(score, timelines, split, part, max_events=1, batch_size=256)


def _by_time(timelines: Timelines, split: Split, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the times and items of all training events by time, sorted on disk (DuckDB) and mapped from files in a folder."""
    number = pa.from_numpy_dtype(timelines.order.dtype)
    schema = pa.schema({"time": number, "item": pa.int32()})

    def batches() -> Iterator[pa.RecordBatch]:
        for chunk in timelines.chunks():
            trains = chunk.positions < split.train_stop[chunk.users]
            columns = [timelines.order[chunk.events][trains], timelines.item[chunk.events][trains].astype(np.int32)]
            yield pa.record_batch(columns, schema=schema)

    def pieces() -> Iterator[dict[str, np.ndarray]]:
        yield {"time": np.zeros(0, number.to_pandas_dtype()), "item": np.zeros(0, np.int32)}
        with duckdb.connect(str(folder / "events.duckdb")) as database:
            database.execute(f"SET memory_limit = '{MEMORY}'; SET enable_progress_bar = false")
            database.register("source", pa.RecordBatchReader.from_batches(schema, batches()))
            for piece in database.sql("SELECT * FROM source ORDER BY time").to_arrow_reader(CHUNK):
                yield {name: piece[name].to_numpy() for name in schema.names}

    columns = stored(folder / "by_time", pieces)
    return columns["time"], columns["item"]
