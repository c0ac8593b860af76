"""Attention with rotary positions, grouped key/value heads and a key/value cache.

Axis letters used in einsum strings, annotations and prose of the whole package:

    B batch   E events of a history   A event features   T text (query) length   S key length
    N heads   K key/value heads       G = N / K          H head dim              D width
    F mlp width   J ends of one history   M user tokens       V vocabulary       L layers

Every mask is True where something may be seen. A query that may see no key at all gets exactly 0 (the usual functions
return the mean of all values there), so that a user without events changes nothing.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.common.mesh import constrain
from user_llm.nn.kernels import choose, fused
from user_llm.nn.layers import RMSNorm, capped
from user_llm.nn.lora import LoRAConfig, adapters
from user_llm.nn.rotary import Rotation, apply_rope
from user_llm.nn.stored import times, weight_param
from user_llm.nn.visibility import SelfMask

# Added to the logits of hidden keys; large enough to absorb any logit, small enough that float32 never reaches -inf.
HIDDEN = -1e30


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    mask: Bool[AnyArray, " B #T S"] | SelfMask | None = None,
    bias: Float[Array, "#B N #T S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attend with softmax(scale q k + bias), the softmax in float32; rows without a visible key are exactly 0.

    Keys and values come heads first, as caches hold them, so that a step of decoding reads them where they lie. `scale` is
    1 / sqrt(H) unless given. `softcap` is as in `capped`, of the scores before the bias. `kernel` is one of `kernels.KERNELS`;
    where none serves, the reference below computes.
    """
    batch, length, heads, dim = q.shape
    if isinstance(mask, SelfMask):
        chosen = choose(
            kernel, mask, length=length, head_dim=dim, dtype=q.dtype, biased=bias is not None, capped=softcap is not None
        )
        if chosen != "reference":
            return fused(chosen, q, k, v, mask, dim**-0.5 if scale is None else scale, softcap)
        mask = mask.drawn(length)
    weights, total = _exponentials(q, k, mask=mask, bias=bias, scale=scale, softcap=softcap)
    weights = weights.astype(v.dtype).reshape(batch, k.shape[1], -1, weights.shape[-1])
    out = jnp.matmul(weights, v).reshape(batch, heads, length, dim) / total.astype(v.dtype)
    return out.transpose(0, 2, 1, 3)


def attention_weights(q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], **how) -> Float[Array, "B N T S"]:
    """Return by how much each query sees each key, for people to look at; `how` as `attention` takes it."""
    weights, total = _exponentials(q, k, **{"mask": None, "bias": None, "scale": None, "softcap": None} | how)
    return weights / total


def _exponentials(
    q: Array, k: Array, *, mask: AnyArray | None, bias: Array | None, scale: float | None, softcap: float | None
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T 1"]]:
    """Return exp(scores), scaled to a peak of 1, and their sums, 1 where no key is visible."""
    batch, length, heads, dim = q.shape
    # The queries of a group stacked: plain batched matrix products, faster on CPU than 5-axis einsums.
    q = (q * (dim**-0.5 if scale is None else scale)).transpose(0, 2, 1, 3).reshape(batch, k.shape[1], -1, dim)
    logits = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32).reshape(batch, heads, length, -1)
    logits = capped(logits, softcap)
    if bias is not None:
        logits += bias
    if mask is not None:
        logits += jnp.where(mask, 0.0, HIDDEN)[:, None]
    # The floor is far above HIDDEN, so the weights of a row that sees nothing are exp(HIDDEN - HIDDEN / 10) = 0.
    peak = jnp.maximum(logits.max(-1, keepdims=True), HIDDEN / 10)
    weights = jnp.exp(logits - jax.lax.stop_gradient(peak))
    # A row that sees nothing is 0 / 1. Not maximum(total, 1): its gradient is halved where a row's total is exactly 1.
    total = weights.sum(-1, keepdims=True)
    return weights, jnp.where(total > 0, total, 1.0)


# Row b of [B, T, K, H] goes to row b of a cache [L, B, K, S, H], at a layer and slots. With rows among the indices instead, as in
# `.at[]`, the compiler cannot tell that no row writes to another's, and devices are sent each other's.
BY_ROW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 3),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


class KVCache(NamedTuple):
    """Keys and values of all layers by slot; slot s holds position s unless the caller says otherwise.

    Masks hide unwritten slots. One array for all layers, so that a step of decoding writes its few slots in place.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.k.shape[3]

    def write(self, layer: int | np.integer | Int[Array, ""], k: Array, v: Array, slots: Int[AnyArray, "B T"]) -> "KVCache":
        """Return the cache with `k`, `v` [B, K, T, H] of one layer stored at `slots`; rows may be at different slots.

        What goes to a slot that the cache does not have, such as -1, is dropped.
        """
        layers = jnp.broadcast_to(jnp.asarray(layer, slots.dtype), slots.shape)
        at = jnp.stack([layers, slots], axis=-1)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return KVCache(*(jax.lax.scatter(a, at, new.astype(a.dtype), BY_ROW) for a, new in ((self.k, k), (self.v, v))))


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Sizes of one attention layer, as in `transformer.BlockConfig`."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    query_scale: float | None = None
    attn_softcap: float | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    lora: LoRAConfig | None = None
    quantize: str = ""
    attention_kernel: str = "auto"


class Attention(nnx.Module):
    """Self-attention. Parameters: q [D, N, H], k and v [D, K, H], o [N, H, D]; biases, norms and adapters by config."""

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        if c.heads % c.kv_heads:
            raise ValueError(f"{c.heads} heads cannot be shared evenly by {c.kv_heads} key/value heads.")
        self.q = weight_param(rngs, (c.width, c.heads, c.head_dim), 1, c.quantize)
        self.k = weight_param(rngs, (c.width, c.kv_heads, c.head_dim), 1, c.quantize)
        self.v = weight_param(rngs, (c.width, c.kv_heads, c.head_dim), 1, c.quantize)
        self.o = weight_param(rngs, (c.heads, c.head_dim, c.width), 2, c.quantize)
        if c.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (
                nnx.Param(jnp.zeros((heads, c.head_dim), jnp.float32)) for heads in (c.heads, c.kv_heads, c.kv_heads)
            )
        if c.qk_norm:
            of_q, of_k = (c.heads, c.kv_heads) if c.qk_norm_over_heads else (1, 1)
            self.q_norm = RMSNorm(of_q * c.head_dim, eps=c.norm_eps, offset=c.norm_offset)
            self.k_norm = RMSNorm(of_k * c.head_dim, eps=c.norm_eps, offset=c.norm_offset)
        self.lora = adapters(c.lora, "attn", {"q": (self.q, 1), "k": (self.k, 1), "v": (self.v, 1), "o": (self.o, 2)}, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[AnyArray, "B T S"] | SelfMask,
        rotate: Rotation | None,
        cache: KVCache | None = None,
        layer: int | np.integer | Int[Array, ""] = 0,
        slots: Int[AnyArray, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attend within `x` (S = T), or to the first S slots of this layer's part of a cache after writing to it at `slots`.

        With a `SelfMask` it is within `x` always, and a cache, empty so far, is but written. `rotate` None means no rotary
        positions.
        """
        c = self.config
        heads_of = functools.partial(jnp.einsum, "BTD,DNH->BTNH")
        q, k, v = times(heads_of, x, self.q), times(heads_of, x, self.k), times(heads_of, x, self.v)
        if self.lora is not None:
            q, k, v = (out + self.lora(name, x, key) for name, out in (("q", q), ("k", k), ("v", v)))
        if c.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if c.qk_norm:
            normed = lambda norm, x: norm(x.reshape(*x.shape[:2], -1, norm.scale.shape[-1])).reshape(x.shape)  # noqa: E731
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        if rotate is not None:
            q, k = apply_rope(q, rotate), apply_rope(k, rotate)
            if rotate.growth is not None:
                q *= rotate.growth.astype(q.dtype)
        q, k, v = (constrain(out, "rows", None, "heads", None) for out in (q, k, v))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is not None:
            if slots is None:
                raise ValueError("A cache needs the slots that its new keys and values go to.")
            cache = cache.write(layer, k, v, slots)
            if not isinstance(mask, SelfMask):
                seen = mask.shape[-1]
                k, v = cache.k[layer, :, :, :seen], cache.v[layer, :, :, :seen]
        heads = attention(q, k, v, mask=mask, scale=c.query_scale, softcap=c.attn_softcap, kernel=c.attention_kernel)
        # As one matrix: XLA on CPU turns `o` around for a product over two axes.
        out = times(lambda joined, o: joined @ o.reshape(-1, c.width), heads.reshape(*x.shape[:2], -1), self.o)
        if self.lora is not None:
            out += self.lora("o", heads, key)
        return out, cache
