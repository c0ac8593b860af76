import numpy as np

from user_llm.nn.recency import recency_bucket, recency_one_hot


def test_recency_buckets_by_hand():
    distance = np.array([-3, 0, 1, 2, 3, 6, 7, 14, 15, 10_000])
    np.testing.assert_array_equal(recency_bucket(distance, 8), [0, 0, 1, 1, 2, 2, 3, 3, 4, 7])
    # Exact at every power of two, where a logarithm might round down.
    powers = 2 ** np.arange(1, 20)
    np.testing.assert_array_equal(recency_bucket(powers - 1, 32), np.arange(1, 20))
    np.testing.assert_array_equal(recency_bucket(powers - 2, 32), np.arange(19))


def test_events_are_counted_back_from_the_last_real_one():
    mask = np.arange(6) < np.array([5, 1, 0])[:, None]
    found = np.asarray(recency_one_hot(mask, 4))
    np.testing.assert_array_equal(found.argmax(-1)[0, :5], [2, 2, 1, 1, 0])
    assert found.argmax(-1)[1, 0] == 0 and (found.sum(-1) == 1).all()
