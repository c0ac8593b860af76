"""Rows that are decoded together and come and go: a row takes a prompt, reads it in chunks, writes tokens, and is free again.

    cache    row 0  [prompt . . . . . . | written . . |       free       ]
             row 1  [prompt . . | written . . . . . . . . |     free     ]
             row 2  [prompt . . being read, 64 positions at a time       ]

What a row writes depends on its own prompt, user, settings and seed only: never on the other rows, its place, or what was in its
place before. Prompts are read one row at a time; all rows that have read theirs write a token in one step.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from user_llm.common import mesh as meshes
from user_llm.common.arrays import AnyArray
from user_llm.common.trees import Params, merge
from user_llm.models.sampling import GREEDY, RowSampling, Sampling, by_row, choose
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import UserKV
from user_llm.nn.visibility import cache_mask

CHUNKS = (16, 64, 256)  # positions of a prompt that are read in one call: the fewest that hold the rest, or the most
SHORTEST = 128  # slots of the cache that a step looks at; the double where a row is longer, and so on


class _Memory(NamedTuple):
    """What stays on the devices from one call to the next: the cache, and the users of all rows."""

    cache: KVCache
    user: UserKV | None


class _Rows(NamedTuple):
    """What the rows are fed, one entry for each row.

    Attributes:
      token: the token that was written last.
      position: the position of that token.
      slot: where its keys and values are written; a slot that does not exist for a row that writes nothing.
      written: the number of tokens that the row has written.
    """

    token: Int[AnyArray, " R"]
    position: Int[AnyArray, " R"]
    slot: Int[AnyArray, " R"]
    written: Int[AnyArray, " R"]


class _Row(NamedTuple):
    """A row whose prompt is being read.

    Attributes:
      inputs: the prompt as embeddings, with zeros behind it.
      length: the length of the prompt.
      read: how much of the prompt has been read.
    """

    inputs: Float[Array, "1 X D"]
    length: int
    read: int


def _empty(graphdef: nnx.GraphDef, params: Params, user: UserKV | None, rows: int, room: int) -> _Memory:
    decoder = merge(graphdef, params)
    dtype = decoder.embed_tokens(jnp.zeros((1, 1), jnp.int32)).dtype
    spread = lambda a, axis: jnp.zeros((*a.shape[:axis], rows, *a.shape[axis + 1 :]), a.dtype)  # noqa: E731
    nobody = user and UserKV(spread(user.k, 1), spread(user.v, 1), spread(user.mask, 0))
    return _Memory(decoder.init_cache(rows, room, dtype), nobody)


@functools.partial(jax.jit, donate_argnames="memory")
def _seat(memory: _Memory, row: Int[AnyArray, ""], user: UserKV) -> _Memory:
    """Give a row its user."""
    put = jax.lax.dynamic_update_slice_in_dim
    there = memory.user
    k, v = put(there.k, user.k.astype(there.k.dtype), row, 1), put(there.v, user.v.astype(there.v.dtype), row, 1)
    return memory._replace(user=UserKV(k, v, put(there.mask, user.mask, row, 0)))


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk"), donate_argnames="memory")
def _read(
    graphdef: nnx.GraphDef,
    params: Params,
    layers: object,
    memory: _Memory,
    inputs: Float[Array, "1 X D"],
    row: Int[AnyArray, ""],
    start: Int[AnyArray, ""],
    length: Int[AnyArray, ""],
    sampling: RowSampling,
    chunk: int,
) -> tuple[_Memory, Int[Array, ""]]:
    """Read `chunk` positions of a row's prompt; return the token after the last of its positions that was read."""
    decoder = merge(graphdef, params)
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=row, slice_size=1)
    positions = (start + jnp.arange(chunk))[None]
    cache = KVCache(take(memory.cache.k, axis=1), take(memory.cache.v, axis=1))
    user = memory.user and UserKV(take(memory.user.k, axis=1), take(memory.user.v, axis=1), take(memory.user.mask, axis=0))
    hidden, cache = decoder(
        jax.lax.dynamic_slice_in_dim(inputs, start, chunk, axis=1), mask=cache_mask(positions, cache.slots), positions=positions,
        cache=cache, user=user, layers=layers,
    )  # fmt: skip
    put = jax.lax.dynamic_update_slice_in_dim
    memory = memory._replace(cache=KVCache(put(memory.cache.k, cache.k, row, 1), put(memory.cache.v, cache.v, row, 1)))
    last = jax.lax.dynamic_slice_in_dim(hidden, jnp.clip(length - 1 - start, 0, chunk - 1), 1, axis=1)[:, 0]
    return memory, choose(decoder.logits(last), jnp.int32(0), sampling)[0]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"), donate_argnames="memory")
def _step(
    graphdef: nnx.GraphDef, params: Params, layers: object, memory: _Memory, rows: _Rows, sampling: RowSampling, slots: int
) -> tuple[_Memory, Int[Array, " R"]]:
    """Let every row write a token."""
    decoder = merge(graphdef, params)
    positions = rows.position[:, None]
    hidden, cache = decoder(
        decoder.embed_tokens(rows.token[:, None]), mask=cache_mask(positions, slots), positions=positions, cache=memory.cache,
        slots=rows.slot[:, None], user=memory.user, layers=layers,
    )  # fmt: skip
    return memory._replace(cache=cache), choose(decoder.logits(hidden[:, 0]), rows.written, sampling)


@functools.partial(jax.jit, static_argnames="graphdef")
def _layers(graphdef: nnx.GraphDef, params: Params) -> object:
    return merge(graphdef, params).stack.layers()


class Slots:
    """A fixed number of rows of a decoder.

        slots.start(0, inputs, length)        # row 0 takes a prompt
        while (token := slots.read(0)) is None: ...
        tokens = slots.step()                 # the next token of every row that has read its prompt
        slots.end(0)

    It is used from one thread, inside `jax.set_mesh(mesh)`.

    Args:
      graphdef, params: of a `Decoder`.
      rows: the number of rows.
      room: the most positions of a row: its prompt, soft prompt and what is written, together.
      users: keys and values of any one user, whose shapes are those of all users; None for a decoder without cross-attention.
      mesh: the devices.
      chunks: the numbers of positions of a prompt that may be read in one call, ascending.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Params,
        *,
        rows: int,
        room: int,
        users: UserKV | None,
        mesh: Mesh,
        chunks: Sequence[int] = CHUNKS,
    ):
        if rows < 1 or room < 2:
            raise ValueError(f"{rows} rows of {room} positions: there must be at least 1 row of 2.")
        self._graphdef, self._params, self._room = graphdef, params, room
        self._chunks = [*(chunk for chunk in chunks if chunk < room), *([] if room > max(chunks) else [room])]
        # XLA on CPU copies what it slices of a stack of layers: the slices are made once, where layers are inlined.
        unrolled = merge(graphdef, params).stack.unroll
        self._of_layers = _layers(graphdef, params) if unrolled else None
        shapes = jax.eval_shape(functools.partial(_empty, graphdef, rows=rows, room=room), params, users)
        like = meshes.rows_like(shapes, mesh, axis=1)
        if users is not None:
            like = like._replace(user=like.user._replace(mask=meshes.rows_like(shapes.user.mask, mesh)))
        place = jax.tree.map(lambda shape: shape.sharding, like)
        empty = jax.jit(_empty, static_argnames=("graphdef", "rows", "room"), out_shardings=place)
        self._memory = empty(graphdef, params, users, rows=rows, room=room)
        self._users, self._width, self._dtype = users, merge(graphdef, params).embed.shape[1], self._memory.cache.k.dtype
        self._reading: dict[int, _Row] = {}
        self._sampling, self._seeds = [GREEDY] * rows, [0] * rows
        self._of_rows = by_row(self._sampling, self._seeds, rows)
        self._writing = np.zeros(rows, bool)
        self._token, self._position, self._written = (np.zeros(rows, np.int32) for _ in range(3))

    def start(
        self,
        row: int,
        inputs: Float[AnyArray, "1 X D"],
        length: int,
        *,
        user: UserKV | None = None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> None:
        """Give a row a prompt.

        Args:
          row: a row that is free.
          inputs: the prompt as right-padded embeddings, soft prompt included.
          length: the length of the prompt.
          user: keys and values of the row's user; None where the decoder has no cross-attention.
          sampling: how tokens are drawn.
          seed: what they are drawn with.

        Raises:
          ValueError: the row is in use, the prompt does not fit, or a user is missing or superfluous.
        """
        if row in self._reading or self._writing[row]:
            raise ValueError(f"Row {row} is in use: end it first.")
        if not 1 <= length < self._room or length > inputs.shape[1]:
            raise ValueError(f"A prompt of {length} positions: it has at least 1, and leaves room in {self._room} for a token.")
        if (user is None) != (self._users is None):
            raise ValueError("A row has a user if and only if the decoder has cross-attention.")
        # Chunks may reach beyond the prompt: what they read there is never seen.
        width = self._room + self._chunks[-1]
        inputs = jnp.pad(inputs[:, :width], [(0, 0), (0, max(width - inputs.shape[1], 0)), (0, 0)])
        if user is not None:
            self._memory = _seat(self._memory, np.int32(row), user)
        self._reading[row] = _Row(inputs, length, 0)
        self._sampling[row], self._seeds[row] = sampling, seed
        self._of_rows = by_row(self._sampling, self._seeds, len(self._sampling))

    def read(self, row: int) -> int | None:
        """Read the next chunk of a row's prompt; return the first token that is written once all is read, else None."""
        inputs, length, start = self._reading[row]
        chunk = next((chunk for chunk in self._chunks if chunk >= length - start), self._chunks[-1])
        one = by_row(self._sampling[row], [self._seeds[row]], 1)
        self._memory, token = _read(
            self._graphdef, self._params, self._of_layers, self._memory, inputs, np.int32(row), np.int32(start), np.int32(length),
            one, chunk=chunk,
        )  # fmt: skip
        if start + chunk < length:
            self._reading[row] = _Row(inputs, length, start + chunk)
            return None
        del self._reading[row]
        self._writing[row], self._token[row], self._position[row], self._written[row] = True, int(token), length, 1
        return int(token)

    def step(self) -> Int[np.ndarray, " R"]:
        """Let all rows that have read their prompts write a token; return the tokens, -1 for the other rows.

        Raises:
          ValueError: a row has no room left.
        """
        if self._writing.any() and self._position[self._writing].max() >= self._room:
            raise ValueError(f"A row holds {self._room} positions already: end it.")
        position = np.where(self._writing, self._position, 0).astype(np.int32)
        tokens = self._run(position, self._looked_at(int(position.max()) + 1))
        found = np.where(self._writing, tokens, -1).astype(np.int32)
        self._token = np.maximum(found, 0)
        self._position, self._written = self._position + self._writing, self._written + self._writing
        return found

    def end(self, row: int) -> None:
        """Free a row, whatever it does."""
        self._reading.pop(row, None)
        self._writing[row], self._sampling[row] = False, GREEDY

    def compile(self) -> None:
        """Compile all programs, by running each while all rows are free: no later call compiles anything.

        Raises:
          ValueError: a row is in use.
        """
        if self._reading or self._writing.any():
            raise ValueError("Rows are in use: compile before they are.")
        for chunk in self._chunks:
            self.start(0, jnp.zeros((1, chunk, self._width), self._dtype), min(chunk, self._room - 1), user=self._users)
            self.read(0)
            self.end(0)
        for length in sorted({self._looked_at(length) for length in range(1, self._room + 1)}):
            self._run(np.zeros(len(self._writing), np.int32), length)

    def _run(self, position: Int[np.ndarray, " R"], slots: int) -> Int[np.ndarray, " R"]:
        """Run a step; return a token for each row, which is not meant for rows that do not write."""
        slot = np.where(self._writing, position, self._room).astype(np.int32)
        rows = _Rows(self._token, position, slot, self._written)
        self._memory, tokens = _step(
            self._graphdef, self._params, self._of_layers, self._memory, rows, self._of_rows, slots=slots
        )  # fmt: skip
        return meshes.fetch(tokens)

    def _looked_at(self, length: int) -> int:
        """Return how many slots of the cache a call looks at, whose rows are at most this long."""
        slots = SHORTEST
        while slots < length:
            slots *= 2
        return min(slots, self._room)
