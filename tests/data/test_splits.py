"""Both splits against answers by hand."""

import dataclasses

import numpy as np
import pytest

from user_llm.data.splits import global_time, leave_last_out, make_split


def test_leave_last_out_by_hand(make_timelines):
    split = leave_last_out(make_timelines([[1, 2, 3, 4], [1, 2], [], [5, 4, 3]]))
    np.testing.assert_array_equal(split.train_stop, [2, 2, 0, 1])
    np.testing.assert_array_equal(split.targets["validation"], [[0, 3], [2, 1]])
    np.testing.assert_array_equal(split.targets["test"], [[0, 3], [3, 2]])


def test_short_users_only_train(make_timelines):
    timelines = make_timelines([[1, 2, 3, 4], [1, 2, 3]])
    split = leave_last_out(timelines, min_events=4)
    np.testing.assert_array_equal(split.train_stop, [2, 3])
    np.testing.assert_array_equal(split.targets["test"], [[0], [3]])


# Times 0 to 19 over four users and one without events: the cuts are at 10 (validation) and 15 (test).
TIMES = [[0, 1, 2, 3, 10, 11, 15, 16], [4, 5, 12, 13], [], [14, 17], [6, 7, 8, 9, 18, 19]]


@pytest.fixture
def timed(make_timelines):
    return make_timelines([[1 + t % 7 for t in row] for row in TIMES], TIMES)


def test_global_time_by_hand(timed):
    split = global_time(timed, validation=0.5, test=0.75)
    np.testing.assert_array_equal(split.train_stop, [4, 2, 0, 0, 4])
    np.testing.assert_array_equal(split.targets["validation"], [[0, 1], [4, 2]])
    np.testing.assert_array_equal(split.targets["test"], [[0, 3, 4], [6, 1, 4]])


def test_global_time_trains_on_nothing_after_the_first_cut(timed):
    split = global_time(timed, validation=0.5, test=0.75)
    time = timed.columns["timestamp"]
    (chunk,) = timed.chunks()
    trained = chunk.positions < split.train_stop[chunk.users]
    assert time[trained].max() < 10 <= time[~trained].min()
    for part, cut in (("validation", 10), ("test", 15)):
        users, positions = split.targets[part]
        target = timed.offsets[users] + positions
        assert (time[target] >= cut).all()
        assert (time[target - 1] < cut).all()


def test_global_time_wants_some_history(timed):
    split = global_time(timed, validation=0.5, test=0.75, min_history=4)
    np.testing.assert_array_equal(split.targets["validation"], [[0], [4]])
    np.testing.assert_array_equal(split.targets["test"], [[0, 4], [6, 4]])


@pytest.mark.parametrize(("validation", "test"), [(0.9, 0.5), (0.5, 0.5), (0.5, 1.0), (0.0, 0.5)])
def test_cuts_must_be_in_order(timed, validation, test):
    with pytest.raises(ValueError, match="0 < validation < test < 1"):
        global_time(timed, validation=validation, test=test)


def test_global_time_needs_times(timed):
    timeless = dataclasses.replace(timed, columns={"rating": timed.columns["rating"]})
    with pytest.raises(ValueError, match="leave_last_out"):
        global_time(timeless)


@pytest.mark.parametrize("name", ["leave_last_out", "global_time"])
def test_splits_are_made_by_name(timed, name):
    assert make_split(timed, name).name == name


def test_unknown_split_is_refused(timed):
    with pytest.raises(ValueError, match="'random'"):
        make_split(timed, "random")
