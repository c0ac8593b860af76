"""Decoding by rows that come and go (continuous batching).

A fixed number of rows share one cache and one compiled step. A row takes a prompt, reads it in chunks, writes a token in each
step, and is free again; the caller decides when each of these happens. What a row writes equals what `generate` writes for its
prompt alone: it does not depend on the other rows, on the row's place, or on what the row held before.

    cache of a row    [prompt | what is written | free slots]

Position p of a row is at slot p. Programs are compiled for a few chunk sizes and for a few numbers of slots that attention reads,
so that short rows do not pay for the room of long ones. A row that writes while no other does goes through a program for one row.

Axes: R rows, C positions of a chunk, X positions of a prompt, D numbers of an embedding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from user_llm.common import mesh as meshes
from user_llm.common.arrays import AnyArray
from user_llm.common.mesh import constrain
from user_llm.common.trees import Params, merge
from user_llm.models.sampling import GREEDY, RowSampling, Sampling, by_row, choose
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import LayersKV, UserKV
from user_llm.nn.visibility import cache_mask

# K/V of the users of all rows: stacked by layer, or one array for each layer where layers are inlined.
Users = UserKV | LayersKV

LEAST_SEEN = 128  # The least number of slots that a program reads; the others are its doubles.


@dataclasses.dataclass
class _Row:
    """A row in use.

    Attributes:
      inputs: the embeddings of its prompt, without padding.
      read: the number of positions of the prompt that have been read.
      written: the number of tokens that the row has written.
      token: the latest of these tokens.
    """

    inputs: Float[np.ndarray, "X D"]
    read: int = 0
    written: int = 0
    token: int = 0

    @property
    def position(self) -> int:
        """The position of the latest token, which the next step reads."""
        return len(self.inputs) + self.written - 1


def _split(cache: KVCache, users: Users | None) -> tuple[KVCache, Users | None]:
    """Spread the rows and the heads of what stays on the devices over the mesh."""
    over = lambda a: constrain(a, *[None] * (a.ndim - 4), "rows", "heads", None, None)  # noqa: E731
    if users is not None:
        k, v = jax.tree.map(over, (users.k, users.v))
        users = users._replace(k=k, v=v, mask=constrain(jnp.asarray(users.mask), "rows", None))
    return KVCache(over(cache.k), over(cache.v)), users


def _of_row(tree: Any, row: Int[Array, ""], axis: int = -4) -> Any:
    """Return one row of arrays [..., rows, heads, slots, H], its axis kept. Devices send this row alone to each other."""
    return jax.tree.map(lambda a: jnp.take(a, row[None], axis=axis, mode="clip"), tree)


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "room", "users"))
def _empty(graphdef: nnx.GraphDef, params: Params, rows: int, room: int, users: Any) -> tuple[KVCache, Users | None]:
    """Return the cache and the users' K/V of free rows; `users` are the leaves' shapes and types of one user, or None."""
    decoder = merge(graphdef, params)
    cache = decoder.init_cache(rows, room, decoder.dtype)
    if users is None:
        return _split(cache, None)
    k, v, mask = (jnp.zeros(shape, dtype) for shape, dtype in users)
    of_all = UserKV(jnp.repeat(k, rows, 1), jnp.repeat(v, rows, 1), jnp.repeat(mask, rows, 0))
    return _split(cache, of_all.by_layer() if decoder.config.unroll else of_all)


@functools.partial(jax.jit, donate_argnames=("cache", "users"))
def _take(cache: KVCache, users: Users | None, row: Int[Array, ""], user: UserKV | None) -> tuple[KVCache, Users | None]:
    """Empty a row's cache, so that not even a NaN of its former text remains, and store its user."""
    cache = KVCache(*(a.at[:, row].set(0) for a in cache))
    if users is not None and user is not None:
        own = user.by_layer() if isinstance(users, LayersKV) else user
        store = lambda a, new: a.at[..., row, :, :, :].set(new[..., 0, :, :, :])  # noqa: E731
        k, v = jax.tree.map(store, (users.k, users.v), (own.k, own.v))
        users = users._replace(k=k, v=v, mask=jnp.asarray(users.mask).at[row].set(user.mask[0]))
    return _split(cache, users)


@functools.partial(jax.jit, static_argnames=("graphdef", "seen"), donate_argnames="cache")
def _read(
    graphdef: nnx.GraphDef,
    params: Params,
    layers: Any,
    cache: KVCache,
    users: Users | None,
    row: Int[Array, ""],
    inputs: Float[Array, "1 C D"] | Int[Array, " 1"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    written: Int[Array, ""],
    sampling: RowSampling,
    seen: int,
) -> tuple[KVCache, Int[Array, ""]]:
    """Read `count` embeddings from position `first` on into a row; also return the token that follows.

    Args:
      inputs: embeddings, or in their place the token that the row wrote last.
      written: the number of tokens that the row has written.
    """
    decoder = merge(graphdef, params)
    if inputs.ndim == 1:
        inputs = decoder.embed_tokens(inputs[:, None])
    positions = (first + jnp.arange(inputs.shape[1]))[None]
    user = None
    if users is not None:
        user = users._replace(k=_of_row(users.k, row), v=_of_row(users.v, row), mask=_of_row(users.mask, row, axis=0))
    hidden, own = decoder(
        inputs, mask=cache_mask(positions, seen), positions=positions, user=user, layers=layers,
        cache=_of_row(jax.tree.map(lambda a: a[..., :seen, :], cache), row),
    )  # fmt: skip
    cache = KVCache(*(a.at[:, row[None], :, :seen].set(b) for a, b in zip(cache, own, strict=True)))
    token = choose(decoder.logits(jnp.take(hidden, count - 1, axis=1, mode="clip")), written, sampling)[0]
    return _split(cache, None)[0], token


@functools.partial(jax.jit, static_argnames=("graphdef", "seen"), donate_argnames="cache")
def _step(
    graphdef: nnx.GraphDef,
    params: Params,
    layers: Any,
    cache: KVCache,
    users: Users | None,
    tokens: Int[Array, " R"],
    positions: Int[Array, " R"],
    written: Int[Array, " R"],
    sampling: RowSampling,
    seen: int,
) -> tuple[KVCache, Int[Array, " R"]]:
    """Read each row's latest token and choose the next one. A row at position -1 sees nothing and stores nothing."""
    decoder = merge(graphdef, params)
    hidden, cache = decoder(
        decoder.embed_tokens(tokens[:, None]), mask=cache_mask(positions[:, None], seen), positions=positions[:, None],
        cache=cache, user=users, layers=layers,
    )  # fmt: skip
    return _split(cache, None)[0], choose(decoder.logits(hidden[:, 0]), written, sampling)


@functools.partial(jax.jit, static_argnames="graphdef")
def _layers(graphdef: nnx.GraphDef, params: Params) -> Any:
    return merge(graphdef, params).stack.layers()


class Slots:
    """A fixed number of rows that are decoded together; a row takes a prompt, writes tokens, and is free again.

    All calls come from one thread. Where the parameters lie on a mesh, all calls are made inside `jax.set_mesh`.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Params,
        *,
        rows: int,
        room: int,
        users: UserKV | None,
        chunks: Sequence[int] = (16, 64, 256),
    ):
        """Make free rows.

        Args:
          graphdef: the structure of a `Decoder`.
          params: the parameters of the same decoder.
          rows: the number of rows.
          room: the number of positions of a row. A soft prompt counts, and so does what is written, but for its last token.
          users: the K/V of any one user, or their shapes; None for a decoder without cross-attention.
          chunks: the numbers of positions that are read at once.

        Raises:
          ValueError: rows, room or chunks below 1, a room that is longer than the texts that the decoder is read for, or K/V that are
            not of one user.
        """
        if min(rows, room, *(chunks or [0])) < 1:
            raise ValueError(f"rows {rows}, room {room} and chunks {tuple(chunks)} must be at least 1.")
        self._model = (graphdef, params)
        config = merge(graphdef, params).config
        config.check_length(room, "A row")
        # Copies of the weights that a compiled loop would make once, and a single step would make each time.
        self._layers = _layers(graphdef, params) if config.unroll else None
        self.rows, self.room = rows, room
        self._chunks = sorted({min(chunk, room) for chunk in chunks})
        self._lengths = [n for n in (LEAST_SEEN << power for power in range(room.bit_length())) if n < room] + [room]
        self._nobody, shapes = None, None
        if users is not None:
            if users.k.shape[1] != 1 or users.mask.shape[0] != 1:
                raise ValueError(f"K/V of {users.mask.shape[0]} users: the rows take K/V of the shape of one user.")
            shapes = tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in users)
            self._nobody = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), users)
        self._cache, self._users = _empty(graphdef, params, rows, room, shapes)
        self._used: dict[int, _Row] = {}
        self._greedy = meshes.fetch(by_row(GREEDY, None, 1))
        self._sampling = jax.tree.map(lambda a: np.repeat(a, rows), self._greedy)

    def start(
        self,
        row: int,
        inputs: Float[AnyArray, "1 X D"],
        length: int,
        *,
        user: UserKV | None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> None:
        """Take a free row for a prompt, of which nothing is read yet.

        Args:
          inputs: right-padded embeddings, as `embed_prompts` returns them.
          length: the number of real positions of `inputs`.
          user: the K/V of the prompt's user; None for no user.
          seed: what a sampled row draws depends on it and on the number of tokens that the row has written.

        Raises:
          ValueError: the row is in use or does not exist, the prompt does not fit, or the user is not of the shape of one.
        """
        if not 0 <= row < self.rows or row in self._used:
            raise ValueError(f"Row {row} is not free: there are rows 0 to {self.rows - 1}, in use are {sorted(self._used)}.")
        if inputs.ndim != 3 or len(inputs) != 1 or not 1 <= length <= inputs.shape[1]:
            raise ValueError(f"Embeddings of shape {inputs.shape} hold no prompt [1, X, D] of {length} positions.")
        if length > self.room:
            raise ValueError(f"A prompt of {length} positions does not fit a row's room of {self.room}.")
        own = self._user(user)
        drawn = meshes.fetch(by_row([sampling], [seed], 1))
        prompt = meshes.fetch(inputs)[0, :length].astype(self._cache.k.dtype)
        self._cache, self._users = _take(self._cache, self._users, np.int32(row), own)
        for of_all, value in zip(self._sampling, drawn, strict=True):
            of_all[row] = value[0]
        self._used[row] = _Row(prompt)

    def read(self, row: int) -> int | None:
        """Read the next chunk of a row's prompt; return the row's first token if the prompt ends with it, else None.

        Raises:
          ValueError: the row has no prompt, or has read it.
        """
        state = self._used.get(row)
        if state is None or state.written:
            raise ValueError(f"Row {row} has no prompt left to read.")
        rest = state.inputs[state.read :]
        size = next((chunk for chunk in self._chunks if chunk >= len(rest)), self._chunks[-1])
        count = min(size, len(rest))
        chunk = np.zeros((1, size, rest.shape[1]), rest.dtype)
        chunk[0, :count] = rest[:count]
        token = self._read(row, chunk, state.read, count, 0, self._seen(min(state.read + size, self.room)))
        state.read += count
        if state.read < len(state.inputs):
            return None
        state.written, state.token = 1, int(meshes.fetch(token))
        return state.token

    def step(self) -> Int[np.ndarray, " rows"]:
        """Let each row whose prompt has been read write one token; return these tokens, -1 for the other rows.

        Raises:
          ValueError: a row has no room left; nothing has been done then.
        """
        tokens, written, positions = np.zeros((3, self.rows), np.int32)
        positions -= 1
        writing = {row: state for row, state in self._used.items() if state.written}
        for row, state in writing.items():
            tokens[row], written[row], positions[row] = state.token, state.written, state.position
        last = int(positions.max())
        if last >= self.room:
            raise ValueError(f"Row {positions.argmax()} is full: its prompt and text fill its room of {self.room}.")
        if not writing:
            return positions
        seen = self._seen(last + 1)
        if len(writing) == 1:
            (row,) = writing
            drawn = np.zeros_like(tokens)
            drawn[row] = meshes.fetch(self._read(row, tokens[row : row + 1], last, 1, int(written[row]), seen))
        else:
            drawn = self._step(tokens, positions, written, seen)
        for row, state in writing.items():
            state.written, state.token = state.written + 1, int(drawn[row])
        return np.where(positions >= 0, drawn, -1)

    def end(self, row: int) -> None:
        """Free a row, whatever it was doing; a free row stays free."""
        if self._used.pop(row, None) is not None:
            for of_all, value in zip(self._sampling, self._greedy, strict=True):
                of_all[row] = value[0]

    def compile(self) -> None:
        """Compile every program that `start`, `read` and `step` can need. Rows in use keep what they hold."""
        # A row that does not exist, and positions outside the cache: nothing is stored.
        self._cache, self._users = _take(self._cache, self._users, np.int32(self.rows), self._nobody)
        width = self._model[1]["embed"].shape[-1]
        idle = np.zeros(self.rows, np.int32)
        for seen in self._lengths:
            self._step(idle, idle - 1, idle, seen)
            self._read(0, idle[:1], self.room, 1, 0, seen)
            for size in self._chunks:
                if size <= seen:
                    self._read(0, np.zeros((1, size, width), self._cache.k.dtype), self.room, 1, 0, seen)

    def _read(self, row: int, inputs: np.ndarray, first: int, count: int, written: int, seen: int) -> Array:
        sampling = RowSampling(*(a[row : row + 1] for a in self._sampling))
        at = (np.int32(number) for number in (first, count, written))
        self._cache, token = _read(
            *self._model, self._layers, self._cache, self._users, np.int32(row), inputs, *at, sampling, seen=seen
        )
        return token

    def _step(self, tokens: np.ndarray, positions: np.ndarray, written: np.ndarray, seen: int) -> Int[np.ndarray, " rows"]:
        self._cache, drawn = _step(
            *self._model, self._layers, self._cache, self._users, tokens, positions, written, self._sampling, seen=seen
        )
        return meshes.fetch(drawn)

    def _seen(self, slots: int) -> int:
        return next(length for length in self._lengths if length >= slots)

    def _user(self, user: UserKV | None) -> UserKV | None:
        """Return a user's K/V on the host, those of nobody for None; refuse other shapes than that of one user."""
        if user is None or self._nobody is None:
            if user is not None:
                raise ValueError("These rows take no user: make them with the shape of one user's K/V.")
            return self._nobody
        shapes = [leaf.shape for leaf in user]
        if shapes != [leaf.shape for leaf in self._nobody]:
            raise ValueError(f"K/V of shapes {shapes} are not those of one user, {[leaf.shape for leaf in self._nobody]}.")
        return jax.tree.map(lambda a, like: meshes.fetch(a).astype(like.dtype), user, self._nobody)
