"""What is stored per user, and how a decoder reads it beside text (section 3 of the paper, "contextualization").

Cross-attention reads the user tokens' K/V in its own layers. A soft prompt stands among the embeddings of the text, behind its
first `leading` tokens: what all users share stands before it, so that its K/V stay the same for all of them. A row with it is a
right-padded prompt like any other, with positions, mask and cache as ever:

    text a b c d ., leading 2     3 soft tokens    a b x y z c d .
    (. is padding)                1 of 3           a b x c d . . .
                                  no events        a b c d . . . .
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.common.trees import Params, merge
from user_llm.models.decoder import Decoder
from user_llm.nn.cross_attention import UserKV
from user_llm.nn.layers import linear_param
from user_llm.nn.visibility import causal_mask, segment_mask

# How many tokens of a text stand in front of its soft prompt: of all rows alike, or of each.
Leading = int | Int[AnyArray, ""] | Int[AnyArray, " B"]


class SoftPrompt(NamedTuple):
    """User tokens of the width of the decoder's embeddings.

    Attributes:
      tokens: right-padded.
      lengths: real tokens of each row; 0 for a user without events.
    """

    tokens: Float[Array, "B M D"]
    lengths: Int[AnyArray, " B"]


class SoftProjection(nnx.Module):
    """From user tokens to soft tokens. Parameters: project [U, D]."""

    def __init__(self, user_width: int, width: int, *, rngs: nnx.Rngs):
        self.project = linear_param(rngs, (user_width, width), fan_in=user_width)

    def __call__(self, tokens: Float[Array, "B M U"]) -> Float[Array, "B M D"]:
        return tokens @ self.project[...]


class User(NamedTuple):
    """All that a decoder needs of its users; a part is None where the model has no such way in.

    Attributes:
      query: the encoder's own query for items, 0 for a user without events. Only a `residual` model has it.
    """

    kv: UserKV | None = None
    prompt: SoftPrompt | None = None
    query: Float[Array, "R I"] | None = None


def insert(
    text: Float[AnyArray, "B T D"], lengths: Int[AnyArray, " B"], prompt: SoftPrompt, leading: Leading
) -> tuple[Float[Array, "B X D"], Int[Array, " B"], Int[Array, "B T"]]:
    """Put the soft prompt behind the first `leading` embeddings of right-padded text: the module's picture.

    Args:
      leading: at most the length of its row.

    Returns:
      The embeddings of X = T + M positions, right-padded, their lengths, and where each position of the text went.

    Raises:
      ValueError: not one soft prompt for each row.
    """
    batch, length, _ = text.shape
    if prompt.tokens.shape[0] != batch:
        raise ValueError(
            f"Soft prompts of {prompt.tokens.shape[0]} users for {batch} texts: a row without a user has length 0."
        )
    count, leading = prompt.lengths[:, None], jnp.broadcast_to(leading, batch)[:, None]
    place = jnp.arange(length + prompt.tokens.shape[1])
    soft = place - leading
    source = jnp.where(soft < count, length + soft, jnp.minimum(place - count, length - 1))
    source = jnp.where(soft < 0, place, source)
    rows = jnp.concatenate([text, prompt.tokens.astype(text.dtype)], axis=1)
    position = jnp.arange(length)
    moved = jnp.where(position < leading, position, position + count)
    return jnp.take_along_axis(rows, source[..., None], axis=1), jnp.add(lengths, prompt.lengths), moved


class Packed(NamedTuple):
    """Rows of several prompts each, one behind the other; a prompt is a segment of its row.

    With a soft prompt, room for it is left in the prompts, behind their first `leading` tokens:

        tokens     a b . . c a b . . d e .     leading 2, 2 soft tokens; what stands at their places does not matter
        segments   1 1 1 1 1 2 2 2 2 2 2 .
        positions  0 1 2 3 4 0 1 2 3 4 5 .

    Attributes:
      segments: the number of the prompt that a token belongs to, from 1; 0 is padding.
      positions: the place of a token in its prompt.
    """

    tokens: Int[AnyArray, "B T"]
    segments: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]


def packed_states(
    decoder: Decoder, text: Packed, *, user: User | None = None, leading: Leading = 0, key: Array | None = None
) -> Float[Array, "B T D"]:
    """Return the final hidden states at all positions of packed rows; no prompt sees another or another's user.

    Args:
      user: S users for each row, one row's after another's: the s-th is that of segment s.
      leading: tokens of each prompt in front of its soft prompt, which cannot see it. All users have as many soft tokens as the
        prompts have room for.
    """
    user, inputs = user or User(), decoder.embed_tokens(text.tokens)
    if user.prompt is not None:
        inputs = _fill(inputs, text, user.prompt, leading)
    mask = segment_mask(text.segments)
    return decoder(inputs, mask=mask, positions=text.positions, user=user.kv, key=key)[0]


def _fill(inputs: Float[Array, "B T D"], text: Packed, prompt: SoftPrompt, leading: Leading) -> Float[Array, "B T D"]:
    """Put each segment's soft tokens where it has room for them."""
    width = prompt.tokens.shape[1]
    soft = jnp.asarray(text.positions) - leading
    filled = (soft >= 0) & (soft < width) & (text.segments > 0)
    place = jnp.where(filled, (text.segments - 1) * width + soft, 0)
    tokens = prompt.tokens.reshape(len(inputs), -1, inputs.shape[-1]).astype(inputs.dtype)
    return jnp.where(filled[..., None], jnp.take_along_axis(tokens, place[..., None], axis=1), inputs)


def hidden_states(
    decoder: Decoder,
    text: Int[AnyArray, "B T"],
    lengths: Int[AnyArray, " B"],
    *,
    user: User | None = None,
    leading: Leading = 0,
    key: Array | None = None,
) -> Float[Array, "B T D"]:
    """Return the final hidden states at the positions of right-padded text, those of a soft prompt left out.

    Args:
      leading: tokens of the text in front of the soft prompt, which cannot see it.
    """
    user, moved, inputs = user or User(), None, decoder.embed_tokens(text)
    if user.prompt is not None:
        inputs, lengths, moved = insert(inputs, lengths, user.prompt, leading)
    valid = jnp.arange(inputs.shape[1]) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), valid.shape)
    hidden, _ = decoder(inputs, mask=causal_mask(valid), positions=positions, user=user.kv, key=key)
    return hidden if moved is None else jnp.take_along_axis(hidden, moved[..., None], axis=1)


@functools.partial(jax.jit, static_argnames="graphdef")
def embed_prompts(
    graphdef: nnx.GraphDef,
    params: Params,
    text: Int[AnyArray, "B T"],
    lengths: Int[AnyArray, " B"],
    *,
    user: User | None = None,
    leading: Leading = 0,
) -> tuple[Float[Array, "B X D"], Int[AnyArray, " B"]]:
    """Return prompts as embeddings, and their lengths, for `generate`, `beam_search` and `score` beside `user.kv`.

    Args:
      graphdef: of a `Decoder`.
      params: of the same.
      text: right-padded.
      leading: tokens of the text in front of the soft prompt.
    """
    inputs = merge(graphdef, params).embed_tokens(text)
    return (inputs, lengths) if user is None or user.prompt is None else insert(inputs, lengths, user.prompt, leading)[:2]
