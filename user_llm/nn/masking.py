"""Which events are hidden in masked (BERT4Rec) pretraining: Sun et al. 2019.

Each event of a segment is hidden with the same probability; or, in some segments, the last event alone, which is how the
model is asked at test. Left out: BERT's random and unchanged tokens in place of the mask, as in BERT4Rec.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from user_llm.common.arrays import AnyArray

# A row hides at most this many standard deviations more than it does on average; what is drawn beyond stays in sight.
SPARE_DEVIATIONS = 4.0


def choose_masked(
    key: Array, segments: Int[AnyArray, "B T"], *, probability: float, last_only: float
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """Draw the hidden places of packed rows; segment 0 is padding and has none.

    Args:
      probability: of each event to be hidden, in segments that are not for their last alone.
      last_only: probability of each segment to have its last event hidden and no other.

    Returns:
      Places, and which of them are in use; M depends on T and `probability` alone, so that shapes are static.
    """
    segment_key, event_key = jax.random.split(key)
    rows, length = segments.shape
    only = jnp.take_along_axis(jax.random.uniform(segment_key, (rows, length + 1)) < last_only, segments, axis=1)
    last = segments != jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    draw = jax.random.uniform(event_key, segments.shape)
    hidden = jnp.where(only, last, draw < probability) & (segments > 0)
    mean = probability * length
    most = math.ceil(mean + SPARE_DEVIATIONS * math.sqrt(mean * (1 - probability)))
    found, places = jax.lax.top_k(jnp.where(hidden, draw, -1.0), min(max(most, 1), length))
    return places, found >= 0
