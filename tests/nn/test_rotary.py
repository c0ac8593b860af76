import jax
import jax.numpy as jnp
import numpy as np
import pytest

from user_llm.nn.rotary import RopeScaling, Rotation, apply_rope, rope_frequencies, rotation

turn = jax.jit(lambda x, at, frequencies: apply_rope(x, rotation(at, frequencies)))


def test_rope_turns_by_position_times_frequency_and_scores_by_distance():
    frequencies = rope_frequencies(4, 100.0)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-6)
    x = np.array([1.0, 1.0, 0.0, 0.0], np.float32).reshape(1, 1, 1, 4)  # pairs (0, 2) and (1, 3)
    turned = np.asarray(turn(x, np.array([[3]]), frequencies))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)], rtol=1e-5)

    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    frequencies = rope_frequencies(8, 10_000.0)

    def score(at_q, at_k):
        return np.sum(np.asarray(turn(q, np.array([[at_q]]), frequencies)) * turn(k, np.array([[at_k]]), frequencies))

    np.testing.assert_allclose(score(7, 4), score(103, 100), rtol=1e-4)
    assert abs(score(7, 4) - score(7, 5)) > 1e-3


def test_numbers_beyond_the_frequencies_are_not_turned():
    x = np.arange(1.0, 7.0, dtype=np.float32).reshape(1, 1, 1, 6)
    turned = np.asarray(turn(x, np.array([[2]]), rope_frequencies(2, 100.0)))[0, 0, 0]  # the pair (0, 1) alone
    cos, sin = np.cos(2), np.sin(2)
    np.testing.assert_allclose(turned, [cos - 2 * sin, 2 * cos + sin, 3, 4, 5, 6], rtol=1e-5)


def test_scaled_rotary_frequencies_by_hand():
    plain = np.asarray(rope_frequencies(8, 10_000.0))  # 1, 0.1, 0.01, 0.001
    scaled = lambda *how, **more: rope_frequencies(8, 10_000.0, RopeScaling(*how, **more)) / plain  # noqa: E731
    np.testing.assert_allclose(scaled("linear", 4.0), [0.25] * 4, rtol=1e-6)
    # Within 628 positions they turn some 100, 10, 1 and 0.1 times: one is kept, one is kept in part, and two are divided.
    kept = (62.8 / (2 * np.pi) - 1) / (21 - 1)
    found = scaled("llama3", 4.0, low_freq_factor=1.0, high_freq_factor=21.0, original_length=628)
    np.testing.assert_allclose(found, [1, kept + (1 - kept) / 4, 1 / 4, 1 / 4], rtol=1e-5)
    # Within 6284 positions frequency n turns some 1000 / 10^n times: 100 and 1 turns are the ends 1 and 3, or a little more.
    yarn = {"original_length": 6284, "fast_turns": 100.0, "slow_turns": 1.0}
    np.testing.assert_allclose(scaled("yarn", 4.0, **yarn, whole_numbers=False), [1, 1, 0.5 + 0.5 / 4, 1 / 4], rtol=1e-4)
    np.testing.assert_allclose(scaled("yarn", 4.0, **yarn), [1, 1, 2 / 3 + 1 / 12, 1 / 3 + 2 / 12], rtol=1e-5)  # ends 1 and 4
    np.testing.assert_allclose(scaled("longrope", 9.0, factors=(1.0, 2.0, 4.0, 5.0)), [1, 0.5, 0.25, 0.2], rtol=1e-6)
    with pytest.raises(ValueError, match="Unknown scaling 'dynamic' of rotary positions: choose one of linear"):
        RopeScaling("dynamic", 4.0)


def test_magnitude_and_growth_of_queries_by_hand():
    scaling = RopeScaling("yarn", 4.0, original_length=10, magnitude=2.0, query_growth=0.5)
    found = rotation(np.array([[0, 9, 10, 39]]), jnp.array([0.25]), scaling)
    np.testing.assert_allclose(found.cos[0, :, 0, 0], 2 * np.cos([0, 2.25, 2.5, 9.75]), rtol=1e-5)
    np.testing.assert_allclose(found.growth[0, :, 0, 0], [1, 1, 1 + 0.5 * np.log(2), 1 + 0.5 * np.log(4)], rtol=1e-6)
    assert rotation(np.array([[0]]), jnp.array([0.25])).growth is None


def test_a_still_rotation_turns_nothing():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 4)).astype(np.float32)
    still = rotation(np.arange(3)[None], rope_frequencies(4, 100.0)).still()
    assert isinstance(still, Rotation)
    np.testing.assert_array_equal(apply_rope(jnp.asarray(x), still), x)
