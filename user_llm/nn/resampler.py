"""The Perceiver resampler: any number of event states becomes M user tokens (section 3 of the paper; Jaegle et al. 2021).

M learned latents attend to the events' states and to themselves, then pass an MLP, `num_layers` times. The order of events is
already in the states; how long ago each was is not, so each latent may learn a bias over log-spaced recency.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.nn.attention import attention
from user_llm.nn.layers import RMSNorm, embedding_param, linear_param
from user_llm.nn.mlp import MLP

# The steepest latent gives the last event e^4 = 55 times the weight of each of the two before it.
MAX_RECENCY_SLOPE = 4.0


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of the resampler.

    Attributes:
      num_latents: M, the number of user tokens.
      input_width: of the event states; the user tokens have the same.
      heads, head_dim, mlp_width, num_layers: of the transformer over latents.
      recency_buckets: number of log2-spaced distances from the end of the history that have a bias of their own; 0 for the
        plain Perceiver.
    """

    num_latents: int
    input_width: int
    heads: int
    head_dim: int
    mlp_width: int
    num_layers: int = 1
    recency_buckets: int = 8
    norm_eps: float = 1e-6


def recency_bucket(distance: Int[Array, "..."], buckets: int) -> Int[Array, "..."]:
    """Return floor(log2(1 + distance)), at most buckets - 1: 0 | 1 2 | 3..6 | 7..14 | ..."""
    # The number of the highest bit that is set; a logarithm in float32 may round down at a power of two.
    log = 31 - jax.lax.clz(1 + jnp.maximum(distance, 0).astype(jnp.int32))
    return jnp.minimum(log, buckets - 1)


class ResamplerLayer(nnx.Module):
    """Latents attend to concat(events, latents), then an MLP. Parameters: q, k, v, o, mlp, norms, recency [M, N, buckets]."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.event_norm = RMSNorm(c.input_width, eps=c.norm_eps)
        self.latent_norm = RMSNorm(c.input_width, eps=c.norm_eps)
        self.mlp_norm = RMSNorm(c.input_width, eps=c.norm_eps)
        shape = (c.input_width, c.heads, c.head_dim)
        self.q = linear_param(rngs, shape, fan_in=c.input_width)
        self.k = linear_param(rngs, shape, fan_in=c.input_width)
        self.v = linear_param(rngs, shape, fan_in=c.input_width)
        self.o = linear_param(rngs, (c.heads, c.head_dim, c.input_width), fan_in=c.heads * c.head_dim)
        self.mlp = MLP(c.input_width, c.mlp_width, activation="silu", rngs=rngs)
        if c.recency_buckets:
            # From latents that start by looking at all events alike to latents that look at the last: user tokens of many time
            # scales, and the newest state, which knows most, is at hand from the first step.
            slopes = jnp.linspace(0.0, MAX_RECENCY_SLOPE, c.num_latents)[:, None, None]
            bias = -slopes * jnp.arange(c.recency_buckets, dtype=jnp.float32)
            self.recency = nnx.Param(jnp.broadcast_to(bias, (c.num_latents, c.heads, c.recency_buckets)))

    def __call__(
        self, latents: Float[Array, "B J M D"], states: Float[Array, "B E D"], event_mask: Bool[Array, "B J E"]
    ) -> Float[Array, "B J M D"]:
        c = self.config
        batch, ends, count, _ = latents.shape
        own = self.latent_norm(latents).reshape(batch, ends * count, -1)
        # One attention for all ends, so that the events' keys and values are never copied for each.
        seen = jnp.concatenate([self.event_norm(states), own], axis=1)
        q = jnp.einsum("BTD,DNH->BTNH", own, self.q[...])
        k = jnp.einsum("BSD,DNH->BNSH", seen, self.k[...])
        v = jnp.einsum("BSD,DNH->BNSH", seen, self.v[...])
        end = jnp.arange(ends).repeat(count)
        same_end = jnp.broadcast_to(end[:, None] == end, (batch, ends * count, ends * count))
        mask = jnp.concatenate([event_mask.repeat(count, axis=1), same_end], axis=2)
        bias = None
        if c.recency_buckets:
            # Distance of each event from the last real one; padding beyond it is masked anyway.
            distance = event_mask.sum(-1, keepdims=True) - 1 - jnp.arange(states.shape[1])
            bucket = recency_bucket(distance, c.recency_buckets)
            # A product with one-hot rows: the gradient of a gather would be a scatter of B J M N E single numbers.
            one_hot = jax.nn.one_hot(bucket, c.recency_buckets, dtype=jnp.float32)
            bias = jnp.einsum("MNR,BJER->BNJME", self.recency[...].astype(jnp.float32), one_hot)
            bias = bias.reshape(batch, c.heads, ends * count, -1)
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, ends * count)))
        out = attention(q, k, v, mask=mask, bias=bias)
        latents = latents + jnp.einsum("BTNH,NHD->BTD", out, self.o[...]).reshape(latents.shape)
        return latents + self.mlp(self.mlp_norm(latents))


class Resampler(nnx.Module):
    """Parameters: latents [M, D], layers, norm."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        # Equal latents would get equal gradients and never separate, hence a random start.
        self.latents = embedding_param(rngs, (config.num_latents, config.input_width))
        self.layers = nnx.List([ResamplerLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.input_width, eps=config.norm_eps)

    def __call__(self, states: Float[Array, "B E D"], event_mask: Bool[Array, "B J E"]) -> Float[Array, "B J M D"]:
        """Resample the states of histories to the user tokens at J ends of each.

        Each end's mask is True at the real events it sees, which come first.
        """
        latents = jnp.broadcast_to(self.latents[...], (*event_mask.shape[:2], *self.latents.shape)).astype(states.dtype)
        for layer in self.layers:
            latents = layer(latents, states, event_mask)
        return self.norm(latents)
