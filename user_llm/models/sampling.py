"""Drawing the next token: temperature, top-k, top-p and min-p, for each row of a batch its own.

The filters mean what they mean in Hugging Face transformers, but for tokens that tie at top-p's threshold: they are all kept
here, and some of them there. Left out: penalties on repetition, typical sampling.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from user_llm.common.arrays import AnyArray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: logits are divided by the temperature, then filtered by top-k, top-p and min-p, in this order.

    Attributes:
      temperature: 0 for the likeliest token, whatever the filters.
      top_k: keep the k likeliest tokens; 0 for all.
      top_p: keep the fewest tokens, likeliest first, whose probability reaches this share of what top-k kept; 1 for all.
      min_p: keep tokens at least this share as likely as the likeliest; 0 for all.
    """

    temperature: float = 0.0
    top_k: int | float = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or a positive number.")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k {self.top_k} must be 0 (off) or a whole number of tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1 (off).")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must be from 0 (off) to 1.")


GREEDY = Sampling()


class RowSampling(NamedTuple):
    """`Sampling` and a seed for each row of a batch; made by `by_row`."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seeds: UInt32[Array, " B"]


def by_row(sampling: Sampling | Sequence[Sampling], seeds: Sequence[int] | None, batch: int) -> RowSampling:
    """Spread settings over the rows.

    Raises:
      ValueError: not one setting for all or each row, or not one seed from 0 to 2^32 - 1 a row where rows are sampled.
    """
    settings = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if len(settings) != batch:
        raise ValueError(f"{len(settings)} sampling settings for {batch} prompts: pass one for all, or one a row.")
    if seeds is None and any(s.temperature > 0 for s in settings):
        raise ValueError("Sampling at a temperature above 0 needs `seeds`, one a row.")
    drawn = [0] * batch if seeds is None else [int(seed) for seed in seeds]
    if len(drawn) != batch or not all(0 <= seed < 2**32 for seed in drawn):
        raise ValueError(f"{batch} prompts need {batch} seeds from 0 to 2^32 - 1, not {drawn}.")
    return RowSampling(
        temperature=jnp.array([s.temperature for s in settings], jnp.float32),
        top_k=jnp.array([s.top_k for s in settings], jnp.int32),
        top_p=jnp.array([s.top_p for s in settings], jnp.float32),
        min_p=jnp.array([s.min_p for s in settings], jnp.float32),
        seeds=jnp.array(drawn, jnp.uint32),
    )


def filter_logits(
    logits: Float[Array, "B V"], top_k: Int[AnyArray, " B"], top_p: Float[Array, " B"], min_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Put the tokens that `Sampling`'s filters drop at -inf.

    Each filter is a least logit to have, so one sort serves all, the likeliest token always stays, and tokens that tie with
    the last one kept stay as well: no result depends on the order of the vocabulary.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    vocab = logits.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None]
    of_top_k = jnp.take_along_axis(ranked, k - 1, axis=-1)
    probs = jax.nn.softmax(jnp.where(ranked >= of_top_k, ranked, -jnp.inf), axis=-1)
    inside = (jnp.cumsum(probs, axis=-1) - probs < top_p[:, None]) | (top_p[:, None] >= 1)
    of_top_p = jnp.where(inside, ranked, jnp.inf).min(axis=-1, keepdims=True)
    of_min_p = ranked[:, :1] + jnp.log(min_p)[:, None]
    least = jnp.maximum(jnp.maximum(of_top_k, of_top_p), of_min_p)
    return jnp.where(logits >= least, logits, -jnp.inf)


def choose(logits: Float[Array, "B V"], step: Int[AnyArray, ""] | Int[AnyArray, " B"], rows: RowSampling) -> Int[Array, " B"]:
    """Choose each row's next token; its noise is a function of the row's seed and step alone.

    Nothing is drawn where all rows are greedy, and nothing sorted where no row has a filter.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p, min_p, seeds = rows

    def draw():
        # Relative to the peak, so that a temperature near 0 gives -inf and never inf.
        scaled = (logits - logits.max(-1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        filters = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        kept = jax.lax.cond(filters.any(), lambda: filter_logits(scaled, top_k, top_p, min_p), lambda: scaled)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(
            seeds, jnp.broadcast_to(step, seeds.shape)
        )
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, greedy)

    return jax.lax.cond((temperature > 0).any(), draw, lambda: greedy)
