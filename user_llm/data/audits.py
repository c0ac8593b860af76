"""What every run checks of its data before it trains (DESIGN section 4): the field's usual ways to fool itself, found early."""

import numpy as np

from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines


def audit(timelines: Timelines, split: Split) -> dict[str, float]:
    """Count what matters about a dataset and its split.

    Returns:
      `items`: of the catalogue, all of which are ranked; `items_of_dropped_users`: those of them without an event, as all of
      their users are shorter than `min_events`; `untitled_items`: items whose key stands for a missing title, as of products and
      places without metadata; `tie_share`: neighbouring events of a user in the same second; `tied_at_test_share`: test targets
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
    trained = np.zeros(timelines.schema.num_items + 1, bool)
    trained[timelines.item[timelines.positions < split.train_stop[timelines.users]]] = True
    users, positions = split.targets["test"]
    test_items = timelines.item[timelines.offsets[users] + positions]
    long = lengths[lengths >= 52]
    catalogue = timelines.catalogue
    untitled = np.array([title == key for title, key in zip(catalogue.titles, catalogue.keys, strict=True)])
    untitled[0] = False  # PAD
    facts = {
        **timelines.facts,
        "users": len(timelines),
        "items": timelines.schema.num_items,
        "items_of_dropped_users": timelines.schema.num_items - len(np.unique(timelines.item)),
        "events": len(timelines.item),
        "untitled_items": int(untitled.sum()),
        "untitled_events": int(untitled[timelines.item].sum()),
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
        tied = _tied(timelines)
        pairs = max(len(timelines.item) - len(timelines), 1)
        facts["tie_share"] = float(tied.sum() / pairs)
        facts["tied_at_test_share"] = float(np.mean(tied[timelines.offsets[users] + positions])) if len(users) else 0.0
    return facts


def _tied(timelines: Timelines) -> np.ndarray:
    """Say of each event whether it shares its second with the one before it in its timeline."""
    same = np.diff(timelines.columns["timestamp"], prepend=-1) == 0
    return same & (timelines.positions > 0)


def _check_ids(timelines: Timelines) -> None:
    """Refuse timelines without events and ids that no vocabulary holds; only bags and text may hold PAD."""
    empty = np.flatnonzero(timelines.lengths == 0)
    if len(empty) or not len(timelines):
        whose = f"user {timelines.user_keys[empty[0]]}" if len(empty) else "every user"
        raise ValueError(f"{timelines.name}: the timeline of {whose} is empty; leave users without events out.")
    item, num_items = timelines.item, timelines.schema.num_items
    _refuse_id(timelines, "item", np.logical_or(item < 1, item > num_items), num_items)  # first, as bags are looked up by item
    for feature in timelines.schema:
        ids = timelines.features[:, timelines.schema.columns(feature.name)]
        lowest = 0 if feature.kind in ("multi", "text") else 1
        wrong = np.any((ids < lowest) | (ids >= feature.size), axis=1)
        _refuse_id(timelines, feature.name, np.asarray(wrong), feature.size - 1)


def _refuse_id(timelines: Timelines, name: str, wrong: np.ndarray, highest: int) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{timelines.name}: event {timelines.positions[row]} of user {timelines.user_keys[timelines.users[row]]} has an id of "
            f"{name} outside 1..{highest} ({int(wrong.sum())} such events); number ids from 1."
        )


def _check_order(timelines: Timelines) -> None:
    if "timestamp" not in timelines.columns:
        return
    late = (np.diff(timelines.columns["timestamp"], prepend=0) < 0) & (timelines.positions > 0)
    if late.any():
        row = int(np.flatnonzero(late)[0])
        raise ValueError(
            f"{timelines.name}: event {timelines.positions[row]} of user {timelines.user_keys[timelines.users[row]]} is older than "
            "the event before it; sort timelines by time."
        )


def _check_duplicates(timelines: Timelines) -> None:
    """Refuse the same item twice in the same second (or, without times, twice in a row)."""
    time = timelines.columns.get("timestamp", np.zeros(len(timelines.item), np.int64))
    if "timestamp" not in timelines.columns:
        again = (np.diff(timelines.item, prepend=0) == 0) & (timelines.positions > 0)
        row = np.flatnonzero(again)
    else:
        order = np.lexsort((timelines.item, time, timelines.users))
        keys = np.stack([timelines.users[order], time[order], timelines.item[order]])
        row = order[1:][(np.diff(keys) == 0).all(axis=0)]
    if len(row):
        item = timelines.catalogue.titles[timelines.item[row[0]]]
        user = timelines.user_keys[timelines.users[row[0]]]
        raise ValueError(
            f"{timelines.name}: user {user} has the event {item!r} twice ({len(row)} such events); drop duplicates."
        )


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
        user = timelines.user_keys[timelines.users[both[0]]]
        raise ValueError(f"{timelines.name}: a target of user {user} is in validation and test ({len(both)} such events).")
    if split.name == "global_time":
        _check_cut(timelines, split)


def _check_cut(timelines: Timelines, split: Split) -> None:
    """Refuse training events of whatever user from the time of the targets."""
    time = timelines.columns["timestamp"]
    first = min(
        (time[timelines.offsets[users] + positions].min() for users, positions in split.targets.values() if len(users)),
        default=None,
    )
    late = (timelines.positions < split.train_stop[timelines.users]) & (first is not None and time >= first)
    if late.any():
        user = timelines.user_keys[timelines.users[np.flatnonzero(late)[0]]]
        raise ValueError(
            f"{timelines.name}: user {user} has training events that are not older than all targets ({int(late.sum())} such events); "
            "cut all timelines at one time."
        )
