"""User-LLM: encoder, resampler and decoder joined by gated cross-attention (figure 1 of the paper).

    events -> UserEncoder -> states -> Resampler -> user tokens -> K/V of the decoder's cross-attention

The user tokens depend on the history alone and their K/V are computed once per user. Without an encoder the same class is the
text-prompt baseline: a decoder and an item head. `item_head` projects the hidden state at an answer position into the space of
item vectors, so that every item of the catalogue is scored by one product.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.user_encoder import Encoded, UserEncoder, UserEncoderConfig
from user_llm.nn.attention import causal_mask
from user_llm.nn.cross_attention import UserKV
from user_llm.nn.layers import RMSNorm, embedding_param, linear_param
from user_llm.nn.resampler import Resampler, ResamplerConfig


@dataclasses.dataclass(frozen=True)
class UserLLMConfig:
    """The parts; `encoder` and `resampler` are None for a decoder that reads histories as text.

    Attributes:
      table_rows, item_width: of the table of item vectors. With an encoder it is the encoder's own item table.
    """

    decoder: DecoderConfig
    table_rows: int
    item_width: int
    num_items: int
    encoder: UserEncoderConfig | None = None
    resampler: ResamplerConfig | None = None


class UserLLM(nnx.Module):
    """Parameters: decoder, item_norm, item_head [D, item width]; encoder and resampler, or items [V, item width]."""

    def __init__(self, config: UserLLMConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.decoder = Decoder(c.decoder, rngs=rngs)
        if c.encoder is not None and c.resampler is not None:
            self.encoder = UserEncoder(c.encoder, rngs=rngs)
            self.resampler = Resampler(c.resampler, rngs=rngs)
        else:
            self.items = embedding_param(rngs, (c.table_rows, c.item_width))
        width = c.decoder.block.width
        self.item_norm = RMSNorm(width, eps=c.decoder.block.norm_eps)
        self.item_head = linear_param(rngs, (width, c.item_width), fan_in=width)

    def encode(self, events: Int[Array, "B E A"], ends: Int[Array, "B J"], *, key: Array | None = None) -> Encoded:
        """Encode histories as they were after the first `ends` events."""
        return self.encoder.encode(events, ends, key=key)

    def user_kv(self, encoded: Encoded) -> UserKV:
        """Return the K/V of the users at all ends, for B*J decoder rows."""
        states, seen = encoded
        tokens = self.resampler(states, jnp.arange(states.shape[1]) < seen[..., None])
        tokens = tokens.reshape(-1, *tokens.shape[2:])
        has_events = jnp.broadcast_to((seen > 0).reshape(-1, 1), tokens.shape[:2])
        return self.decoder.user_kv(tokens, has_events)

    def hidden(
        self, text: Int[Array, "B T"], lengths: Int[Array, "B"], *, user: UserKV | None = None, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Return the decoder's final hidden states over right-padded text."""
        valid: Bool[Array, "B T"] = jnp.arange(text.shape[1]) < lengths[:, None]
        positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
        embedded = self.decoder.embed_tokens(text)
        return self.decoder(embedded, mask=causal_mask(valid), positions=positions, user=user, key=key)[0]

    @property
    def item_table(self) -> Float[Array, "V I"]:
        """The item vectors."""
        return self.encoder.item_vectors() if self.config.encoder is not None else self.items[...]

    def valid_items(self) -> Bool[Array, "V"]:
        """Return True at the rows of the item table that are items."""
        row = jnp.arange(self.config.table_rows)
        return (row > 0) & (row <= self.config.num_items)

    def item_query(self, hidden: Float[Array, "... D"]) -> Float[Array, "... I"]:
        """Project hidden states at answer positions into the space of item vectors."""
        return self.item_norm(hidden) @ self.item_head[...]

    def score(self, query: Float[Array, "B I"]) -> Float[Array, "B V"]:
        """Score every item; PAD and unused rows get -inf."""
        scores = jnp.einsum("BI,VI->BV", query, self.item_table, preferred_element_type=jnp.float32)
        return jnp.where(self.valid_items(), scores, -jnp.inf)
