"""Gated cross-attention from text to user tokens (section 3 of the paper; gates after Flamingo, Alayrac et al. 2022).

    x + tanh(gate) * attention(norm(x), user_tokens)

The gate starts at zero, so a contextualized LLM starts as the bare LLM; the output projection does not, or nothing would
ever train. A row without any real user token gets exactly the bare LLM, whatever the gate.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.nn.attention import attention
from user_llm.nn.layers import RMSNorm, linear_param
from user_llm.nn.mlp import MLP
from user_llm.nn.recency import recency_one_hot, recency_slopes
from user_llm.nn.visibility import SelfMask


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

    B counts users: one for each row of text, or in packed rows one for each segment, a row's users one after another.
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


def readers(
    x: Float[AnyArray, "B T D"], mask: Bool[AnyArray, "B T S"] | SelfMask, user: UserKV | LayersKV
) -> Int[Array, "B T"] | None:
    """Return which of its row's users each position reads, the one of its segment; None where every row has one user.

    Raises:
      ValueError: several users for a row without segments.
    """
    if len(user.mask) == len(x):
        return None
    if not isinstance(mask, SelfMask) or mask.segments is None or len(user.mask) % len(x):
        raise ValueError(f"K/V of {len(user.mask)} users for {len(x)} rows: several users of a row are those of its segments.")
    return mask.segments


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
        k: Float[Array, "R N M H"],
        v: Float[Array, "R N M H"],
        mask: Bool[AnyArray, "R M"],
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Return `x` with what its positions read of their users.

        Args:
          x: hidden states of rows of text.
          k, v, mask: of one user for each row (R = B); or with `segments`, of S users for each row (R = B S), one row's after another's.
          segments: the user of its row that each position reads, from 1; 0 reads nobody. None where a row has one user.
        """
        rows = len(x)
        q = jnp.einsum("BTD,DNH->BTNH", self.norm(x), self.q[...])
        bias, seen = None, jnp.asarray(mask).reshape(rows, 1, -1)
        if self.config.recency_buckets:
            one_hot = recency_one_hot(mask, self.config.recency_buckets)
            bias = jnp.einsum("NR,BMR->BNM", self.recency[...].astype(jnp.float32), one_hot)[:, :, None]
            bias = _side_by_side(bias.swapaxes(2, 3), rows).swapaxes(2, 3)
        if segments is not None:
            seen &= segments[..., None] == 1 + jnp.arange(seen.shape[-1]) // mask.shape[1]
        k, v = (_side_by_side(a.astype(q.dtype), rows) for a in (k, v))
        out = attention(q, k, v, mask=seen, bias=bias)
        out = jnp.einsum("BTNH,NHD->BTD", out, self.o[...])
        x = x + (jnp.tanh(self.gate[...]) * out).astype(x.dtype)
        if self.config.seat == "before_block":
            has_user = jnp.any(seen, -1)[..., None]
            delta = jnp.tanh(self.mlp_gate[...]) * self.mlp(self.mlp_norm(x))
            x = x + jnp.where(has_user, delta, 0.0).astype(x.dtype)
        return x


def _side_by_side(a: Float[Array, "R N M H"], rows: int) -> Float[Array, "B N X H"]:
    """Return the user tokens of each row's users one after another, X = R / B times M of them."""
    users, heads, tokens, width = a.shape
    return a.reshape(rows, users // rows, heads, tokens, width).swapaxes(1, 2).reshape(rows, heads, -1, width)
