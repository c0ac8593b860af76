"""A stored user: bytes that say the same again, and updates that equal having had all events at once."""

import dataclasses
import zlib

import numpy as np
import pytest

from user_llm.data.timelines import Timelines, order_events
from user_llm.serving.user import MAGIC, User, from_timelines, joined, unknown_user

SCHEMA_WIDTH = 5  # item, rating, two genres, gap


def sorted_timelines(make_timelines, item, tick, key) -> Timelines:
    """Return one user's events in the order of training."""
    none = np.zeros(len(item), np.int64)
    order = order_events(none, np.full(len(item), key, np.uint64), item, tick, ties="hashed", seed=3)
    return make_timelines([item[order].tolist()], [tick[order].tolist()], num_items=9)


NONE = np.zeros(0, np.int64)


def user_of(make_timelines, item, tick, keep, unknown=NONE) -> User:
    if not len(item):
        return unknown_user("m", SCHEMA_WIDTH, key=7, ticks_per_second=1)
    made = sorted_timelines(make_timelines, np.asarray(item), np.asarray(tick), 7)
    made.columns["rating"] = (1 + made.item % 10).astype(np.int32)  # of the item, wherever it stands
    those = np.array([0])
    return from_timelines(made, those, keep=keep, model="m", keys=[7], unknown=[unknown], ticks_per_second=1)[0]


def facts(user: User) -> tuple:
    return (
        user.events.tolist(),
        user.ticks.tolist(),
        user.before,
        user.seen.tolist(),
        user.count,
        user.unknown,
        user.last_unknown,
    )


@pytest.mark.parametrize("keep", [None, 4, 6])
def test_a_user_with_more_events_equals_one_who_had_all_at_once(make_timelines, keep):
    """Whatever comes later, ties at the seam and several in one second included; what comes twice counts once."""
    schema = make_timelines([[1]], num_items=9).schema
    rng = np.random.default_rng(0)
    for _ in range(60):
        length, split = int(rng.integers(1, 13)), int(rng.integers(0, 13))
        tick = np.sort(rng.integers(0, 40, length)) * 3600
        item = rng.integers(1, 10, length)
        item, tick = np.unique(np.stack([item, tick]), axis=1)
        order = np.argsort(tick, kind="stable")
        item, tick = item[order], tick[order]
        old = user_of(make_timelines, item[:split], tick[:split], keep)
        if split >= len(item):
            continue
        again = old.events[-1:, 0], old.ticks[-1:]  # comes once more
        more = user_of(make_timelines, np.append(item[split:], again[0]), np.append(tick[split:], again[1]), None)
        whole = user_of(make_timelines, item, tick, keep)
        assert facts(joined(old, more, schema, unknown=NONE, keep=keep, ties="hashed", seed=3)) == facts(whole)


@pytest.mark.parametrize("keep", [None, 0, 3])
def test_an_update_that_is_repeated_or_overlaps_equals_all_events_at_once(make_timelines, keep):
    """Of any past events, those no longer kept and those of unknown items included: counters, times and features."""
    schema = make_timelines([[1]], num_items=9).schema
    rng = np.random.default_rng(1)
    for _ in range(40):
        length = int(rng.integers(1, 13))
        tick = np.cumsum(rng.integers(1, 4, length)) * 3600
        item, strange = rng.integers(1, 10, length), np.unique(rng.integers(0, 50, int(rng.integers(0, 5)))) * 3600
        user = unknown_user("m", SCHEMA_WIDTH, key=7, ticks_per_second=1)
        for until in np.sort(rng.integers(0, length + 1, 3)).tolist() * 2:  # the second half repeats what came already
            start, end = int(rng.integers(0, until + 1)), tick[until - 1] if until else -1
            had = user.count == 0  # no event may be left out the first time
            rows = slice(0 if had else min(start, user.count), until)
            more = user_of(make_timelines, item[rows], tick[rows], None)
            user = joined(user, more, schema, unknown=strange[strange <= end], keep=keep, ties="hashed", seed=3)
            most = max(user.count, until)
            upto = strange[strange <= (tick[most - 1] if most else -1)]
            assert facts(user) == facts(user_of(make_timelines, item[:most], tick[:most], keep, upto))


def test_a_late_event_that_may_have_been_counted_is_not_counted_again(make_timelines):
    """The user no longer keeps it, and so cannot know. The rule holds however often the update is repeated."""
    schema = make_timelines([[1]], num_items=9).schema
    user = user_of(make_timelines, [1, 2, 3, 4, 5], [10, 20, 30, 40, 50], 2, np.array([25]))
    add = lambda user, item, tick, unknown=(): joined(  # noqa: E731
        user,
        user_of(make_timelines, item, tick, None),
        schema,
        unknown=np.array(unknown, np.int64),
        keep=2,
        ties="hashed",
        seed=3,
    )
    for item, tick, unknown, count, of_unknown in (
        ([1], [10], [], 5, 1),  # one of them
        ([1], [11], [], 5, 1),  # it may be one of them
        ([9], [11], [], 6, 1),  # it cannot be: the user never had the item
        ([1], [35], [], 6, 1),  # nor this, which is later than they are
        ([], [], [24, 25], 5, 1),
        ([], [], [25, 26], 5, 2),
    ):
        once = add(user, item, tick, unknown)
        assert (once.count, once.unknown) == (count, of_unknown), (item, tick, unknown)
        assert facts(add(once, item, tick, unknown)) == facts(once)


def test_an_event_that_comes_late_takes_its_place(make_timelines):
    schema = make_timelines([[1]], num_items=9).schema
    whole = user_of(make_timelines, [1, 2, 3, 4], [0, 10, 5000, 90000], 3)
    late = joined(
        user_of(make_timelines, [1, 3, 4], [0, 5000, 90000], 3), user_of(make_timelines, [2], [10], 3), schema,
        unknown=NONE, keep=3, ties="hashed", seed=3,
    )  # fmt: skip
    assert facts(late) == facts(whole)
    older = joined(whole, user_of(make_timelines, [9], [4], 3), schema, unknown=NONE, keep=3, ties="hashed", seed=3)
    assert facts(older) == facts(user_of(make_timelines, [1, 9, 2, 3, 4], [0, 4, 10, 5000, 90000], 3))
    assert older.events[0, -1] != whole.events[0, -1]  # the gap to the event before


def test_bytes_hold_the_user_and_round_the_tokens_to_a_127th_of_the_largest(make_timelines):
    rng = np.random.default_rng(1)
    ticks = np.sort(rng.integers(0, 10**9, 150))
    user = user_of(make_timelines, rng.integers(1, 10, 150), ticks, 100, unknown=np.array([3, 8]))
    user = dataclasses.replace(user, tokens=rng.normal(size=(16, 64)).astype(np.float32))
    again = User.from_bytes(user.to_bytes())
    assert facts(again) == facts(user) and (again.model, again.key, again.unknown, again.last_unknown) == ("m", 7, 2, 8)
    assert again.last_time == user.last_time == float(user.ticks[-1])
    step = np.abs(user.tokens).max(axis=1, keepdims=True) / 127
    assert (np.abs(again.tokens - user.tokens) <= step / 2 + 1e-7).all()
    empty = unknown_user("m", SCHEMA_WIDTH, key=2**64 - 1, ticks_per_second=1)
    assert facts(User.from_bytes(empty.to_bytes())) == facts(empty) and empty.last_time is None
    zero = dataclasses.replace(user, tokens=np.zeros((2, 3), np.float32))
    assert not User.from_bytes(zero.to_bytes()).tokens.any()


def sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def header(text: bytes, arrays: bytes = b"") -> bytes:
    return sealed(MAGIC + len(text).to_bytes(4, "little") + text + zlib.compress(arrays))


HUGE = (
    b'{"model":"m","key":1,"count":1,"unknown":0,"before":null,"last_unknown":null,"ticks_per_second":1,"shapes":{"tokens":[99999999,9999],'
    b'"scales":[99999999],"events":[1,1],"ticks":[1],"seen":[1]}}'
)


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"a pickle", MAGIC, sealed(MAGIC), header(b"[1]"), header(b"{}"), header(b"{" * 5000), header(HUGE), sealed(MAGIC + b"\xff" * 40)],
)  # fmt: skip
def test_bytes_of_something_else_are_refused_in_one_sentence(data):
    with pytest.raises(ValueError, match="These bytes hold no user"):
        User.from_bytes(data)


def test_one_flipped_bit_is_refused(make_timelines):
    data = bytearray(user_of(make_timelines, [1, 2, 3], [0, 10, 20], 3).to_bytes())
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises(ValueError, match="These bytes hold no user"):
            User.from_bytes(bytes(changed))
    with pytest.raises(ValueError, match="These bytes hold no user"):
        User.from_bytes(bytes(data[:-1]))
