"""Gated cross-attention from text to user tokens (section 3 of the paper; gates after Flamingo, Alayrac et al. 2022).

    x + tanh(gate) * attention(norm(x), user_tokens)

The gate starts at zero, so a contextualized LLM starts as the bare LLM; the output projection does not, or nothing would
ever train. A row without any real user token gets exactly the bare LLM, whatever the gate.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from user_llm.common.arrays import AnyArray
from user_llm.nn.attention import attention
from user_llm.nn.layers import RMSNorm, linear_param
from user_llm.nn.mlp import MLP
from user_llm.nn.recency import recency_one_hot, recency_slopes


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig:
    """Where and how a decoder attends to its user.

    Attributes:
      user_width: width of the user tokens.
      every: every `every`-th decoder layer has cross-attention, the last of each full group of `every`.
      seat: `after_attention`, between self-attention and MLP (the paper), or `before_block`, ahead of the whole layer
        with a gated MLP of its own (Flamingo).
      heads, head_dim: of the cross-attention alone.
      recency_buckets: number of log2-spaced distances from the end of the history that have a bias of their own, where the user
        tokens are events; 0 where they are a resampler's, which has looked at recency itself.
    """

    user_width: int
    every: int
    heads: int
    head_dim: int
    seat: str = "after_attention"
    recency_buckets: int = 0

    def __post_init__(self):
        if self.seat not in ("after_attention", "before_block"):
            raise ValueError(f"Unknown cross-attention seat {self.seat!r}: choose after_attention or before_block.")


class UserKV(NamedTuple):
    """Keys and values of the user tokens for all cross-attention layers, computed once per user and stored.

    Attributes:
      k, v: one leading entry per layer with cross-attention.
      mask: True where a user token is real; a row all False is a user without events.
    """

    k: Float[Array, "L B N M H"]
    v: Float[Array, "L B N M H"]
    mask: Bool[AnyArray, "B M"]

    def by_layer(self) -> "LayersKV":
        """Return the same with each layer's own arrays."""
        return LayersKV(tuple(self.k), tuple(self.v), self.mask)


class LayersKV(NamedTuple):
    """What `UserKV` holds, with each layer's own arrays, which inlined layers read where they lie.

    XLA on CPU copies a layer's slice of a `UserKV` before it multiplies by it. A loop does so once, a single step each time.
    """

    k: tuple[Float[Array, "B N M H"], ...]
    v: tuple[Float[Array, "B N M H"], ...]
    mask: Bool[AnyArray, "B M"]


class GatedCrossAttention(nnx.Module):
    """Parameters: q [D, N, H], k and v [user width, N, H], o [N, H, D], gate []; by config recency [N, R], mlp and mlp_gate."""

    def __init__(self, config: CrossAttentionConfig, width: int, mlp_width: int, *, norm_eps: float, rngs: nnx.Rngs):
        c = self.config = config
        self.norm = RMSNorm(width, eps=norm_eps)
        self.q = linear_param(rngs, (width, c.heads, c.head_dim), fan_in=width)
        self.k = linear_param(rngs, (c.user_width, c.heads, c.head_dim), fan_in=c.user_width)
        self.v = linear_param(rngs, (c.user_width, c.heads, c.head_dim), fan_in=c.user_width)
        self.o = linear_param(rngs, (c.heads, c.head_dim, width), fan_in=c.heads * c.head_dim)
        self.gate = nnx.Param(jnp.zeros((), jnp.float32))
        if c.recency_buckets:
            self.recency = nnx.Param(recency_slopes(c.heads, c.recency_buckets))
        if c.seat == "before_block":
            self.mlp_norm = RMSNorm(width, eps=norm_eps)
            self.mlp = MLP(width, mlp_width, activation="silu", rngs=rngs)
            self.mlp_gate = nnx.Param(jnp.zeros((), jnp.float32))

    def user_kv(self, tokens: Float[AnyArray, "B M U"]) -> tuple[Float[Array, "B N M H"], Float[Array, "B N M H"]]:
        """Project user tokens to this layer's keys and values."""
        k = jnp.einsum("BMU,UNH->BNMH", tokens, self.k[...])
        v = jnp.einsum("BMU,UNH->BNMH", tokens, self.v[...])
        return k, v

    def __call__(
        self,
        x: Float[Array, "B T D"],
        k: Float[Array, "B N M H"],
        v: Float[Array, "B N M H"],
        mask: Bool[AnyArray, "B M"],
    ) -> Float[Array, "B T D"]:
        q = jnp.einsum("BTD,DNH->BTNH", self.norm(x), self.q[...])
        bias = None
        if self.config.recency_buckets:
            one_hot = recency_one_hot(mask, self.config.recency_buckets)
            bias = jnp.einsum("NR,BMR->BNM", self.recency[...].astype(jnp.float32), one_hot)[:, :, None]
        out = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None, :], bias=bias)
        out = jnp.einsum("BTNH,NHD->BTD", out, self.o[...])
        x = x + (jnp.tanh(self.gate[...]) * out).astype(x.dtype)
        if self.config.seat == "before_block":
            has_user = jnp.any(mask, -1)[:, None, None]
            delta = jnp.tanh(self.mlp_gate[...]) * self.mlp(self.mlp_norm(x))
            x = x + jnp.where(has_user, delta, 0.0).astype(x.dtype)
        return x
