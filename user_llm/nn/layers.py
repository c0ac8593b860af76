"""The norm, dropout and parameter initialisers that every model here shares."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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


def capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Return cap * tanh(x / cap), which stays below `cap` (Gemma 2's soft cap); None caps nothing."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nnx.Module):
    """x / rms(x) * (scale + offset) over the last axis, in float32 (Zhang and Sennrich 2019); Gemma's offset is 1."""

    def __init__(self, width: int, *, eps: float = 1e-6, offset: float = 0.0):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def normed(x: Array, scale: Array) -> Array:
            wide = x.astype(jnp.float32)
            wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
            return (wide * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)

        # The backward pass computes the float32 numbers again. Otherwise they would be kept beside `x` until then.
        return jax.checkpoint(normed)(x, self.scale[...])
