import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.mlp import ACTIVATIONS, MLP, gated


def test_mlp_by_hand():
    graphdef, _ = trees.abstract(lambda: MLP(2, 1, activation="relu", rngs=nnx.Rngs(params=0)))
    params = {"gate_proj": [[1.0], [1.0]], "up": [[0.0], [2.0]], "down": [[3.0, -1.0]]}
    mlp = trees.merge(graphdef, jax.tree.map(np.asarray, params, is_leaf=lambda leaf: isinstance(leaf, list)))
    # gate: 3 and -2, which relu shuts; up: 4 and 2.
    np.testing.assert_allclose(mlp(jnp.array([[1.0, 2.0], [-3.0, 1.0]])), [[36, -12], [0, 0]])


def test_both_gelus_and_unknown_activations():
    np.testing.assert_allclose(ACTIVATIONS["gelu"](1.0), 0.8413447, rtol=1e-6)  # the normal distribution at 1
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](1.0), 0.8411920, rtol=1e-6)
    with pytest.raises(ValueError, match="Unknown activation 'tanh': choose one of silu"):
        MLP(2, 1, activation="tanh", rngs=nnx.Rngs(params=0))


def test_the_backward_pass_keeps_both_products_and_what_is_multiplied_down():
    """No parts of the activation; 3 rows and 5 hidden numbers are like no other shape here."""
    graphdef, params = trees.split(MLP(2, 5, activation="silu", rngs=nnx.Rngs(params=0)))
    _, backward = jax.vjp(lambda params, x: trees.merge(graphdef, params)(x), params, jnp.ones((3, 2)))
    assert [a.shape for a in jax.tree.leaves(backward)].count((3, 5)) == 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_has_the_gradients_of_its_formula(activation):
    gate, up = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, 5)), jnp.float32) for seed in range(2))
    formula = lambda gate, up: jnp.sum(jnp.sin(ACTIVATIONS[activation](gate) * up))  # noqa: E731
    found = jax.grad(lambda gate, up: jnp.sum(jnp.sin(gated(activation, gate, up))), (0, 1))(gate, up)
    for ours, expected in zip(found, jax.grad(formula, (0, 1))(gate, up), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
