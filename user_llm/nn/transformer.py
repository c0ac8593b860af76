"""The one transformer block, used by the user encoder and the decoder LLM, and the stack that runs many of them.

Layers are stored stacked (each parameter has a leading layer axis) and run by `jax.lax.scan`, so that compile time does not
grow with depth. `unroll=True` inlines them, which is faster on CPU. Cross-attention sits in the last layer of each
group of `every` layers, hence the scan runs over groups.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.nn.attention import Attention, AttentionConfig, KVCache
from user_llm.nn.cross_attention import CrossAttentionConfig, GatedCrossAttention, UserKV
from user_llm.nn.layers import MLP, RMSNorm, dropout, linear_param


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One pre-norm transformer layer.

    Attributes:
      width, heads, kv_heads, head_dim, mlp_width: D, N, K, H, F.
      rope_theta: base of the rotary positions; None for none.
      activation: of the gated MLP.
      qk_norm: RMSNorm on queries and keys, per head (Qwen3).
      residual_gate: multiply each branch by sigmoid(x W) before adding it (LiGR, as in eSASRec).
      dropout: on the output of both branches.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float | None = 10_000.0
    activation: str = "silu"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    residual_gate: bool = False
    dropout: float = 0.0

    @property
    def attention(self) -> AttentionConfig:
        names = (field.name for field in dataclasses.fields(AttentionConfig))
        return AttentionConfig(**{name: getattr(self, name) for name in names})


class Block(nnx.Module):
    """x + attention(norm(x)), cross-attention if given, then x + mlp(norm(x))."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.attn_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.attn = Attention(c.attention, rngs=rngs)
        self.mlp_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c.width, c.mlp_width, activation=c.activation, rngs=rngs)
        if c.residual_gate:
            self.attn_gate = linear_param(rngs, (c.width, c.width), fan_in=c.width)
            self.mlp_gate = linear_param(rngs, (c.width, c.width), fan_in=c.width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T S"],
        positions: Int[Array, "B T"],
        cache: KVCache | None = None,
        slots: Int[Array, "B T"] | None = None,
        cross: Callable[[Array], Array] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        c = self.config
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        out, cache = self.attn(self.attn_norm(x), mask=mask, positions=positions, cache=cache, slots=slots)
        if c.residual_gate:
            out *= jax.nn.sigmoid(x @ self.attn_gate[...])
        x = x + dropout(out, c.dropout, attn_key)
        if cross is not None:
            x = cross(x)
        out = self.mlp(self.mlp_norm(x))
        if c.residual_gate:
            out *= jax.nn.sigmoid(x @ self.mlp_gate[...])
        return x + dropout(out, c.dropout, mlp_key), cache


def stacked(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """Create `count` modules as one whose parameters have a leading axis of that length."""
    return nnx.vmap(lambda key: create(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), count))


class Stack(nnx.Module):
    """`num_layers` blocks, cross-attention in each `cross.every`-th of them."""

    def __init__(
        self,
        config: BlockConfig,
        num_layers: int,
        *,
        cross: CrossAttentionConfig | None = None,
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        self.every = cross.every if cross else 1
        if num_layers % self.every:
            raise ValueError(
                f"Cross-attention in every {self.every}th of {num_layers} layers leaves a rest: choose a divisor of the depth."
            )
        self.groups, self.unroll = num_layers // self.every, unroll
        self.seat = cross.seat if cross else None
        self.blocks = stacked(lambda rngs: Block(config, rngs=rngs), num_layers, rngs)
        if cross:
            self.cross = stacked(
                lambda rngs: GatedCrossAttention(cross, config.width, config.mlp_width, norm_eps=config.norm_eps, rngs=rngs),
                self.groups,
                rngs,
            )

    def user_kv(self, tokens: Float[Array, "B M U"], mask: Bool[Array, "B M"]) -> UserKV:
        """Project user tokens for all cross-attention layers at once; what is stored per user."""
        graphdef, params = nnx.split(self.cross)
        k, v = jax.vmap(lambda p: nnx.merge(graphdef, p).user_kv(tokens))(params)
        return UserKV(k, v, mask)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T S"],
        positions: Int[Array, "B T"],
        cache: KVCache | None = None,
        slots: Int[Array, "B T"] | None = None,
        user: UserKV | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Run all layers.

        Args:
          mask: True where the query may see the key; S = T, or the number of cache slots.
          positions: rotary position of each query.
          cache: arrays with a leading layer axis; returned updated.
          slots: the cache slot each query's keys and values are written to; None for its position.
          user: keys and values of each row's user; None leaves cross-attention out.
          key: dropout key; None for evaluation.
        """
        block_def, block_params = nnx.split(self.blocks)
        by_group = jax.tree.map(lambda a: a.reshape(self.groups, self.every, *a.shape[1:]), (block_params, cache))
        keys = None if key is None else jax.random.split(key, (self.groups, self.every))
        cross_def, cross_params, user_kv = None, None, None
        if user is not None:
            cross_def, cross_params = nnx.split(self.cross)
            user_kv = (user.k, user.v)

        def run_group(x, group):
            (params, caches), keys, cross_params, user_kv = group
            new_caches = []
            for i in range(self.every):
                layer_params, layer_cache = jax.tree.map(lambda a, i=i: a[i], (params, caches))
                cross = None
                if user is not None and i == self.every - 1:
                    module = nnx.merge(cross_def, cross_params)
                    cross = lambda x: module(x, *user_kv, user.mask)  # noqa: B023, E731
                    if self.seat == "before_block":
                        x, cross = cross(x), None
                x, new_cache = nnx.merge(block_def, layer_params)(
                    x, mask=mask, positions=positions, cache=layer_cache, slots=slots, cross=cross,
                    key=None if keys is None else keys[i],
                )  # fmt: skip
                new_caches.append(new_cache)
            if cache is not None:
                return x, jax.tree.map(lambda *a: jnp.stack(a), *new_caches)
            return x, None

        xs = (by_group, keys, cross_params, user_kv)
        x, caches = jax.lax.scan(run_group, x, xs, unroll=self.groups if self.unroll else 1)
        if cache is not None:
            caches = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), caches)
        return x, caches
