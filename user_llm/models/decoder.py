"""The decoder LLM (the families of `models/families.py`), with cross-attention to its user (section 3 of the paper).

It reads embeddings, of tokens or not. The cache and the user's K/V are arguments of each call: `user_kv` computes the
latter once per user, and no state is kept on the module. Weights come from `models/pretrained.py` or from training.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import CrossAttentionConfig, LayersKV, UserKV
from user_llm.nn.layers import RMSNorm, capped, embedding_param, linear_param
from user_llm.nn.transformer import BlockConfig, Stack
from user_llm.nn.visibility import SelfMask


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Attributes:
      block: every layer; its width is that of the embeddings.
      tie_embeddings: whether the embedding table is also the output table.
      embed_scale: input embeddings are multiplied by it (Gemma: the square root of the width).
      logit_divisor: what logits are divided by (Granite).
      logit_softcap: logits are bent to stay below it, as `layers.capped` does (Gemma 2); None for no cap.
      windowed: which layers see only a window of what came before; empty for none.
      unrotated: which layers have no rotary positions (SmolLM3); empty for none.
      cross: where and how the decoder attends to its user; None for a bare LLM.
      unroll: inline the layers instead of scanning them (faster on CPU, slower to compile).
      remat: what is computed again in the backward pass, `nn.transformer.REMAT`.
    """

    vocab_size: int
    num_layers: int
    block: BlockConfig
    tie_embeddings: bool
    embed_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    windowed: tuple[bool, ...] = ()
    unrotated: tuple[bool, ...] = ()
    cross: CrossAttentionConfig | None = None
    unroll: bool = False
    remat: str = "none"

    def check_length(self, tokens: int, text: str = "A text") -> None:
        """Refuse a text that reaches beyond the positions that this decoder is read for; compiled programs see no such limit.

        Args:
          tokens: that are read of the text, a soft prompt included; padding does not count.
          text: how the sentence begins.

        Raises:
          ValueError: the text is too long.
        """
        scaling = self.block.rope_scaling
        if scaling is not None and scaling.longest is not None and tokens > scaling.longest:
            raise ValueError(
                f"{text} of {tokens} tokens is asked for, and the rotary positions of this LLM are read for texts of at most "
                f"{scaling.longest}: make prompts or answers shorter."
            )


class Decoder(nnx.Module):
    """Parameters: embed [V, D], stack, norm, and head [D, V] where the embeddings are not tied."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        width = c.block.width
        self.embed = embedding_param(rngs, (c.vocab_size, width))
        self.stack = Stack(
            c.block,
            c.num_layers,
            windowed=c.windowed,
            unrotated=c.unrotated,
            cross=c.cross,
            unroll=c.unroll,
            remat=c.remat,
            rngs=rngs,
        )
        self.norm = RMSNorm(width, eps=c.block.norm_eps, offset=c.block.norm_offset)
        if not c.tie_embeddings:
            self.head = linear_param(rngs, (width, c.vocab_size), fan_in=width)

    @property
    def dtype(self) -> jnp.dtype:
        """The type that is computed with: that of the norms, which are never kept in fewer bytes, as tables may be."""
        return self.norm.scale[...].dtype

    def embed_tokens(self, ids: Int[AnyArray, "B T"]) -> Float[Array, "B T D"]:
        """Return the input embeddings of tokens; a soft prompt is placed among these."""
        embedded = self.embed[...][ids].astype(self.dtype)
        # Rounded to the computation's type first, as the models that scale were trained.
        return embedded if self.config.embed_scale == 1.0 else embedded * jnp.asarray(self.config.embed_scale, embedded.dtype)

    def __call__(
        self,
        inputs: Float[AnyArray, "B T D"],
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
        """Return the hidden states after the final norm, and the cache with `inputs` written to it.

        Args:
          inputs: embeddings, of tokens or not.
          mask: True where the query may see the key; S = T, or with a cache the number of its first slots that are read. Or how the
            inputs see each other, and nothing in the cache.
          positions: of `inputs` in their rows.
          key_positions: of each key, for layers with a window; None for `positions`, or with a cache for the slots' numbers.
          cache: from `init_cache`.
          slots: cache slots that `inputs` are written to; None for their positions.
          user: from `user_kv`, of one user for each row or for each segment of it (`Stack`); None leaves cross-attention out.
          layers: from `stack.layers()`, for a loop around this call; None takes them here.
          key: dropout key; None for evaluation.
        """
        if user is not None:
            self._require_cross()
        x, cache = self.stack(
            inputs, mask=mask, positions=positions, key_positions=key_positions, cache=cache, slots=slots, user=user,
            layers=layers, key=key,
        )  # fmt: skip
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return unnormalised log-probabilities of the next token, accumulated in float32."""
        hidden = self.readout(hidden)
        if self.config.tie_embeddings:
            logits = jnp.einsum("...D,VD->...V", hidden, self.embed[...], preferred_element_type=jnp.float32)
        else:
            logits = jnp.einsum("...D,DV->...V", hidden, self.head[...], preferred_element_type=jnp.float32)
        return capped(logits, self.config.logit_softcap)

    def readout(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Return hidden states as the output table is multiplied with them: divided by `logit_divisor`. The cap is of the products."""
        return hidden if self.config.logit_divisor == 1.0 else hidden / self.config.logit_divisor

    def output_table(self) -> Float[Array, "V D"]:
        """Return the output vector of every token, for losses that never hold all logits at once.

        They multiply it by `readout`, and bend the products below `logit_softcap`.
        """
        return (self.embed[...] if self.config.tie_embeddings else self.head[...].T).astype(self.dtype)

    def init_cache(self, batch: int, slots: int, dtype: DTypeLike = jnp.float32) -> KVCache:
        """Return an empty cache, arrays [L, B, K, S, H]; `dtype` is best that of the computation."""
        c = self.config
        shape = (c.num_layers, batch, c.block.kv_heads, slots, c.block.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def user_kv(self, tokens: Float[AnyArray, "B M U"], mask: Bool[AnyArray, "R M"]) -> UserKV:
        """Project user tokens to the K/V of all cross-attention layers; a row whose `mask` is all False is no user."""
        self._require_cross()
        return self.stack.user_kv(tokens, mask)

    def _require_cross(self) -> None:
        if self.config.cross is None:
            raise ValueError("This decoder has no cross-attention to a user: set `cross` in its DecoderConfig.")
