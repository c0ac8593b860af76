"""The one transformer block, used by the user encoder and the decoder LLM, and the stack that runs many of them.

Layers are stored stacked (each parameter has a leading layer axis) and run by `jax.lax.scan`, so that compile time does not
grow with depth. `unroll=True` inlines them, which is faster on CPU. Cross-attention sits in the last layer of each
group of `every` layers, hence the scan runs over groups; layers at the end that fill no group are inlined and have none.
Layers may differ in what they see: all that the mask allows, or a window of it (Gemma 3). Some layers turn no queries
and keys by position (SmolLM3).

What a backward pass needs of a group is kept, or computed again (`remat`): memory for computation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.common.mesh import constrain
from user_llm.nn.attention import Attention, AttentionConfig, KVCache
from user_llm.nn.cross_attention import CrossAttentionConfig, GatedCrossAttention, LayersKV, UserKV, readers
from user_llm.nn.experts import Experts, ExpertsConfig
from user_llm.nn.layers import RMSNorm, dropout, linear_param
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.mlp import MLP
from user_llm.nn.rotary import RopeScaling, Rotation, rope_frequencies, rotation
from user_llm.nn.visibility import SelfMask

# What is kept of each group of layers for the backward pass, besides its input: everything, the products with weights, or nothing.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One transformer layer.

    Attributes:
      width, heads, kv_heads, head_dim, mlp_width: D, N, K, H, F.
      rope_theta: base of the rotary positions; None for none.
      rope_scaling: of those positions.
      rotary_share: the share of a head's numbers that positions turn, the first ones (Phi-4-mini).
      window: keys that a layer with a window sees, its own included; None if the stack has no such layers.
      window_rope_theta: base of the rotary positions in layers with a window, never scaled; None for `rope_theta`, scaled alike.
      activation: of the gated MLP.
      norm_offset: what norms add to their scale (1 in Gemma).
      pre_norms: normalise the input of each branch (all but OLMo 2 and 3).
      post_norms: normalise the output of each branch before adding it (Gemma, OLMo 2 and 3).
      residual_scale: what each branch is multiplied by before adding it (Granite).
      qk_norm: RMSNorm on queries and keys, per head (Qwen3, Gemma 3).
      qk_norm_over_heads: whether it is one norm over all heads (OLMo 2 and 3).
      qkv_bias: biases on queries, keys and values (Qwen2).
      query_scale: queries are scaled by it, and by 1 / sqrt(H) if None.
      attn_softcap: scores are bent to stay below it, as `layers.capped` does (Gemma 2); None for no cap.
      experts: several MLPs, of which each token goes through a few (Qwen3 mixture of experts); None for one MLP.
      residual_gate: multiply each branch by sigmoid(x W) before adding it (LiGR, as in eSASRec).
      dropout: on the output of both branches.
      lora: low-rank adapters of this layer's weights.
      quantize: the form in which this layer's own weights are kept, one of `nn.stored.KINDS`; empty for plain numbers.
      attention_kernel: what computes self-attention, `nn.kernels.KERNELS`.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_share: float = 1.0
    window: int | None = None
    window_rope_theta: float | None = None
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    residual_scale: float = 1.0
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    qkv_bias: bool = False
    query_scale: float | None = None
    attn_softcap: float | None = None
    experts: ExpertsConfig | None = None
    residual_gate: bool = False
    dropout: float = 0.0
    lora: LoRAConfig | None = None
    quantize: str = ""
    attention_kernel: str = "auto"

    @property
    def attention(self) -> AttentionConfig:
        names = (field.name for field in dataclasses.fields(AttentionConfig))
        return AttentionConfig(**{name: getattr(self, name) for name in names})


class View(NamedTuple):
    """What the queries of a layer see and how they are turned."""

    mask: Bool[AnyArray, "B T S"] | SelfMask
    rotate: Rotation | None


class Block(nnx.Module):
    """x + attention(norm(x)), cross-attention if given, then x + mlp(norm(x)). The config says which norms there are."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        norm = lambda: RMSNorm(c.width, eps=c.norm_eps, offset=c.norm_offset)  # noqa: E731
        if c.pre_norms:
            self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = Attention(c.attention, rngs=rngs)
        self.mlp: MLP | Experts
        if c.experts is None:
            self.mlp = MLP(c.width, c.mlp_width, activation=c.activation, lora=c.lora, quantize=c.quantize, rngs=rngs)
        else:
            self.mlp = Experts(c.experts, c.width, c.mlp_width, activation=c.activation, rngs=rngs)
        if c.post_norms:
            self.attn_post_norm, self.mlp_post_norm = norm(), norm()
        if c.residual_gate:
            self.attn_gate = linear_param(rngs, (c.width, c.width), fan_in=c.width)
            self.mlp_gate = linear_param(rngs, (c.width, c.width), fan_in=c.width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        view: View,
        *,
        cache: KVCache | None = None,
        layer: int | np.integer | Int[Array, ""] = 0,
        slots: Int[AnyArray, "B T"] | None = None,
        cross: Callable[[Array], Array] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        c = self.config
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        out, cache = self.attn(
            self.attn_norm(x) if c.pre_norms else x,
            mask=view.mask, rotate=view.rotate, cache=cache, layer=layer, slots=slots, key=attn_key,
        )  # fmt: skip
        if c.post_norms:
            out = self.attn_post_norm(out)
        if c.residual_scale != 1.0:
            out *= c.residual_scale
        if c.residual_gate:
            out *= jax.nn.sigmoid(x @ self.attn_gate[...])
        x = constrain(x + dropout(out, c.dropout, attn_key), "rows", None, None)
        if cross is not None:
            x = cross(x)
        out = self.mlp(self.mlp_norm(x) if c.pre_norms else x, key=mlp_key)
        if c.post_norms:
            out = self.mlp_post_norm(out)
        if c.residual_scale != 1.0:
            out *= c.residual_scale
        if c.residual_gate:
            out *= jax.nn.sigmoid(x @ self.mlp_gate[...])
        return constrain(x + dropout(out, c.dropout, mlp_key), "rows", None, None), cache


def unstack(params: Any, count: int) -> list:
    """Return the parameters at each of the `count` places of their leading axis.

    They are cut apart at once: the gradient is then put together at once, where that of `count` indices would be a sum of as many
    whole arrays.
    """
    leaves, structure = jax.tree.flatten(params)
    cut = [[part.squeeze(0) for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [jax.tree.unflatten(structure, parts) for parts in zip(*cut, strict=True)] if cut else [params] * count


def entries(tree: Any, count: int) -> list:
    """Return what `tree` holds at each of the `count` places of its leading axis, whose arrays may be numpy's and stay so."""
    return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(count)]


def stacked(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """Create `count` modules as one whose parameters have a leading axis of that length."""
    return nnx.vmap(lambda key: create(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), count))


class Stack(nnx.Module):
    """`num_layers` blocks, cross-attention in each `cross.every`-th of them.

    Those that `windowed` marks have a window, and those that `unrotated` marks no rotary positions.
    """

    def __init__(
        self,
        config: BlockConfig,
        num_layers: int,
        *,
        windowed: tuple[bool, ...] = (),
        unrotated: tuple[bool, ...] = (),
        cross: CrossAttentionConfig | None = None,
        unroll: bool = False,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT:
            raise ValueError(f"Unknown remat {remat!r}: choose one of {', '.join(REMAT)}.")
        self.every = cross.every if cross else 1
        if not 1 <= self.every <= num_layers:
            raise ValueError(f"Cross-attention in every {self.every}th of {num_layers} layers: choose from 1 to the depth.")
        none = (False,) * num_layers
        self.config, self.windowed, self.unrotated = config, windowed or none, unrotated or none
        if len(self.windowed) != num_layers or (any(self.windowed) and config.window is None):
            raise ValueError(f"{num_layers} layers need as many marks of who has a window, and a window: {self.windowed}.")
        if len(self.unrotated) != num_layers:
            raise ValueError(f"{num_layers} layers need as many marks of who has no rotary positions: {self.unrotated}.")
        self.groups, self.unroll, self.remat = num_layers // self.every, unroll, remat
        self.seat = cross.seat if cross else None
        self.blocks = stacked(lambda rngs: Block(config, rngs=rngs), num_layers, rngs)
        if cross:
            self.cross = stacked(
                lambda rngs: GatedCrossAttention(cross, config.width, config.mlp_width, norm_eps=config.norm_eps, rngs=rngs),
                self.groups,
                rngs,
            )

    def user_kv(self, tokens: Float[AnyArray, "B M U"], mask: Bool[AnyArray, "R M"]) -> UserKV:
        """Project user tokens for all cross-attention layers at once; what is stored per user."""
        graphdef, params = nnx.split(self.cross)
        k, v = jax.vmap(lambda p: nnx.merge(graphdef, p).user_kv(tokens))(params)
        return UserKV(k, v, mask)

    def layers(self) -> Any:
        """Return the parameters of the groups, stacked for a scan or each layer's own where inlined, and of the rest.

        XLA on CPU copies a slice of a stack before it multiplies by it: a loop around the call takes the slices once, outside.
        """
        blocks, rest = self._grouped(nnx.state(self.blocks))
        cross = None if self.seat is None else nnx.state(self.cross)
        if not self.unroll:
            return (blocks, cross), rest
        groups = zip(unstack(blocks, self.groups), unstack(cross, self.groups), strict=True)
        return [(unstack(blocks, self.every), cross) for blocks, cross in groups], rest

    def _grouped(self, tree: Any) -> tuple[Any, list]:
        """Split what has a leading axis of layers into [groups, every, ...], and the layers of the rest."""
        whole, depth = self.groups * self.every, len(self.windowed)
        groups = jax.tree.map(lambda a: a[:whole].reshape(self.groups, self.every, *a.shape[1:]), tree)
        return groups, [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(whole, depth)]

    def views(
        self, mask: Bool[AnyArray, "B T S"] | SelfMask, positions: Int[AnyArray, "B T"], key_positions: Int[AnyArray, "#B S"]
    ) -> tuple[View, View]:
        """Return what layers without and with a window see."""
        c, turned_dim = self.config, int(self.config.head_dim * self.config.rotary_share)

        def rotate(theta: float | None, scaling: RopeScaling | None) -> Rotation | None:
            return None if theta is None else rotation(positions, rope_frequencies(turned_dim, theta, scaling), scaling)

        full = View(mask, rotate(c.rope_theta, c.rope_scaling))
        if c.window is None:
            return full, full
        turned = full.rotate if c.window_rope_theta is None else rotate(c.window_rope_theta, None)
        if isinstance(mask, SelfMask):
            far, close = (dataclasses.replace(mask, window=c.window, windowed=jnp.array(holds)) for holds in (False, True))
            return full._replace(mask=far), View(close, turned)
        near = positions[:, :, None] - key_positions[:, None, :] < c.window
        return full, View(mask & near, turned)

    def __call__(
        self,
        x: Float[AnyArray, "B T D"],
        *,
        mask: Bool[AnyArray, "B T S"] | SelfMask,
        positions: Int[AnyArray, "B T"],
        key_positions: Int[AnyArray, "B S"] | None = None,
        cache: KVCache | None = None,
        slots: Int[AnyArray, "B T"] | None = None,
        user: UserKV | LayersKV | None = None,
        layers: Any = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Run all layers.

        Args:
          mask: True where the query may see the key; S = T, or with a cache the number of its first slots that are read. Or how the
            inputs see each other, and nothing in the cache.
          positions: rotary position of each query.
          key_positions: of each key; None for `positions`, or with a cache for the slots' numbers.
          cache: returned updated.
          slots: the cache slot each query's keys and values are written to; None for its position.
          user: keys and values of each row's user, or of S users for each packed row, whose segments `mask` describes: segment s reads
            the row's s-th user. None leaves cross-attention out.
          layers: from `layers()`, for a loop around this call; None takes them here.
          key: dropout key; None for evaluation.
        """
        if key_positions is None:
            key_positions = positions if cache is None or isinstance(mask, SelfMask) else jnp.arange(mask.shape[-1])[None]
        full, near = self.views(mask, positions, key_positions)
        slots = positions if slots is None else slots
        block_def, cross_def = nnx.graphdef(self.blocks), None if user is None else nnx.graphdef(self.cross)
        keys = None if key is None else jax.random.split(key, len(self.windowed))
        marks, rest_marks = self._grouped(
            (np.arange(len(self.windowed)), np.array(self.windowed), np.array(self.unrotated), keys)
        )
        segments = None if user is None else readers(x, mask, user)

        def run_layer(carry, params, mark, cross=None):
            (x, cache), (number, windowed, unrotated, key) = carry, mark
            view = full
            if any(self.windowed):
                view = jax.tree.map(lambda near, full: jnp.where(windowed, near, full), near, full)
            if any(self.unrotated) and view.rotate is not None:
                turned = jax.tree.map(lambda still, turns: jnp.where(unrotated, still, turns), view.rotate.still(), view.rotate)
                view = view._replace(rotate=turned)
            if cross is not None and self.seat == "before_block":
                x, cross = cross(x), None
            return nnx.merge(block_def, params)(x, view, cache=cache, layer=number, slots=slots, cross=cross, key=key)

        def run_group(carry, group):
            (blocks, cross_params), marks, user_kv = group
            *before, last = zip(blocks if self.unroll else unstack(blocks, self.every), entries(marks, self.every), strict=True)
            for params, mark in before:
                carry = run_layer(carry, params, mark)
            cross = None
            if user is not None:
                module = nnx.merge(cross_def, cross_params)
                cross = lambda x: module(x, *user_kv, user.mask, segments)  # noqa: E731
            return run_layer(carry, *last, cross), None

        if policy := REMAT[self.remat]:
            # In a scan nothing can be computed but once per turn; outside, XLA would find the same value and keep it.
            run_group = jax.checkpoint(run_group, policy=policy, prevent_cse=self.unroll)
        groups, rest = self.layers() if layers is None else layers
        carry = (constrain(jnp.asarray(x), "rows", None, None), cache)
        if not self.unroll:
            carry, _ = jax.lax.scan(run_group, carry, (groups, marks, None if user is None else (user.k, user.v)))
        else:
            kv = [None] * self.groups if user is None else zip(user.k, user.v, strict=True)
            for group in zip(groups, entries(marks, self.groups), kv, strict=True):
                carry, _ = run_group(carry, group)
        for params, mark in zip(rest, rest_marks, strict=True):
            carry = run_layer(carry, params, mark)
        return carry
