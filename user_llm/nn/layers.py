"""Norms, dropout, the MLP and parameter initialisers that every model here shares."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


def linear_param(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """Draw a weight with variance 1 / fan_in (truncated normal): the output keeps the scale of a normalised input."""
    std = fan_in**-0.5 / 0.87962566103423978  # the standard deviation of a unit normal cut at +-2
    return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32))


def embedding_param(rngs: nnx.Rngs, shape: tuple[int, ...], *, std: float = 0.02) -> nnx.Param:
    """Draw a table of embeddings or latents; 0.02 is the customary scale since GPT-2."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` and rescale the rest; no key means evaluation, nothing is dropped."""
    if key is None or rate == 0.0:
        return x
    # 16 random bits an element are enough to tell rates apart to 1e-5, and cost half of bernoulli's 32.
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= round(rate * 65536)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """down(activation(gate_proj(x)) * up(x)), the gated MLP of Shazeer 2020."""

    def __init__(self, width: int, mlp_width: int, *, activation: str, rngs: nnx.Rngs):
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}.")
        self.activation = activation
        self.gate_proj = linear_param(rngs, (width, mlp_width), fan_in=width)
        self.up = linear_param(rngs, (width, mlp_width), fan_in=width)
        self.down = linear_param(rngs, (mlp_width, width), fan_in=mlp_width)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        # As one matrix of rows: the gradients of products over [B, T, D] are slower on CPU.
        rows = x.reshape(-1, x.shape[-1])
        gate = ACTIVATIONS[self.activation](rows @ self.gate_proj[...])
        return ((gate * (rows @ self.up[...])) @ self.down[...]).reshape(x.shape)
