"""The benchmark of added items: what is taken out leaves no trace in training, and the rest stays as it was."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import benchmark_items

from user_llm.data.dataset import Dataset
from user_llm.data.splits import leave_last_out


def test_items_are_taken_out_of_training_alone(make_timelines):
    rng = np.random.default_rng(0)
    timelines = make_timelines([rng.integers(1, 21, n).tolist() for n in (8, 12, 3, 20, 9)], num_items=25)
    data = Dataset(timelines, leave_last_out(timelines))
    found = benchmark_items.parted(data, 0.2, seed=1)
    known, whole, train = len(found.train.timelines.catalogue.keys), found.whole, found.train
    counts = data.train_counts
    assert found.drawn.sum() == round(0.2 * (counts > 0).sum()) and not found.drawn[:known].any()
    assert (train.train_counts[1:] > 0).all() and known - 1 == (counts > 0).sum() - found.drawn.sum()
    # The same events under other numbers, with their own categories.
    place = {key: number for number, key in enumerate(timelines.catalogue.keys)}
    old = np.array([place[key] for key in whole.timelines.catalogue.keys])
    events = np.arange(len(timelines.item))
    seen, wanted = whole.timelines.features(events), timelines.features(events)
    np.testing.assert_array_equal(old[seen[:, 0]], wanted[:, 0])
    np.testing.assert_array_equal(seen[:, 1:], wanted[:, 1:])
    # In training, each user's events are those of before without the items that were taken out.
    stops = data.split.train_stop
    for user in range(len(timelines)):
        items = whole.timelines.items(user, 0, int(stops[user]))
        np.testing.assert_array_equal(train.timelines.items(user, 0, int(train.split.train_stop[user])), items[items < known])
    for part, (users, positions) in train.split.targets.items():
        targets = dict(zip(*whole.split.targets[part], strict=True))
        for user, position in zip(users, positions, strict=True):
            target = train.timelines.items(user, position, position + 1)
            np.testing.assert_array_equal(target, whole.timelines.items(user, targets[user], targets[user] + 1))
