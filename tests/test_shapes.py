"""Tests run with the annotations of layers and models checked (conftest)."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from user_llm.models.user import SoftProjection
from user_llm.nn.attention import attention


def test_a_wrong_shape_is_refused_in_layers_and_models():
    q, k = np.zeros((1, 2, 4, 8), np.float32), np.zeros((1, 4, 3, 8), np.float32)
    with pytest.raises(TypeCheckError, match="'v'"):
        attention(*(jnp.asarray(a) for a in (q, k, k[:, :, :2])))
    with pytest.raises(TypeCheckError, match="'tokens'"):
        SoftProjection(8, 8, rngs=nnx.Rngs(params=0))(jnp.asarray(q))
