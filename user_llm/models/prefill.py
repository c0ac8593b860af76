"""Prompts read once: padding, the cache behind them, and continuations side by side over one prompt.

Beams and candidate texts are lanes: queries of one row that share the prompt's and the user's K/V, so that nothing is copied
per lane. What lane n reads at step t is at slot `prompt slots + t * lanes + n` and at position `length + t`:

    keys    [prompt | lanes of step 0 | lanes of step 1 | ...]
    mask    a query sees the real prompt and, of each step so far, the one lane that is its own past

Beams that are reordered change their past (integers) and never move the cache.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.data.prompts.base import pad_rows
from user_llm.models.decoder import Decoder
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import UserKV
from user_llm.nn.visibility import SelfMask

Prompts = Sequence[Sequence[int]] | Float[AnyArray, "B T D"]


def check_user(user: UserKV | None, batch: int) -> None:
    """Refuse K/V of another number of users than there are prompts."""
    if user is not None and user.mask.shape[0] != batch:
        raise ValueError(f"K/V of {user.mask.shape[0]} users for {batch} prompts: a row without a user has an empty mask.")


def bucket(length: int) -> int:
    """Round a length up to one of few, so that few programs are compiled.

    Multiples of 64 up to 512, then of an eighth of the next power of 2: 20 lengths up to 4096, and never more than 63 tokens
    or a quarter too long. Powers of 2 would make prompts up to twice as dear.
    """
    step = max(64, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def pad_prompts(
    prompts: Prompts, lengths: Sequence[int] | Int[AnyArray, " B"] | None, vocab: int
) -> tuple[Int[np.ndarray, "B X"] | Float[Array, "B X D"], Int[np.ndarray, " B"]]:
    """Return prompts right-padded to their bucket, and their lengths, which must be given if they come as embeddings.

    Args:
      vocab: the number of tokens that there are; an embedding table would answer any other by one of its rows.

    Raises:
      ValueError: no prompts, an empty one, a number that is no token, or lengths that are missing, superfluous or do not fit.
    """
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 3:
        batch, length, _ = prompts.shape
        sizes = np.asarray([] if lengths is None else lengths, np.int32)
        if sizes.shape != (batch,) or not (sizes >= 1).all() or not (sizes <= length).all():
            raise ValueError(f"Prompts given as embeddings [{batch}, {length}, D] need {batch} lengths from 1 to {length}.")
        return jnp.pad(prompts, [(0, 0), (0, bucket(length) - length), (0, 0)]), sizes
    if lengths is not None:
        raise ValueError("Prompts given as tokens have their own lengths: pass `lengths` with embeddings alone.")
    sizes = np.array([len(row) for row in prompts], np.int32)
    if not sizes.size or sizes.min() < 1:
        raise ValueError("Every row needs a prompt of at least one token.")
    rows = [np.asarray(row) for row in prompts]
    if wrong := next((row[(row < 0) | (row >= vocab)].tolist() for row in rows if row.min() < 0 or row.max() >= vocab), None):
        raise ValueError(f"{wrong[0]} is no token: there are 0 to {vocab - 1}.")
    return pad_rows(rows, bucket(int(sizes.max()))), sizes


def prefill(
    decoder: Decoder, prompts: AnyArray, lengths: Int[AnyArray, " B"], user: UserKV | None, room: int
) -> tuple[Float[Array, "B D"], KVCache]:
    """Return the hidden state at each prompt's last token and the cache, with `room` free slots behind the prompt's."""
    inputs = prompts if prompts.ndim == 3 else decoder.embed_tokens(prompts)
    batch, length, _ = inputs.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    cache = decoder.init_cache(batch, length, inputs.dtype)
    hidden, filled = decoder(inputs, mask=SelfMask(), positions=positions, cache=cache, user=user)
    cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, 0), (0, 0), (0, room), (0, 0)]), filled)
    return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0], cache


def lane_mask(
    lengths: Int[AnyArray, " B"], prompt_slots: int, past: Int[AnyArray, "B Q steps"], lanes: int
) -> Bool[Array, "B Q S"]:
    """Let each query see its prompt and, of each step, the lane that `past` names; -1 for none.

    For past = [[1, 0, -1]] and 2 lanes, behind a prompt of 2 in 3 slots:   1 1 . | . 1 | 1 . | . .
    """
    of_prompt = jnp.arange(prompt_slots) < lengths[:, None, None]
    own = past[..., None] == jnp.arange(lanes)
    of_prompt = jnp.broadcast_to(of_prompt, (*past.shape[:2], prompt_slots))
    return jnp.concatenate([of_prompt, own.reshape(*past.shape[:2], -1)], axis=-1)


def lane_positions(lengths: Int[AnyArray, " B"], prompt_slots: int, steps: int, lanes: int) -> Int[Array, "B S"]:
    """Return the position that each slot of the cache holds.

    For a prompt of 2 in 3 slots, 2 steps and 2 lanes:   0 1 2 | 2 2 | 3 3
    """
    of_prompt = jnp.broadcast_to(jnp.arange(prompt_slots), (lengths.shape[0], prompt_slots))
    return jnp.concatenate([of_prompt, lengths[:, None] + jnp.arange(steps * lanes) // lanes], axis=-1)
