"""How long ago an event was, as a bias of attention to it.

The order of events is in the encoder's states; how far each lies from the end of the history is not. Attention from outside the
history, by the resampler's latents or by text, may learn a bias over log-spaced distances from its last event.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray

# The steepest query gives the last event e^4 = 55 times the weight of each of the two before it.
MAX_SLOPE = 4.0


def recency_bucket(distance: Int[AnyArray, "..."], buckets: int) -> Int[Array, "..."]:
    """Return floor(log2(1 + distance)), at most buckets - 1: 0 | 1 2 | 3..6 | 7..14 | ..."""
    # The number of the highest bit that is set; a logarithm in float32 may round down at a power of two.
    log = 31 - jax.lax.clz(1 + jnp.maximum(distance, 0).astype(jnp.int32))
    return jnp.minimum(log, buckets - 1)


def recency_slopes(queries: int, buckets: int) -> Float[Array, "queries buckets"]:
    """Return biases to start from.

    From queries that look at all events alike to queries that look at the last: many time scales, and the newest state, which
    knows most, is at hand from the first step.
    """
    slopes = jnp.linspace(0.0, MAX_SLOPE, queries)[:, None]
    return -slopes * jnp.arange(buckets, dtype=jnp.float32)


def recency_one_hot(mask: Bool[AnyArray, "*J E"], buckets: int) -> Float[Array, "*J E buckets"]:
    """Return the bucket of each event as a one-hot row, for a product with the biases.

    The gradient of a gather of biases would be a scatter of as many single numbers as there are scores.

    Args:
      mask: True at the real events, which come first; what stands at the others must be hidden.
    """
    distance = mask.sum(-1, keepdims=True) - 1 - jnp.arange(mask.shape[-1])
    return jax.nn.one_hot(recency_bucket(distance, buckets), buckets, dtype=jnp.float32)
