"""What every run checks of its data before it trains (DESIGN section 4): the field's usual ways to fool itself, found early."""

import functools
from collections.abc import Callable

import numpy as np

from user_llm.data.schema import Feature
from user_llm.data.splits import Split, train_counts
from user_llm.data.timelines import Chunk, Timelines, event_counts


def audit(timelines: Timelines, split: Split) -> dict[str, float]:
    """Count what matters about a dataset and its split.

    Returns:
      `items`: of the catalogue, all of which are ranked; `items_of_dropped_users`: those of them without an event, as all of
      their users are shorter than `min_events`; `untitled_items`: items whose key stands for a missing title, as of products and
      places without metadata; `tie_share`: neighbouring events of a user at the same time; `tied_at_test_share`: test targets
      that tie with the event before them; `cold_test_share`: test targets of items without a training event; `users_52`,
      `windows_52`: users with at least 52 events and their n - 52 windows, the threshold that fits the paper's MovieLens-20M
      counts best (82,977 users and 13,821,405 examples, PAPER.md).

    Raises:
      ValueError: no events, ids out of range, events out of order, duplicate events, a target that training may see, one
        that is both a validation and a test target, or in a split by time a training event that is not older than all targets.
    """
    _check_ids(timelines)
    _check_order(timelines)
    _check_duplicates(timelines)
    _check_leaks(timelines, split)
    lengths = timelines.lengths
    trained = train_counts(timelines, split) > 0
    events = event_counts(timelines)
    users, positions = split.targets["test"]
    targets = timelines.offsets[users] + positions
    test_items = timelines.item[targets]
    long = lengths[lengths >= 52]
    catalogue = timelines.catalogue
    untitled = np.array([title == key for title, key in zip(catalogue.titles, catalogue.keys, strict=True)])
    untitled[0] = False  # PAD
    facts = {
        **timelines.facts,
        "users": len(timelines),
        "items": timelines.schema.num_items,
        "items_of_dropped_users": timelines.schema.num_items - int((events > 0).sum()),
        "events": len(timelines.item),
        "untitled_items": int(untitled.sum()),
        "untitled_events": int(events[untitled].sum()),
        "train_events": int(split.train_stop.sum()),
        "validation_users": len(split.targets["validation"][0]),
        "test_users": len(users),
        "shortest": int(lengths.min()),
        **{f"length_q{q}": float(np.quantile(lengths, q / 100)) for q in (25, 50, 75)},
        "longest": int(lengths.max()),
        "cold_test_share": float(np.mean(~trained[test_items])) if len(users) else 0.0,
        "users_52": len(long),
        "windows_52": int((long - 52).sum()),
    }
    if "timestamp" in timelines.columns:
        pairs = max(len(timelines.item) - len(timelines), 1)
        facts["tie_share"] = sum(int(_tied(timelines, chunk).sum()) for chunk in timelines.chunks()) / pairs
        tied = (timelines.order[targets] == timelines.order[np.maximum(targets - 1, 0)]) & (positions > 0)
        facts["tied_at_test_share"] = float(np.mean(tied)) if len(users) else 0.0
    return facts


def _tied(timelines: Timelines, chunk: Chunk) -> np.ndarray:
    """Say of each event of a chunk whether it shares its time with the one before it in its timeline."""
    return _after(timelines.order[chunk.events], chunk) == 0


def _after(times: np.ndarray, chunk: Chunk) -> np.ndarray:
    """Return the time from the event before it in its timeline to each event of a chunk; 1 for a first event."""
    return np.where(chunk.positions == 0, 1, np.diff(times, prepend=0))


def _check_ids(timelines: Timelines) -> None:
    """Refuse timelines without events and ids that no vocabulary holds; only bags and text may hold PAD."""
    empty = np.flatnonzero(timelines.lengths == 0)
    if len(empty) or not len(timelines):
        whose = f"user {timelines.user_keys[empty[0]]}" if len(empty) else "every user"
        raise ValueError(f"{timelines.name}: the timeline of {whose} is empty; leave users without events out.")
    for feature in timelines.schema:  # the item first, as bags are looked up by it
        first, count = _first(timelines, functools.partial(_wrong_ids, timelines, feature))
        if first:
            raise ValueError(
                f"{timelines.name}: {_place(timelines, first)} has an id of {feature.name} outside 1..{feature.size - 1} ({count} such "
                "events); number ids from 1."
            )


def _wrong_ids(timelines: Timelines, feature: Feature, chunk: Chunk) -> np.ndarray:
    """Say which events of a chunk have an id that the feature's vocabulary does not hold; only bags may hold PAD."""
    highest = feature.size - 1
    if feature.kind == "item":
        return _outside(timelines.item[chunk.events], 1, highest)
    if feature.kind == "multi":
        return np.asarray(
            _outside(timelines.catalogue.multi[feature.name][timelines.item[chunk.events]], 0, highest).any(axis=1)
        )
    if feature.kind in ("time", "text"):
        return np.zeros(len(chunk.users), bool)  # whatever they are, their ids are computed and within bounds
    return _outside(timelines.columns[feature.name][chunk.events], 1, highest)


def _outside(ids: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    return (ids < lowest) | (ids > highest)


def _first(timelines: Timelines, wrong: Callable[[Chunk], np.ndarray]) -> tuple[tuple[int, int] | None, int]:
    """Return the user and position of the first event that is wrong, and how many are."""
    first, count = None, 0
    for chunk in timelines.chunks():
        rows = np.flatnonzero(wrong(chunk))
        count += len(rows)
        if first is None and len(rows):
            first = int(chunk.users[rows[0]]), int(chunk.positions[rows[0]])
    return first, count


def _place(timelines: Timelines, event: tuple[int, int]) -> str:
    user, position = event
    return f"event {position} of user {timelines.user_keys[user]}"


def _check_order(timelines: Timelines) -> None:
    if not timelines.ordered:
        return
    late, _ = _first(timelines, lambda chunk: _after(timelines.order[chunk.events], chunk) < 0)
    if late:
        raise ValueError(
            f"{timelines.name}: {_place(timelines, late)} is older than the event before it; sort timelines by time."
        )


def _check_duplicates(timelines: Timelines) -> None:
    """Refuse the same item twice at the same time or order (or, where there is neither, twice in a row)."""
    again, count = _first(timelines, lambda chunk: _repeats(timelines, chunk))
    if again:
        user, position = again
        item = timelines.catalogue.titles[int(timelines.items(user, position, position + 1)[0])]
        raise ValueError(
            f"{timelines.name}: user {timelines.user_keys[user]} has the event {item!r} twice ({count} such events); drop duplicates."
        )


def _repeats(timelines: Timelines, chunk: Chunk) -> np.ndarray:
    """Say which events of a chunk are there once more, before."""
    item = timelines.item[chunk.events]
    if not timelines.ordered:
        return (np.diff(item, prepend=0) == 0) & (chunk.positions > 0)
    tied = _tied(timelines, chunk)
    rows = np.flatnonzero(tied | np.append(tied[1:], False))  # what shares its time with no other is no duplicate
    time, users = timelines.order[chunk.events][rows], chunk.users[rows]
    order = np.lexsort((item[rows], time, users))
    keys = [key[order] for key in (users, time, item[rows])]
    same = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    repeats = np.zeros(len(item), bool)
    repeats[rows[order[1:][same]]] = True
    return repeats


def _check_leaks(timelines: Timelines, split: Split) -> None:
    for part, (users, positions) in split.targets.items():
        leaked = positions < split.train_stop[users]
        if leaked.any():
            user = int(users[np.flatnonzero(leaked)[0]])
            raise ValueError(
                f"{timelines.name}: the {part} target of user {timelines.user_keys[user]} lies within its training events "
                f"({int(leaked.sum())} such users); split before cutting windows."
            )
        if (positions < 0).any() or (positions >= timelines.lengths[users]).any():
            raise ValueError(f"{timelines.name}: a {part} target lies outside its timeline.")
    both = np.intersect1d(*(timelines.offsets[users] + positions for users, positions in split.targets.values()))
    if len(both):
        whose = timelines.user_keys[int(timelines.users_of(both[0]))]
        raise ValueError(f"{timelines.name}: a target of user {whose} is in validation and test ({len(both)} such events).")
    if split.name == "global_time":
        _check_cut(timelines, split)


def _check_cut(timelines: Timelines, split: Split) -> None:
    """Refuse training events of whatever user from the time of the targets."""
    time = timelines.order
    first = min(
        (time[timelines.offsets[users] + positions].min() for users, positions in split.targets.values() if len(users)),
        default=None,
    )
    if first is None:
        return
    trains = lambda chunk: chunk.positions < split.train_stop[chunk.users]  # noqa: E731
    late, count = _first(timelines, lambda chunk: trains(chunk) & (time[chunk.events] >= first))
    if late:
        raise ValueError(
            f"{timelines.name}: user {timelines.user_keys[late[0]]} has training events that are not older than all targets ({count} "
            "such events); cut all timelines at one time."
        )
