"""The Perceiver resampler: any number of event states becomes M user tokens (section 3 of the paper; Jaegle et al. 2021).

M learned latents attend to the events' states and to themselves, then pass an MLP, `num_layers` times.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from user_llm.common.arrays import AnyArray
from user_llm.nn.attention import attention, attention_weights
from user_llm.nn.layers import RMSNorm, embedding_param, linear_param
from user_llm.nn.mlp import MLP
from user_llm.nn.recency import recency_one_hot, recency_slopes


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
            slopes = recency_slopes(c.num_latents, c.recency_buckets)[:, None]
            self.recency = nnx.Param(jnp.broadcast_to(slopes, (c.num_latents, c.heads, c.recency_buckets)))

    def __call__(
        self, latents: Float[Array, "B J M D"], states: Float[Array, "B E D"], event_mask: Bool[AnyArray, "B J E"]
    ) -> Float[Array, "B J M D"]:
        seen, q, k, how = self._look(latents, states, event_mask)
        v = jnp.einsum("BSD,DNH->BNSH", seen, self.v[...])
        out = attention(q, k, v, **how)
        latents = latents + jnp.einsum("BTNH,NHD->BTD", out, self.o[...]).reshape(latents.shape)
        return latents + self.mlp(self.mlp_norm(latents))

    def weights(
        self, latents: Float[Array, "B J M D"], states: Float[Array, "B E D"], event_mask: Bool[AnyArray, "B J E"]
    ) -> Float[Array, "B J M E"]:
        """Return by how much each latent sees each event, the mean of the heads; the rest of it sees the latents."""
        _, q, k, how = self._look(latents, states, event_mask)
        found = attention_weights(q, k, **how).mean(1)[..., : states.shape[1]]
        return found.reshape(*latents.shape[:3], -1)

    def _look(self, latents: Array, states: Array, event_mask: AnyArray) -> tuple[Array, Array, Array, dict[str, Any]]:
        """Return what is seen, queries, keys, and what hides and biases them."""
        c = self.config
        batch, ends, count, _ = latents.shape
        own = self.latent_norm(latents).reshape(batch, ends * count, -1)
        # One attention for all ends, so that the events' keys and values are never copied for each.
        seen = jnp.concatenate([self.event_norm(states), own], axis=1)
        q = jnp.einsum("BTD,DNH->BTNH", own, self.q[...])
        k = jnp.einsum("BSD,DNH->BNSH", seen, self.k[...])
        end = jnp.arange(ends).repeat(count)
        same_end = jnp.broadcast_to(end[:, None] == end, (batch, ends * count, ends * count))
        mask = jnp.concatenate([event_mask.repeat(count, axis=1), same_end], axis=2)
        bias = None
        if c.recency_buckets:
            one_hot = recency_one_hot(event_mask, c.recency_buckets)
            bias = jnp.einsum("MNR,BJER->BNJME", self.recency[...].astype(jnp.float32), one_hot)
            bias = bias.reshape(batch, c.heads, ends * count, -1)
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, ends * count)))
        return seen, q, k, {"mask": mask, "bias": bias}


class Resampler(nnx.Module):
    """Parameters: latents [M, D], layers, norm."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        # Equal latents would get equal gradients and never separate, hence a random start.
        self.latents = embedding_param(rngs, (config.num_latents, config.input_width))
        self.layers = nnx.List([ResamplerLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.input_width, eps=config.norm_eps)

    def __call__(self, states: Float[Array, "B E D"], event_mask: Bool[AnyArray, "B J E"]) -> Float[Array, "B J M D"]:
        """Resample the states of histories to the user tokens at J ends of each.

        Each end's mask is True at the real events it sees, which come first.
        """
        return self.norm(self._through(self.layers, states, event_mask))

    def weights(self, states: Float[Array, "B E D"], event_mask: Bool[AnyArray, "B J E"]) -> Float[Array, "B J M E"]:
        """Return by how much each latent sees each event in the last layer."""
        return self.layers[-1].weights(self._through(self.layers[:-1], states, event_mask), states, event_mask)

    def _through(self, layers: Iterable[ResamplerLayer], states: Array, event_mask: AnyArray) -> Array:
        latents = jnp.broadcast_to(self.latents[...], (*event_mask.shape[:2], *self.latents.shape)).astype(states.dtype)
        for layer in layers:
            latents = layer(latents, states, event_mask)
        return latents
