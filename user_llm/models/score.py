"""Log-probabilities of given texts after a prompt: which of them does the model, or this user's model, find likely.

A prompt is read once per row; its candidates are read side by side behind it (`models/prefill.py`), one lane each, and the
logits of few positions at a time are in memory. Left out: prefixes that candidates share are read once for each.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.common.mesh import fetch
from user_llm.common.trees import Params, merge
from user_llm.models.prefill import Prompts, check_user, lane_mask, lane_positions, pad_prompts, prefill
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import UserKV

LOGIT_ROWS = 256  # positions whose logits are in memory together: 150 MB for a vocabulary of 150,000


@functools.partial(jax.jit, static_argnames=("graphdef", "room"))
def _read(
    graphdef: nnx.GraphDef, params: Params, prompts: Array, lengths: Array, user: UserKV | None, room: int
) -> tuple[Float[Array, "B D"], KVCache]:
    return prefill(merge(graphdef, params), prompts, lengths, user, room)


@functools.partial(jax.jit, static_argnames="graphdef")
def _score(
    graphdef: nnx.GraphDef,
    params: Params,
    hidden: Float[Array, "B D"],
    cache: KVCache,
    lengths: Int[AnyArray, " B"],
    user: UserKV | None,
    texts: Int[AnyArray, "B C W"],
    sizes: Int[AnyArray, "B C"],
) -> Float[Array, "B C"]:
    decoder = merge(graphdef, params)
    batch, lanes, width = texts.shape
    first = jnp.take_along_axis(jax.nn.log_softmax(decoder.logits(hidden)), texts[:, :, 0], axis=1)
    steps = width - 1
    if not steps:
        return first

    # Queries step by step, as the lanes lie in the cache; the last token of a text is never read.
    by_step = texts.swapaxes(1, 2)
    step, lane = jnp.divmod(jnp.arange(steps * lanes), lanes)
    past = jnp.where(jnp.arange(steps) <= step[:, None], lane[:, None], -1)
    prompt_slots = cache.slots - steps * lanes
    hidden, _ = decoder(
        decoder.embed_tokens(by_step[:, :-1].reshape(batch, -1)),
        mask=lane_mask(lengths, prompt_slots, jnp.broadcast_to(past, (batch, *past.shape)), lanes),
        positions=lengths[:, None] + step,
        key_positions=lane_positions(lengths, prompt_slots, steps, lanes),
        cache=cache,
        slots=jnp.broadcast_to(prompt_slots + jnp.arange(steps * lanes), (batch, steps * lanes)),
        user=user,
    )

    def log_prob(position):
        hidden, token = position
        logits = decoder.logits(hidden)
        return logits[token] - jax.nn.logsumexp(logits)

    positions = (hidden.reshape(-1, hidden.shape[-1]), by_step[:, 1:].reshape(-1))
    rest = jax.lax.map(log_prob, positions, batch_size=LOGIT_ROWS).reshape(batch, steps, lanes)
    real = jnp.arange(1, width)[:, None] < sizes[:, None]
    return first + jnp.where(real, rest, 0.0).sum(axis=1)


def score(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Prompts,
    candidates: Sequence[Sequence[Sequence[int]]],
    *,
    lengths: Sequence[int] | Int[AnyArray, " B"] | None = None,
    user: UserKV | None = None,
    chunk: int = 32,
) -> Float[np.ndarray, "B C"]:
    """Return the log-prob of each candidate after its row's prompt: the sum over its tokens, whatever their number.

    Args:
      graphdef: of a `Decoder`.
      params: of the same.
      prompts: tokens of any lengths, or right-padded embeddings where a prompt holds more than tokens.
      candidates: texts of each row, as many in every row; end them in a stop token to score that they end there.
      lengths: of prompts given as embeddings.
      user: K/V of each row's user.
      chunk: candidates of a row that are read side by side; attention costs grow with its square.

    Raises:
      ValueError: not one prompt, user and equal number of candidates a row, an empty candidate, or a text longer than the decoder is
        read for.
    """
    table, sizes = pad_prompts(prompts, lengths, params["embed"].shape[0])
    check_user(user, len(sizes))
    counts = {len(row) for row in candidates}
    if len(candidates) != len(sizes) or len(counts) != 1 or not min(counts) or chunk < 1:
        raise ValueError(f"{len(sizes)} prompts need as many rows of candidates, all of one length, and a chunk of at least 1.")
    (count,) = counts
    widths = np.array([[len(text) for text in row] for row in candidates], np.int32)
    if not widths.all():
        raise ValueError("An empty candidate has nothing to score.")
    merge(graphdef, params).config.check_length(int(sizes.max() + widths.max()) - 1)
    # The last token is not read, so that single tokens cost no further step; longer texts come in few widths.
    width = 1 + -(-(int(widths.max()) - 1) // 8) * 8
    chunk = min(chunk, count)
    texts = np.zeros((len(sizes), count + -count % chunk, width), np.int32)
    for row, many in zip(texts, candidates, strict=True):
        for text, tokens in zip(row, many, strict=False):
            text[: len(tokens)] = tokens
    widths = np.pad(widths, [(0, 0), (0, -count % chunk)])

    hidden, cache = _read(graphdef, params, table, sizes, user, room=(width - 1) * chunk)
    parts = [
        _score(graphdef, params, hidden, cache, sizes, user, texts[:, i : i + chunk], widths[:, i : i + chunk])
        for i in range(0, count, chunk)
    ]
    return np.concatenate(fetch(parts), axis=1)[:, :count]
