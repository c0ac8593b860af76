"""Order of events, gaps, and the columns of features."""

import numpy as np
import pytest

from user_llm.data.timelines import GAP_BUCKETS, order_events, time_gap_bucket


def tied_events(seed=0):
    """Ten users with 20 events in ten seconds: many ties, rows shuffled."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(1, 11), 20)
    item = np.concatenate([rng.permutation(100)[:20] + 1 for _ in range(10)])
    time = rng.integers(0, 10, 200)
    rows = rng.permutation(200)
    return user[rows], item[rows], time[rows]


def ordered(columns, **options):
    user, item, time = columns
    order = order_events(user, user.astype(np.uint64), item, time, **options)
    return np.stack(columns)[:, order]


def test_events_are_sorted_by_user_then_time():
    user, _, time = ordered(tied_events(), ties="hashed", seed=1)
    assert (np.diff(user) >= 0).all()
    assert (np.diff(time)[np.diff(user) == 0] >= 0).all()


def test_hashed_ties_do_not_depend_on_the_order_of_the_file():
    columns = tied_events()
    shuffled = [column[np.random.default_rng(5).permutation(200)] for column in columns]
    np.testing.assert_array_equal(ordered(columns, ties="hashed", seed=1), ordered(shuffled, ties="hashed", seed=1))
    assert (ordered(columns, ties="file") != ordered(shuffled, ties="file")).any()


def test_hashed_ties_differ_by_seed_and_user():
    columns = tied_events()
    assert (ordered(columns, ties="hashed", seed=1)[1] != ordered(columns, ties="hashed", seed=2)[1]).any()
    items = np.tile(np.arange(1, 31), 2)
    users = np.repeat([1, 2], 30)
    _, found, _ = ordered((users, items, np.zeros(60, int)), ties="hashed", seed=0)
    assert (found[:30] != found[30:]).any()


def test_hashed_ties_tell_nothing_of_the_item_id():
    items = np.arange(1, 20_001)
    _, found, _ = ordered((np.ones_like(items), items, np.zeros_like(items)), ties="hashed", seed=0)
    assert abs(np.mean(np.diff(found) > 0) - 0.5) < 0.02
    assert abs(np.corrcoef(np.arange(len(found)), found)[0, 1]) < 0.03


def test_file_ties_keep_the_file():
    time = np.array([5, 5, 1, 5])
    order = order_events(np.ones(4, int), np.ones(4, np.uint64), np.array([9, 3, 4, 7]), time, ties="file")
    np.testing.assert_array_equal(order, [2, 0, 1, 3])


def test_unknown_order_of_ties_is_refused():
    with pytest.raises(ValueError, match="choose hashed or file"):
        order_events(*np.ones((1, 1), int), np.ones(1, np.uint64), *np.ones((2, 1), int), ties="random")


def test_gap_buckets_are_powers_of_two_seconds():
    seconds = np.array([-5, 0, 1, 2, 3, 4, 7, 8, 3600, 2**25 - 1, 2**25, 10**10])
    expected = [1, 1, 2, 3, 3, 4, 4, 5, 13, 26, 27, 27]
    np.testing.assert_array_equal(time_gap_bucket(seconds), expected)
    assert max(expected) == GAP_BUCKETS - 1


def test_events_hold_the_features_in_columns(make_timelines):
    timelines = make_timelines([[3, 1], [], [2, 4, 1]], [[100, 104], [], [7, 7, 2**30]])
    # item, rating, two genres, bucket of the gap: none at the start of a user, whatever the user before.
    np.testing.assert_array_equal(timelines.events(0, 0, 2), [[3, 1, 1, 0, 1], [1, 2, 2, 0, 4]])
    np.testing.assert_array_equal(timelines.events(2, 0, 3), [[2, 3, 3, 4, 1], [4, 4, 2, 4, 1], [1, 5, 2, 0, 27]])
    assert timelines.events(1, 0, 0).shape == (0, 5)
    everything = timelines.features(np.array([[4, -1], [1, 0]]))
    assert everything.dtype == np.int32
    np.testing.assert_array_equal(everything, [[[1, 5, 2, 0, 27], [0] * 5], [[1, 2, 2, 0, 4], [3, 1, 1, 0, 1]]])
    np.testing.assert_array_equal(timelines.items(2, 1, 3), [4, 1])


def test_users_and_positions_of_events(make_timelines):
    timelines = make_timelines([[3, 1], [], [2, 4, 1]])
    assert len(timelines) == 3
    np.testing.assert_array_equal(timelines.lengths, [2, 0, 3])
    (chunk,) = timelines.chunks()
    np.testing.assert_array_equal(chunk.users, [0, 0, 2, 2, 2])
    np.testing.assert_array_equal(chunk.positions, [0, 1, 0, 1, 2])
    np.testing.assert_array_equal(timelines.users_of(np.arange(5)), chunk.users)


def test_selected_features_keep_their_values_in_the_new_order(make_timelines):
    timelines = make_timelines([[3, 1], [2, 4, 1]])
    selected = timelines.select(("item", "gap", "genres"))
    np.testing.assert_array_equal(selected.events(1, 0, 3), timelines.events(1, 0, 3)[:, [0, 4, 2, 3]])
    with pytest.raises(ValueError, match="'brand'"):
        timelines.select(("item", "brand"))
