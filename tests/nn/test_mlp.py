import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.mlp import ACTIVATIONS, MLP


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
