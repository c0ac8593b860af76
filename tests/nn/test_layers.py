import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.layers import RMSNorm, dropout, embedding_param, linear_param


def test_initial_scales():
    """Weights keep the scale of their input, none far out; embeddings have the given spread."""
    weight = np.asarray(linear_param(nnx.Rngs(params=0), (100, 4, 50), fan_in=100)[...])
    np.testing.assert_allclose([weight.mean(), weight.std()], [0, 0.1], atol=2e-3)
    assert np.abs(weight).max() < 0.1 * 2 / 0.879
    table = np.asarray(embedding_param(nnx.Rngs(params=0), (200, 50))[...])
    np.testing.assert_allclose([table.mean(), table.std()], [0, 0.02], atol=1e-3)
    assert (table[0] != table[1]).all()


def test_dropout_drops_the_rate_and_keeps_the_mean():
    x = jnp.ones((100, 1000))
    out = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.7)}
    np.testing.assert_allclose((out == 0).mean(), 0.3, atol=0.01)
    np.testing.assert_allclose(out.mean(), 1, atol=0.01)


@pytest.mark.parametrize(("rate", "key"), [(0.5, None), (0.0, 1)])
def test_no_key_or_no_rate_drops_nothing(rate, key):
    x = jnp.ones((5, 5))
    assert dropout(x, rate, None if key is None else jax.random.key(key)) is x


def test_rms_norm_by_hand():
    """In float32 whatever the input: the mean square of 300 and 400 overflows float16, and rounds in bfloat16."""
    params = {"scale": jnp.array([2.0, -1.0])}
    graphdef, _ = trees.split(RMSNorm(2, eps=0.0))
    norm = jax.jit(lambda x: trees.merge(graphdef, params)(x))
    expected = np.array([[3, 4]]) / np.sqrt(12.5) * [2, -1]
    np.testing.assert_allclose(norm(np.array([[3.0, 4.0]], np.float32)), expected, rtol=1e-6)
    half = norm(np.array([[300.0, 400.0]], np.float16))
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, expected, rtol=1e-3)


def test_rms_norm_with_an_offset_starts_as_one_without():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
    np.testing.assert_array_equal(RMSNorm(4, offset=1.0)(x), RMSNorm(4)(x))
    assert (RMSNorm(4, offset=1.0).scale[...] == 0).all()


def test_the_backward_pass_of_a_norm_keeps_nothing_wider_than_its_input():
    graphdef, params = trees.split(RMSNorm(4))
    _, backward = jax.vjp(lambda params, x: trees.merge(graphdef, params)(x), params, jnp.ones((3, 4), jnp.bfloat16))
    assert [a.dtype for a in jax.tree.leaves(backward) if a.shape == (3, 4)] == [jnp.bfloat16]
