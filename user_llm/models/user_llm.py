"""User-LLM: encoder, resampler and decoder joined by gated cross-attention, a soft prompt, or both (figure 1 of the paper).

    events -> UserEncoder -> states -> Resampler -> user tokens -> K/V of the decoder's cross-attention
                                                                -> soft prompt among its embeddings

Without a resampler the states are the user tokens, one for each event. What the decoder reads of a user depends on the history
alone and is computed once per user. Without an encoder the same class is the text-prompt baseline: a decoder and an item head.
`item_head` projects the hidden state at an answer position into the space of item vectors, so that every item of the catalogue
is scored by one product. A `residual` model adds that query to the encoder's own, which is the last state: it starts as the encoder
ranks, and the LLM learns what to add.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.encoder import Encoded, EncoderConfig, item_scores, valid_rows
from user_llm.models.user import Leading, Packed, SoftProjection, SoftPrompt, User, hidden_states, packed_states
from user_llm.nn.layers import RMSNorm, embedding_param, linear_param
from user_llm.nn.resampler import Resampler, ResamplerConfig


@dataclasses.dataclass(frozen=True)
class UserLLMConfig:
    """The parts.

    Attributes:
      decoder: with `cross` if it attends to its user.
      table_rows, item_width: of the table of item vectors. With an encoder it is the encoder's own item table.
      encoder: None for a decoder that reads histories as text.
      resampler: None for user tokens that are the encoder's states.
      soft_prompt: whether the user tokens stand among the decoder's embeddings.
      residual: whether an item's score is the product of its vector with the sum of the encoder's query and the LLM's, which starts at
        zero. With a resampler, the user tokens are then its M outputs and, as the last one, the encoder's last state.
    """

    decoder: DecoderConfig
    table_rows: int
    item_width: int
    num_items: int
    encoder: EncoderConfig | None = None
    resampler: ResamplerConfig | None = None
    soft_prompt: bool = False
    residual: bool = False

    def __post_init__(self):
        reads = self.soft_prompt or self.decoder.cross is not None
        if reads != (self.encoder is not None):
            raise ValueError(
                "A decoder reads user tokens, by `decoder.cross` or a `soft_prompt`, if and only if there is an encoder."
            )
        if self.residual and self.encoder is None:
            raise ValueError("A `residual` model adds to the ranking of its encoder, and there is none.")

    @property
    def num_tokens(self) -> int | None:
        """The user tokens of a user with events; None where they are as many as the events."""
        return self.resampler.num_latents + self.residual if self.resampler else None


class UserTokens(NamedTuple):
    """User tokens of R users.

    Attributes:
      tokens: right-padded. Users at several ends of one history may share a row: X = R, or R is a multiple of X.
      counts: real tokens of each user; 0 for a user without events.
    """

    tokens: Float[Array, "X M U"]
    counts: Int[AnyArray, " R"]


class UserLLM(nnx.Module):
    """Parameters: decoder, item_norm, item_head [D, I]; encoder, resampler and soft [I, D] by config, or items [V, I]."""

    def __init__(self, config: UserLLMConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.decoder = Decoder(c.decoder, rngs=rngs)
        width = c.decoder.block.width
        if c.encoder is not None:
            self.encoder = c.encoder.build(rngs)
            self.resampler = Resampler(c.resampler, rngs=rngs) if c.resampler else None
            self.soft = SoftProjection(c.item_width, width, rngs=rngs) if c.soft_prompt else None
        else:
            self.items = embedding_param(rngs, (c.table_rows, c.item_width))
        self.item_norm = RMSNorm(width, eps=c.decoder.block.norm_eps)
        head = (width, c.item_width)
        self.item_head = nnx.Param(jnp.zeros(head)) if c.residual else linear_param(rngs, head, fan_in=width)

    def encode(self, events: Int[AnyArray, "B E A"], ends: Int[AnyArray, "B J"], *, key: Array | None = None) -> Encoded:
        """Encode histories as they were after the first `ends` events."""
        return self.encoder.encode(events, ends, key=key)

    def user(self, encoded: Encoded, chosen: Int[AnyArray, "Z C"] | None = None) -> User:
        """Return the users at all ends, for B*J decoder rows, or those `chosen` (`from_tokens`). An end of 0 is a user without events."""
        return self.from_tokens(self.user_tokens(encoded), chosen)

    def user_tokens(self, encoded: Encoded) -> UserTokens:
        """Return the user tokens at all ends: what a server stores of a user."""
        states, seen = encoded
        if self.resampler is None:
            return UserTokens(states, seen.reshape(-1))
        tokens = self.resampler(states, jnp.arange(states.shape[1]) < seen[..., None])
        if self.config.residual:
            tokens = jnp.concatenate([tokens, encoded.last()[:, :, None]], axis=2)
        tokens = tokens.reshape(-1, *tokens.shape[2:])
        return UserTokens(tokens, jnp.where(seen > 0, tokens.shape[1], 0).reshape(-1))

    def from_tokens(self, users: UserTokens, chosen: Int[AnyArray, "Z C"] | None = None) -> User:
        """Return what the decoder reads of users: K/V for its cross-attention, soft tokens, or both; for a `residual` model also its query.

        Args:
          chosen: the users are divided, in order, into Z equal parts. Row z names C users of part z by their numbers within it. Z C
            users are returned; all users for None.
        """
        tokens, counts = users
        # States that are themselves the user tokens are projected once for all ends.
        copies = len(counts) // len(tokens)

        def each_end(a: Array, axis: int) -> Array:
            if chosen is not None:
                return _of_parts(a, jnp.asarray(chosen) // copies, axis)
            return a if copies == 1 else jnp.repeat(a, copies, axis)

        user = User()
        if self.config.residual:
            last = tokens[jnp.arange(len(counts)) // copies, jnp.maximum(counts - 1, 0)]
            query = jnp.where(jnp.asarray(counts)[:, None] > 0, last, 0)
            user = user._replace(query=query if chosen is None else _of_parts(query, jnp.asarray(chosen), 0))
        if chosen is not None:
            counts = _of_parts(counts, chosen, 0)
        if self.config.decoder.cross is not None:
            kv = self.decoder.user_kv(tokens, jnp.arange(tokens.shape[1]) < counts[:, None])
            user = user._replace(kv=kv._replace(k=each_end(kv.k, 1), v=each_end(kv.v, 1)))
        if self.soft is not None:
            user = user._replace(prompt=SoftPrompt(each_end(self.soft(tokens), 0), counts))
        return user

    def attended(self, encoded: Encoded) -> Float[Array, "X E"]:
        """Return by how much the user tokens see each event, their mean, at all B*J ends.

        Raises:
          ValueError: a model without a resampler, whose user tokens are the events.
        """
        if self.resampler is None:
            raise ValueError("Without a resampler the user tokens are the events: there is nothing that they attend to.")
        states, seen = encoded
        found = self.resampler.weights(states, jnp.arange(states.shape[1]) < seen[..., None])
        return found.mean(2).reshape(-1, states.shape[1])

    def hidden(
        self,
        text: Int[AnyArray, "B T"],
        lengths: Int[AnyArray, " B"],
        *,
        user: User | None = None,
        leading: Leading = 0,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the decoder's final hidden states over right-padded text; `leading` as in `hidden_states`."""
        return hidden_states(self.decoder, text, lengths, user=user, leading=leading, key=key)

    def packed(
        self, text: Packed, *, user: User | None = None, leading: Leading = 0, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Return the decoder's final hidden states over packed rows, `user` and `leading` as in `packed_states`."""
        return packed_states(self.decoder, text, user=user, leading=leading, key=key)

    @property
    def item_table(self) -> Float[Array, "V I"]:
        """The item vectors."""
        return self.encoder.item_vectors() if self.config.encoder is not None else self.items[...]

    def valid_items(self) -> Bool[Array, " V"]:
        """Return True at the rows of the item table that are items."""
        return valid_rows(self.config.table_rows, self.config.num_items)

    def item_query(self, hidden: Float[Array, "... D"], query: Float[Array, "... I"] | None = None) -> Float[Array, "... I"]:
        """Project hidden states at answer positions into the space of item vectors.

        Args:
          query: the encoder's own, to which that of a `residual` model is added (`User.query`); None for another model, or without a user.
        """
        own = self.item_norm(hidden) @ self.item_head[...]
        return own if query is None else own + query

    def score(self, query: Float[AnyArray, "B I"]) -> Float[Array, "B V"]:
        """Score every item; PAD and unused rows get -inf."""
        return item_scores(query, self.item_table, self.valid_items())


def _of_parts(a: AnyArray, chosen: Int[AnyArray, "Z C"], axis: int) -> Array:
    """Divide an axis into Z equal parts, and return the chosen entries of each. No part reads another, which may be on another device."""
    parts = jnp.moveaxis(jnp.asarray(a), axis, 0)
    parts = parts.reshape(len(chosen), -1, *parts.shape[1:])
    taken = jax.vmap(lambda part, of: part[of])(parts, chosen)
    return jnp.moveaxis(taken.reshape(-1, *parts.shape[2:]), 0, axis)
