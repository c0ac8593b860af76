"""Text generation with cached keys and values: greedy or sampled, all at once or as a stream.

One batch may mix users, prompt lengths and sampling settings. A prompt is read in one call, then every step of one compiled
loop reads a token per row; a stream runs that loop a few steps at a time. Prompts are padded to one of few lengths:

    slots   [prompt, padded | room for what is written]

Token i that a row writes is at slot and position `length + i`, over the padding of a shorter prompt, which no query has seen.
Left out: rows that join or leave a running batch, penalties on repetition, speculative decoding.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from user_llm.common import mesh as meshes
from user_llm.common.arrays import AnyArray
from user_llm.common.errors import check_count
from user_llm.common.trees import Params, merge
from user_llm.models.prefill import Prompts, bucket, check_user, pad_prompts, prefill
from user_llm.models.sampling import GREEDY, RowSampling, Sampling, by_row, choose
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import UserKV
from user_llm.nn.visibility import cache_mask

# A jitted function and its arguments, arrays by their shapes and shardings.
Program = tuple[jax.stages.Wrapped, tuple]


class Generation(NamedTuple):
    """What was written.

    Attributes:
      tokens: of each row, PAD (0) after its end.
      lengths: tokens that each row wrote, the stop token included.
    """

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]

    def rows(self) -> list[list[int]]:
        """Return each row's tokens without padding."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


class _Request(NamedTuple):
    """What stays the same for as long as a batch is generated."""

    lengths: Int[Array, " B"]
    sampling: RowSampling
    stop_ids: Int[Array, " stops"]
    user: UserKV | None


class _State(NamedTuple):
    """What a step changes; `written` counts a row's tokens, `step` those of the rows that have not ended."""

    step: Int[Array, ""]
    ended: Bool[Array, " B"]
    tokens: Int[Array, "B room"]
    written: Int[Array, " B"]
    cache: KVCache


def _append(state: _State, logits: Float[Array, "B V"], request: _Request) -> _State:
    token = jnp.where(state.ended, 0, choose(logits, state.step, request.sampling))
    return state._replace(
        step=state.step + 1,
        ended=state.ended | (token[:, None] == request.stop_ids).any(-1),
        tokens=state.tokens.at[:, state.step].set(token),
        written=state.written + ~state.ended,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "room"))
def _start(graphdef: nnx.GraphDef, params: Params, prompts: Array, request: _Request, room: int) -> _State:
    """Read the prompts and write the first token."""
    decoder = merge(graphdef, params)
    hidden, cache = prefill(decoder, prompts, request.lengths, request.user, room)
    batch = prompts.shape[0]
    state = _State(
        step=jnp.int32(0),
        ended=jnp.zeros(batch, bool),
        tokens=jnp.zeros((batch, room), jnp.int32),
        written=jnp.zeros(batch, jnp.int32),
        cache=cache,
    )
    return _append(state, decoder.logits(hidden), request)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _decode(graphdef: nnx.GraphDef, params: Params, request: _Request, state: _State, until: int | Int[Array, ""]) -> _State:
    """Write on until all rows have ended or hold `until` tokens."""
    decoder = merge(graphdef, params)
    slots, layers = state.cache.slots, decoder.stack.layers()

    def advance(state):
        positions = (request.lengths + state.step - 1)[:, None]
        hidden, cache = decoder(
            decoder.embed_tokens(state.tokens[:, state.step - 1][:, None]),
            mask=cache_mask(positions, slots), positions=positions, cache=state.cache, user=request.user,
            layers=layers,
        )  # fmt: skip
        return _append(state._replace(cache=cache), decoder.logits(hidden[:, 0]), request)

    return jax.lax.while_loop(lambda state: (state.step < until) & ~state.ended.all(), advance, state)


def abstract_programs(
    graphdef: nnx.GraphDef, params: Params, prompts: jax.ShapeDtypeStruct, user: UserKV | None, room: int, mesh: Mesh
) -> dict[str, Program]:
    """Return the two programs of generation with their arguments, arrays by shape and sharding, to be compiled ahead of time."""
    batch = prompts.shape[0]
    rows = jax.eval_shape(
        lambda: _Request(jnp.zeros(batch, jnp.int32), by_row(GREEDY, None, batch), jnp.zeros(1, jnp.int32), None)
    )
    request = meshes.rows_like(rows, mesh)._replace(user=user)
    state = jax.eval_shape(functools.partial(_start, graphdef, room=room), params, prompts, request)
    state = meshes.rows_like(state, mesh)._replace(cache=meshes.rows_like(state.cache, mesh, axis=1))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    return {
        "prefill": (_start, (graphdef, params, prompts, request, room)),
        "decode": (_decode, (graphdef, params, request, state, step)),
    }


def stream(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Prompts,
    *,
    max_tokens: int,
    lengths: Sequence[int] | Int[AnyArray, " B"] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    user: UserKV | None = None,
    chunk: int = 1,
) -> Iterator[Generation]:
    """Yield what `generate` returns in pieces of `chunk` tokens a row, as they come, until all rows have ended.

    A piece's tokens may end amid a character: decode a row's tokens together. Arguments and errors as in `generate`.
    """
    check_count("max_tokens", max_tokens)
    check_count("chunk", chunk)
    table, sizes = pad_prompts(prompts, lengths, params["embed"].shape[0])
    check_user(user, len(sizes))
    merge(graphdef, params).config.check_length(int(sizes.max()) + max_tokens - 1)  # the last token that is written is not read
    rows = by_row(sampling, seeds, len(sizes))
    request = _Request(jnp.asarray(sizes), rows, jnp.asarray(stop_ids, jnp.int32), user)

    def pieces() -> Iterator[Generation]:
        state = _start(graphdef, params, table, request, room=bucket(max_tokens))
        for begin in range(0, max_tokens, chunk):
            end = min(begin + chunk, max_tokens)
            state = _decode(graphdef, params, request, state, end)
            tokens, written, ended = meshes.fetch((state.tokens, state.written, state.ended))
            yield Generation(tokens[:, begin:end], np.clip(written - begin, 0, end - begin))
            if ended.all():
                return

    return pieces()


def generate(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Prompts,
    *,
    max_tokens: int,
    lengths: Sequence[int] | Int[AnyArray, " B"] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    user: UserKV | None = None,
) -> Generation:
    """Continue each prompt until it writes a stop token, or `max_tokens` tokens.

    Args:
      graphdef: of a `Decoder`.
      params: of the same.
      prompts: tokens of any lengths, or right-padded embeddings where a prompt holds more than tokens.
      max_tokens: most tokens that a row writes.
      lengths: of prompts given as embeddings.
      sampling: of all rows, or one for each.
      seeds: a number a row, for rows that are sampled. What a row draws depends on it and on the number of tokens that the
        row has written: not on other rows, padding or the row's place.
      stop_ids: tokens that end a row; none for rows that only `max_tokens` ends.
      user: K/V of each row's user, from `Decoder.user_kv`; a row whose mask is all False writes as it would without.

    Raises:
      ValueError: settings out of range, not one prompt, length, seed and user for each row, or a text longer than the decoder is read for.
    """
    return next(
        stream(
            graphdef, params, prompts, max_tokens=max_tokens, lengths=lengths, sampling=sampling, seeds=seeds,
            stop_ids=stop_ids, user=user, chunk=max_tokens,
        )
    )  # fmt: skip
