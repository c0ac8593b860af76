"""Counting and the majority class, by hand."""

import numpy as np

from user_llm.data.splits import leave_last_out
from user_llm.tasks.favorite import Labels, OfFuture, OfHistory, favorite_baselines


def test_counting_solves_the_history_by_construction_and_the_future_only_where_taste_stays(make_timelines):
    # The fixture's item i has genre 1 + i % 3 and the even ones genre 4 as well. Two of three users favour genre 2 in training.
    timelines = make_timelines([[1, 7, 13, 1, 7], [1, 7, 13, 3, 9], [3, 9, 15, 3, 9]], num_items=16)
    split, labels = leave_last_out(timelines), Labels(timelines, feature="genres", whole=False)
    past = favorite_baselines(OfHistory(labels, split))
    np.testing.assert_array_equal(past["counting"].values["accuracy"], [1, 1, 1])
    np.testing.assert_array_equal(past["majority"].values["accuracy"], [1, 1, 0])
    users = OfFuture(labels, split).targets("test")[0]
    future = favorite_baselines(OfFuture(labels, split))
    np.testing.assert_array_equal(future["counting"].values["accuracy"], np.array([1, 0, 1])[users])
    np.testing.assert_array_equal(future["majority"].values["accuracy"], np.array([1, 0, 0])[users])
