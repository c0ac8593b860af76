"""Train, validation and test by time. Split first, window after: no window ever holds an event that is a target elsewhere."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt64

from user_llm.data.timelines import Timelines, event_counts

SIGN = np.uint64(1 << 63)


@dataclasses.dataclass(frozen=True)
class Split:
    """Which events train and which are targets.

    Attributes:
      train_stop: events [0, train_stop) of each user may be used in training.
      targets: for `validation` and `test`, (users, positions); a target's history is all events before its position, so the
        test history holds the validation event.
    """

    name: str
    train_stop: Int[np.ndarray, " U"]
    targets: dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]


def make_split(timelines: Timelines, name: str, *, withhold: float = 0.0) -> Split:
    """Split by name with the default options.

    Args:
      withhold: the share of each timeline's end that does not train, besides what the split keeps for its targets; at least one
        event trains.
    """
    splits: dict[str, Callable[[Timelines], Split]] = {"leave_last_out": leave_last_out, "global_time": global_time}
    if name not in splits:
        raise ValueError(f"Unknown split {name!r}: choose {' or '.join(splits)}.")
    if not 0 <= withhold < 1:
        raise ValueError(f"data.withhold is a share from 0 to below 1, not {withhold}.")
    split = splits[name](timelines)
    kept = np.maximum(np.floor(timelines.lengths * (1 - withhold)), 1).astype(split.train_stop.dtype)
    return dataclasses.replace(split, train_stop=np.minimum(split.train_stop, kept))


def leave_last_out(timelines: Timelines, *, min_events: int = 3) -> Split:
    """Test on each user's last event and validate on the one before; users with fewer than `min_events` only train."""
    lengths = timelines.lengths
    users = np.flatnonzero(lengths >= max(min_events, 3))
    stop = np.where(lengths >= max(min_events, 3), lengths - 2, lengths)
    targets = {"validation": (users, lengths[users] - 2), "test": (users, lengths[users] - 1)}
    return Split("leave_last_out", stop, targets)


def global_time(timelines: Timelines, *, validation: float = 0.9, test: float = 0.95, min_history: int = 1) -> Split:
    """Cut all timelines at two moments, the `validation` and `test` quantiles of all timestamps.

    Events before the first cut train. A user's first event between the cuts is a validation target, the first after the second
    cut a test target, if at least `min_history` events precede it.

    Raises:
      ValueError: events without timestamps.
    """
    if "timestamp" not in timelines.columns:
        raise ValueError(f"{timelines.name} has no timestamps: split it by leave_last_out.")
    if not 0 < validation < test < 1:
        raise ValueError(
            f"The cuts of global_time are quantiles in order, 0 < validation < test < 1, not {validation} and {test}."
        )
    first, second = (_events_before(timelines, quantile(timelines, share)) for share in (validation, test))
    validated = np.flatnonzero((first < second) & (first >= min_history))
    tested = np.flatnonzero((second < timelines.lengths) & (second >= min_history))
    targets = {"validation": (validated, first[validated]), "test": (tested, second[tested])}
    return Split("global_time", first, targets)


def train_counts(timelines: Timelines, split: Split) -> Int[np.ndarray, " V"]:
    """Count each item's events in training; index 0 is PAD."""
    return event_counts(timelines, lambda chunk: chunk.positions < split.train_stop[chunk.users])


def _events_before(timelines: Timelines, cut: np.generic) -> Int[np.ndarray, " U"]:
    """Count each user's events before a moment."""
    counts = [
        np.bincount(chunk.users[timelines.order[chunk.events] < cut] - chunk.first, minlength=chunk.last - chunk.first)
        for chunk in timelines.chunks()
    ]
    return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def quantile(timelines: Timelines, share: float) -> np.generic:
    """Return the least time that at least `share` of all events are not later than, as np.quantile's `higher`.

    The time is searched by its highest 16 bits first, then by the next ones: four counts of all events, and no sort.
    """
    rank = int(np.ceil(share * (int(timelines.offsets[-1]) - 1)))  # how many events are sorted before it
    prefix = np.uint64(0)
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for chunk in timelines.chunks():
            digits = _sortable(timelines.order[chunk.events]) >> np.uint64(shift)
            digits = digits[digits >> np.uint64(16) == prefix]
            counts += np.bincount((digits & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
        digit = int(np.searchsorted(np.cumsum(counts), rank, "right"))
        rank -= int(counts[:digit].sum())
        prefix = (prefix << np.uint64(16)) + np.uint64(digit)
    return _time(prefix, timelines.order.dtype)


def _sortable(times: np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Return numbers that are in the same order as times, integers or floats."""
    if times.dtype.kind != "f":
        return times.astype(np.int64).view(np.uint64) ^ SIGN
    bits = times.astype(np.float64).view(np.uint64)
    return np.where(bits < SIGN, bits ^ SIGN, ~bits)  # of negative floats, the larger one has the larger bits


def _time(number: np.uint64, dtype: np.dtype) -> np.generic:
    """Return the time of which `_sortable` made a number."""
    if dtype.kind != "f":
        return (number ^ SIGN).view(np.int64)
    return (number ^ SIGN if number >= SIGN else ~number).view(np.float64)
