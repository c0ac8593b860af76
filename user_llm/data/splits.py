"""Train, validation and test by time. Split first, window after: no window ever holds an event that is a target elsewhere."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from user_llm.data.timelines import Timelines


@dataclasses.dataclass(frozen=True)
class Split:
    """Which events train and which are targets.

    Attributes:
      train_stop: events [0, train_stop) of each user may be used in training.
      targets: for `validation` and `test`, (users, positions); a target's history is all events before its position, so the
        test history holds the validation event.
    """

    name: str
    train_stop: Int[np.ndarray, "U"]
    targets: dict[str, tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]]


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
    time = timelines.columns["timestamp"]
    cuts = np.quantile(time, [validation, test], method="higher")
    before = [np.add.reduceat(np.append(time < cut, False), timelines.offsets[:-1]) for cut in cuts]
    first, second = (np.where(timelines.lengths > 0, count, 0) for count in before)
    validated = np.flatnonzero((first < second) & (first >= min_history))
    tested = np.flatnonzero((second < timelines.lengths) & (second >= min_history))
    targets = {"validation": (validated, first[validated]), "test": (tested, second[tested])}
    return Split("global_time", first, targets)
