"""Generation with cached keys and values: greedy text, and beam search over a catalogue's titles.

One batch may mix prompt lengths and users. A prompt is read once per row. The beams of a row are its queries side by
side, so that they share the prompt's and the user's K/V and nothing is copied per beam:

    queries  [beam 0 | beam 1 | ...]              written to slot T + step * beams + beam
    keys     [prompt, T slots | step 0's beams | step 1's beams | ...]
    mask     a beam sees the real prompt and, of each step, the one slot of its own past

When beams are reordered only that past (integers) moves, never the cache. Left out: sampling.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.trees import Params, merge
from user_llm.models.decoder import Decoder
from user_llm.nn.attention import KVCache, cache_mask
from user_llm.nn.cross_attention import UserKV


def _prefill(
    decoder: Decoder, prompts: Array, lengths: Int[Array, "B"], user: UserKV | None, room: int
) -> tuple[Float[Array, "B D"], KVCache]:
    """Return the hidden state at each prompt's last token and the cache, with `room` free slots behind the prompt's."""
    inputs = prompts if prompts.ndim == 3 else decoder.embed_tokens(prompts)
    batch, length, _ = inputs.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    cache = decoder.init_cache(batch, length, inputs.dtype)
    hidden, filled = decoder(inputs, mask=cache_mask(positions, length), positions=positions, cache=cache, user=user)
    cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]), filled)
    return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0], cache


def _choose(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_tokens"))
def generate(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Int[Array, "B T"] | Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    *,
    max_tokens: int,
    eos_id: int | Int[Array, ""] | None,
    user: UserKV | None = None,
) -> Int[Array, "B max_tokens"]:
    """Continue each prompt by the likeliest token, again and again.

    Args:
      graphdef: of a `Decoder`.
      params: of the same.
      prompts: right-padded tokens, or embeddings where a prompt holds more than tokens.
      lengths: of the prompts, at least 1.
      max_tokens: to write.
      eos_id: ends a row, whose remaining tokens are all `eos_id`; None for rows that only `max_tokens` ends.
      user: K/V of each row's user.
    """
    decoder = merge(graphdef, params)
    hidden, cache = _prefill(decoder, prompts, lengths, user, max_tokens)
    slots = cache.k.shape[2]
    end = -1 if eos_id is None else eos_id
    token = _choose(decoder.logits(hidden))
    tokens = jnp.full((lengths.shape[0], max_tokens), end, jnp.int32).at[:, 0].set(token)

    def unfinished(state):
        step, token, _, _ = state
        return (step < max_tokens) & (token != end).any()

    def advance(state):
        step, token, tokens, cache = state
        # Overwrites the padding behind shorter prompts, which no query could see until now.
        positions = (lengths + step - 1)[:, None]
        hidden, cache = decoder(
            decoder.embed_tokens(token[:, None]),
            mask=cache_mask(positions, slots), positions=positions, cache=cache, user=user,
        )  # fmt: skip
        token = jnp.where(token == end, end, _choose(decoder.logits(hidden[:, 0])))
        return step + 1, token, tokens.at[:, step].set(token), cache

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), token, tokens, cache))[2]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "token", "item"],
    meta_fields=["depth", "root_fanout", "fanout"],
)
@dataclasses.dataclass(frozen=True)
class Trie:
    """All titles of a catalogue as a tree of tokens, in compressed sparse rows: memory grows with the nodes alone.

    Nodes are numbered breadth first from the root, 0: the children of n are the nodes first[n] to first[n + 1] - 1.

    Attributes:
      token: that leads to each node; the root's means nothing.
      item: id of the item whose title ends at the node, a leaf; 0 at inner nodes.
      depth: tokens of the longest title, the end token included.
      root_fanout, fanout: most children of the root, and of any other node.
    """

    first: Int[Array, "rows"]
    token: Int[Array, "nodes"]
    item: Int[Array, "nodes"]
    depth: int
    root_fanout: int
    fanout: int

    @classmethod
    def build(cls, titles: Mapping[int, Sequence[int]]) -> "Trie":
        """Build the trie of {item id: tokens}, where all titles end in one token that occurs nowhere else.

        Raises:
          ValueError: no titles, an item id below 1, two equal titles, or one without the end token or with it inside.
        """
        ids = np.fromiter(titles, np.int32, len(titles))
        lengths = np.fromiter(map(len, titles.values()), np.int32, len(titles))
        if not len(ids) or ids.min() < 1:
            raise ValueError("A trie needs at least one title, and item ids from 1.")
        table = np.full((len(ids), lengths.max() + 1), -1, np.int32)  # a column of -1 ends every row
        for row, tokens in zip(table, titles.values(), strict=True):
            row[: len(tokens)] = tokens
        end = table[0, lengths[0] - 1]
        bad = (table[np.arange(len(ids)), lengths - 1] != end) | ((table == end).sum(1) != 1)
        if bad.any() or end < 0:
            raise ValueError(f"The title of item {ids[bad.argmax()]} must end in the end token {end} and hold it once.")
        order = np.lexsort(table.T[::-1])
        ids, lengths, table = ids[order], lengths[order], table[order]
        equal = (table[1:] == table[:-1]).all(1)
        if equal.any():
            at = equal.argmax()
            raise ValueError(f"Items {ids[at]} and {ids[at + 1]} have the same title: make their tokens differ.")
        return cls._from_sorted(ids, lengths, table)

    @classmethod
    def _from_sorted(cls, ids: np.ndarray, lengths: np.ndarray, table: np.ndarray) -> "Trie":
        """Number the nodes level by level: a row opens a node wherever its prefix differs from the row's above."""
        token, item, parent = [np.zeros(1, np.int32)], [np.zeros(1, np.int32)], []
        node, nodes = np.zeros(len(ids), np.int32), 1
        differs = np.arange(len(ids)) == 0
        for level in range(lengths.max()):
            differs[1:] |= table[1:, level] != table[:-1, level]
            alive = lengths > level
            opens = differs & alive
            token.append(table[opens, level])
            item.append(np.where(lengths == level + 1, ids, 0)[opens])
            parent.append(node[opens])
            node = np.where(alive, nodes - 1 + np.cumsum(opens), node)
            nodes += opens.sum()
        children = np.bincount(np.concatenate(parent), minlength=nodes)
        return cls(
            first=jnp.asarray(np.concatenate([[1], 1 + np.cumsum(children)]), jnp.int32),
            token=jnp.asarray(np.concatenate(token), jnp.int32),
            item=jnp.asarray(np.concatenate(item), jnp.int32),
            depth=int(lengths.max()),
            root_fanout=int(children[0]),
            fanout=int(max(children[1:].max(), 1)),
        )

    def expand(
        self, node: Int[Array, "B R"], logits: Float[Array, "B R V"], fanout: int
    ) -> tuple[Int[Array, "B R C"], Float[Array, "B R C"]]:
        """Return each node's children and their log-probs, -inf where there are fewer; a leaf stays, at no cost."""
        child = self.first[node][..., None] + jnp.arange(fanout)
        real = child < self.first[node + 1][..., None]
        child = jnp.where(real, child, node[..., None])
        log_prob = jnp.take_along_axis(logits, self.token[child], axis=-1)
        log_prob -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        stays = (self.item[node] > 0)[..., None] & (jnp.arange(fanout) == 0)
        return child, jnp.where(real, log_prob, jnp.where(stays, 0.0, -jnp.inf))


@functools.partial(jax.jit, static_argnames=("graphdef", "beams"))
def beam_search(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Int[Array, "B T"] | Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    trie: Trie,
    *,
    beams: int,
    user: UserKV | None = None,
) -> tuple[Int[Array, "B beams"], Float[Array, "B beams"]]:
    """Return the likeliest items of each row and the log-probs of their titles, best first; item 0 at -inf if too few.

    A title's log-prob is the sum of its tokens' under the model's softmax over the whole vocabulary: the trie chooses
    what is scored and changes no score. With as many beams as titles the result is exact. Arguments as in `generate`.
    """
    decoder = merge(graphdef, params)
    hidden, cache = _prefill(decoder, prompts, lengths, user, trie.depth * beams)
    batch, prompt_slots = prompts.shape[:2]
    lane = jnp.arange(beams)
    of_prompt = jnp.broadcast_to(jnp.arange(prompt_slots) < lengths[:, None, None], (batch, beams, prompt_slots))

    root = jnp.zeros((batch, 1), jnp.int32)
    child, log_prob = trie.expand(root, decoder.logits(hidden)[:, None], trie.root_fanout)
    _, node, score = _best(child, log_prob, beams)
    past = jnp.full((batch, beams, trie.depth), -1, jnp.int32)  # the lane each beam was in at each step; -1: not yet

    def unfinished(state):
        step, node, score, _, _ = state
        return (step < trie.depth) & ((trie.item[node] == 0) & (score > -jnp.inf)).any()

    def advance(state):
        step, node, score, past, cache = state
        past = past.at[:, :, step].set(lane)
        mask = _beam_mask(of_prompt, past, beams)
        positions = jnp.broadcast_to((lengths + step)[:, None], (batch, beams))
        slots = jnp.broadcast_to(prompt_slots + step * beams + lane, (batch, beams))
        hidden, cache = decoder(
            decoder.embed_tokens(trie.token[node]),
            mask=mask, positions=positions, cache=cache, slots=slots, user=user,
        )  # fmt: skip
        child, log_prob = trie.expand(node, decoder.logits(hidden), trie.fanout)
        origin, node, score = _best(child, score[..., None] + log_prob, beams)
        past = jnp.take_along_axis(past, origin[..., None], axis=1)
        return step + 1, node, score, past, cache

    _, node, score, _, _ = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), node, score, past, cache))
    return jnp.where(score > -jnp.inf, trie.item[node], 0), score


def _best(
    child: Int[Array, "B R C"], score: Float[Array, "B R C"], beams: int
) -> tuple[Int[Array, "B beams"], Int[Array, "B beams"], Float[Array, "B beams"]]:
    """Return the beam of origin, node and score of each row's best candidates, with -inf where there are too few."""
    batch, _, fanout = child.shape
    missing = max(beams - child[0].size, 0)
    flat = jnp.pad(score.reshape(batch, -1), ((0, 0), (0, missing)), constant_values=-jnp.inf)
    score, index = jax.lax.top_k(flat, beams)
    node = jnp.take_along_axis(jnp.pad(child.reshape(batch, -1), ((0, 0), (0, missing))), index, axis=1)
    return index // fanout, node, score


def _beam_mask(of_prompt: Bool[Array, "B R T"], past: Int[Array, "B R steps"], beams: int) -> Bool[Array, "B R T+steps*R"]:
    """Let each beam see its prompt and the slot of its own past at every step so far."""
    own = past[..., None] == jnp.arange(beams)
    return jnp.concatenate([of_prompt, own.reshape(*past.shape[:2], -1)], axis=-1)
