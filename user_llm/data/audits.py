"""What every run checks of its data before it trains (DESIGN section 4): the field's usual ways to fool itself, found early."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath

from user_llm.common.files import whole
from user_llm.common.records import parse, read_file
from user_llm.data.schema import Feature
from user_llm.data.splits import Split
from user_llm.data.timelines import Chunk, Timelines

VERSION = 1  # of what is checked and counted; results that another version kept are not used

Facts = dict[str, float]


def audit(timelines: Timelines, split: Split) -> Facts:
    """Count what matters about a dataset and its split.

    The result for stored timelines is kept beside them, so that later starts need not read all events.

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
    if timelines.origin is None:
        return _audit(timelines, split)
    key = _key(timelines.origin.identity, timelines, split)
    path = timelines.origin.folder / f"audit-{key[:16]}.json"
    facts = _kept(path, key)
    if facts is None:
        facts = _audit(timelines, split)
        with contextlib.suppress(OSError), whole(epath.Path(path)) as target:
            target.write_text(json.dumps({"facts": facts, "sha256": _digest(key, facts)}, indent=1))
    return facts


def _key(identity: str, timelines: Timelines, split: Split) -> str:
    """Return what tells an audit from those of other data, splits and versions of the checks."""
    digest = hashlib.sha256(f"{VERSION} {identity} {timelines.schema} {split.name}".encode())
    for array in (split.train_stop, *(array for part in sorted(split.targets) for array in split.targets[part])):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _digest(key: str, facts: Facts) -> str:
    return hashlib.sha256(f"{key} {json.dumps(facts)}".encode()).hexdigest()


def _kept(path: Path, key: str) -> Facts | None:
    """Return the result that a file keeps, or None if there is none, or it is damaged or of something else."""
    try:
        kept = parse(read_file(path))
        return kept["facts"] if kept["sha256"] == _digest(key, kept["facts"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _audit(timelines: Timelines, split: Split) -> Facts:
    """Read all events once, check them, and count."""
    lengths = timelines.lengths
    _check_lengths(timelines)
    _check_leaks(timelines, split)
    checks = [*_id_checks(timelines), *_order_checks(timelines), *_cut_checks(timelines, split)]
    counts, trained = np.zeros(timelines.schema.num_items + 1, np.int64), np.zeros(timelines.schema.num_items + 1, bool)
    ties = 0
    for chunk in timelines.chunks():
        events = _Events(timelines, split, chunk)
        for check in checks:
            check.look(events)
        if not any(check.count for check in checks):
            counts += np.bincount(events.item, minlength=len(counts))
            trained[events.item[events.trains]] = True
            ties += int(np.count_nonzero(events.tied))
    for check in checks:
        if check.count:
            raise ValueError(f"{timelines.name}: {check.sentence(*check.first, check.count)}")
    users, positions = split.targets["test"]
    targets = timelines.offsets[users] + positions
    long = lengths[lengths >= 52]
    catalogue = timelines.catalogue
    untitled = np.array([title == key for title, key in zip(catalogue.titles, catalogue.keys, strict=True)])
    untitled[0] = False  # PAD
    facts = {
        **timelines.facts,
        "users": len(timelines),
        "items": timelines.schema.num_items,
        "items_of_dropped_users": timelines.schema.num_items - int((counts > 0).sum()),
        "events": len(timelines.item),
        "untitled_items": int(untitled.sum()),
        "untitled_events": int(counts[untitled].sum()),
        "train_events": int(split.train_stop.sum()),
        "validation_users": len(split.targets["validation"][0]),
        "test_users": len(users),
        "shortest": int(lengths.min()),
        **{f"length_q{q}": float(np.quantile(lengths, q / 100)) for q in (25, 50, 75)},
        "longest": int(lengths.max()),
        "cold_test_share": float(np.mean(~trained[timelines.item[targets]])) if len(users) else 0.0,
        "users_52": len(long),
        "windows_52": int((long - 52).sum()),
    }
    if "timestamp" in timelines.columns:
        facts["tie_share"] = ties / max(len(timelines.item) - len(timelines), 1)
        tied = (timelines.order[targets] == timelines.order[np.maximum(targets - 1, 0)]) & (positions > 0)
        facts["tied_at_test_share"] = float(np.mean(tied)) if len(users) else 0.0
    return facts


class _Events:
    """The events of a chunk, of which each column is read once."""

    def __init__(self, timelines: Timelines, split: Split, chunk: Chunk):
        self.timelines, self.split, self.chunk = timelines, split, chunk

    @functools.cached_property
    def item(self) -> np.ndarray:
        return self.timelines.item[self.chunk.events]

    @functools.cached_property
    def time(self) -> np.ndarray:
        return self.timelines.order[self.chunk.events]

    @functools.cached_property
    def after(self) -> np.ndarray:
        """The time from the event before it in its timeline to each event; 1 for a first event."""
        after = np.diff(self.time, prepend=0)
        after[self.chunk.offsets[:-1] - self.chunk.offsets[0]] = 1
        return after

    @functools.cached_property
    def tied(self) -> np.ndarray:
        """Whether each event shares its time with the one before it in its timeline."""
        return self.after == 0 if self.timelines.ordered else np.zeros(len(self.item), bool)

    @functools.cached_property
    def trains(self) -> np.ndarray:
        """Whether each event is one of training."""
        stop = self.split.train_stop[self.chunk.first : self.chunk.last]
        return self.chunk.positions < np.repeat(stop, np.diff(self.chunk.offsets))


@dataclasses.dataclass
class _Check:
    """What no event may be.

    Attributes:
      wrong: says which events of a chunk are.
      sentence: says so of the first one, given by its user and position, and of the count of all.
      first, count: of those seen.
    """

    wrong: Callable[[_Events], np.ndarray]
    sentence: Callable[[int, int, int], str]
    first: tuple[int, int] = (0, 0)
    count: int = 0

    def look(self, events: _Events) -> None:
        rows = np.flatnonzero(self.wrong(events))
        if len(rows) and not self.count:
            self.first = int(events.chunk.users[rows[0]]), int(events.chunk.positions[rows[0]])
        self.count += len(rows)


def _check_lengths(timelines: Timelines) -> None:
    empty = np.flatnonzero(timelines.lengths == 0)
    if len(empty) or not len(timelines):
        whose = f"user {timelines.user_keys[empty[0]]}" if len(empty) else "every user"
        raise ValueError(f"{timelines.name}: the timeline of {whose} is empty; leave users without events out.")


def _id_checks(timelines: Timelines) -> list[_Check]:
    """Return the checks for ids that no vocabulary holds: of the item first, as bags are looked up by it."""

    def sentence(feature: Feature, user: int, position: int, count: int) -> str:
        return (
            f"event {position} of user {timelines.user_keys[user]} has an id of {feature.name} outside 1..{feature.size - 1} "
            f"({count} such events); number ids from 1."
        )

    wrong = {feature: _wrong_ids(timelines, feature) for feature in timelines.schema}
    return [_Check(check, functools.partial(sentence, feature)) for feature, check in wrong.items() if check]


def _wrong_ids(timelines: Timelines, feature: Feature) -> Callable[["_Events"], np.ndarray] | None:
    """Return what says which events have an id that the feature's vocabulary does not hold, or None where no event can.

    Only bags may hold PAD. Ids of times and texts are computed, and so within bounds.
    """
    highest = feature.size - 1
    if feature.kind == "item":
        return lambda events: _outside(events.item, 1, highest)
    if feature.kind == "multi":
        bad = _outside(timelines.catalogue.multi[feature.name], 0, highest).any(axis=1)
        return (lambda events: np.take(bad, events.item, mode="clip")) if bad.any() else None
    if feature.kind in ("time", "text"):
        return None
    column = timelines.columns[feature.name]
    return lambda events: _outside(column[events.chunk.events], 1, highest)


def _outside(ids: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    return (ids < lowest) | (ids > highest)


def _order_checks(timelines: Timelines) -> list[_Check]:
    """Return the checks for times that go back, and for an item twice at the same time (or without times, twice in a row)."""

    def late(user: int, position: int, count: int) -> str:
        whose = f"event {position} of user {timelines.user_keys[user]}"
        return f"{whose} is older than the event before it; sort timelines by time."

    def again(user: int, position: int, count: int) -> str:
        item = timelines.catalogue.titles[int(timelines.items(user, position, position + 1)[0])]
        return f"user {timelines.user_keys[user]} has the event {item!r} twice ({count} such events); drop duplicates."

    if not timelines.ordered:
        return [_Check(lambda events: (np.diff(events.item, prepend=0) == 0) & (events.chunk.positions > 0), again)]
    return [_Check(lambda events: events.after < 0, late), _Check(_repeats, again)]


def _repeats(events: _Events) -> np.ndarray:
    """Say which events of a chunk are there once more, before."""
    repeats = np.zeros(len(events.item), bool)
    rows = np.flatnonzero(events.tied | np.append(events.tied[1:], False))  # what shares its time with no other is no duplicate
    if len(rows):
        # One number for each user, time and item.
        item = events.item[rows].astype(np.int64)
        number = np.cumsum(~events.tied[rows]) * (item.max() - item.min() + 1) + item
        order = np.argsort(number, kind="stable")
        repeats[rows[order[1:][np.diff(number[order]) == 0]]] = True
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
    validation, test = (np.sort(timelines.offsets[users] + positions) for users, positions in split.targets.values())
    both = test[np.searchsorted(validation, test, "right") > np.searchsorted(validation, test)]  # quicker than np.intersect1d
    if len(both):
        whose = timelines.user_keys[int(timelines.users_of(both[0]))]
        raise ValueError(f"{timelines.name}: a target of user {whose} is in validation and test ({len(both)} such events).")


def _cut_checks(timelines: Timelines, split: Split) -> list[_Check]:
    """Return the check for training events of whatever user from the time of the targets, in a split by time."""
    targets = [timelines.offsets[users] + positions for users, positions in split.targets.values() if len(users)]
    if split.name != "global_time" or not targets:
        return []
    first = min(timelines.order[numbers].min() for numbers in targets)
    return [
        _Check(
            lambda events: events.trains & (events.time >= first),
            lambda user, position, count: (
                f"user {timelines.user_keys[user]} has training events that are not older than all targets ({count} such events); "
                "cut all timelines at one time."
            ),
        )
    ]
