"""Bootstrap intervals: by hand, their coverage, and pairing; values of targets on disk."""

import numpy as np
import pytest

from user_llm.evals.bootstrap import compare, intervals, resampled_means
from user_llm.evals.measured import Measured, load_measured


def test_one_user_has_no_spread_and_two_have_three_means():
    np.testing.assert_array_equal(resampled_means(np.array([[0.3, 0.7]]), draws=5), [[0.3, 0.7]] * 5)
    means = resampled_means(np.array([[0.0, 2.0], [1.0, 4.0]]), draws=2000)
    assert set(np.unique(means[:, 0])) == {0.0, 0.5, 1.0}
    np.testing.assert_array_equal(means[:, 1], 2 + 2 * means[:, 0])  # the same users in both columns
    np.testing.assert_allclose([np.mean(means[:, 0] == mean) for mean in (0, 0.5, 1)], [0.25, 0.5, 0.25], atol=0.04)


@pytest.mark.slow
def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    samples = rng.random((300, 200)) < 0.3
    found = [
        intervals(resampled_means(sample[:, None].astype(float), draws=300, seed=i))[0] for i, sample in enumerate(samples)
    ]
    covered = np.mean([low <= 0.3 <= high for low, high in found])
    assert 0.91 < covered < 0.98


def test_a_small_difference_on_the_same_users_is_told_apart():
    rng = np.random.default_rng(0)
    base = (rng.random(1000) < 0.3).astype(float)
    better = np.maximum(base, rng.random(1000) < 0.02)
    found = compare({"reference": base, "better": better}, "reference", draws=2000)
    mean, own, difference, apart = found["better"]
    assert mean == better.mean() and difference == pytest.approx(better.mean() - base.mean())
    assert own[0] < base.mean() < own[1]  # by itself it could be the same
    assert 0 < apart[0] < difference < apart[1]
    assert found["reference"][2:] == (0.0, (0.0, 0.0))


def test_a_user_is_drawn_with_all_values():
    values, users = np.array([[0.0], [1.0], [0.0], [1.0]]), np.array([7, 3, 7, 3])
    assert set(np.unique(resampled_means(values, users, draws=200))) == {0.0, 0.5, 1.0}
    assert {0.25, 0.75} < set(np.unique(resampled_means(values, draws=200)))
    uneven = resampled_means(values[:3], users[:3], draws=2000)  # the first user has two values, the second one
    assert set(np.unique(uneven)) == {0.0, 1 / 3, 1.0}


def test_other_users_and_none_are_refused():
    with pytest.raises(ValueError, match="compared on the same users"):
        compare({"a": np.ones(3), "b": np.ones(2)}, "a")
    with pytest.raises(ValueError, match="No users"):
        compare({"a": np.ones(0)}, "a")


def test_values_are_read_as_they_were_saved(tmp_path):
    measured = Measured(
        np.array([3, 5]), np.array([7, 9]), {"recall@10/unseen": np.array([0.0, 1.0]), "mrr": np.array([0.5, 1.0])}
    )
    measured.save(tmp_path / "values", "next_item", "user_llm/generate")
    [path] = (tmp_path / "values").iterdir()
    assert path.name == "next_item.user_llm_generate.npz"
    task, method, found = load_measured(path)
    assert (task, method) == ("next_item", "user_llm/generate")
    assert found.metrics == {"recall@10/unseen": 0.5, "mrr": 0.75} and len(found) == 2
    np.testing.assert_array_equal(found.users, [3, 5])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="holds no values of targets"):
        load_measured(path)
