"""A catalogue's titles as a tree of tokens, which beam search walks.

Left out: titles that are added one by one; a catalogue of 10,000 is built in a fraction of a second.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from user_llm.common.arrays import AnyArray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "parent", "token", "item"],
    meta_fields=["levels", "root_fanout", "fanout"],
)
@dataclasses.dataclass(frozen=True)
class Trie:
    """All titles of a catalogue as a tree of tokens, in compressed sparse rows: memory grows with the nodes alone.

    Nodes are numbered breadth first from the root, 0: the children of n are the nodes first[n] to first[n + 1] - 1.

    Attributes:
      parent: the node above each node; the root is its own.
      token: that leads to each node; the root's means nothing.
      item: id of the item whose title ends at the node, a leaf; 0 at inner nodes.
      levels: the first node of each level, from the root's level down, and behind them the number of all nodes.
      root_fanout, fanout: most children of the root, and of any other node.
    """

    first: Int[Array, " rows"]
    parent: Int[Array, " nodes"]
    token: Int[Array, " nodes"]
    item: Int[Array, " nodes"]
    levels: tuple[int, ...]
    root_fanout: int
    fanout: int

    @property
    def depth(self) -> int:
        """The tokens of the longest title, the end token included."""
        return len(self.levels) - 2

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
        token, item, parent = ([np.zeros(1, np.int32)] for _ in range(3))
        node, levels = np.zeros(len(ids), np.int32), [0, 1]
        differs = np.arange(len(ids)) == 0
        for level in range(lengths.max()):
            differs[1:] |= table[1:, level] != table[:-1, level]
            alive = lengths > level
            opens = differs & alive
            token.append(table[opens, level])
            item.append(np.where(lengths == level + 1, ids, 0)[opens])
            parent.append(node[opens])
            node = np.where(alive, levels[-1] - 1 + np.cumsum(opens), node)
            levels.append(levels[-1] + int(opens.sum()))
        above = np.concatenate(parent)
        children = np.bincount(above[1:], minlength=levels[-1])
        return cls(
            first=jnp.asarray(np.concatenate([[1], 1 + np.cumsum(children)]), jnp.int32),
            parent=jnp.asarray(above, jnp.int32),
            token=jnp.asarray(np.concatenate(token), jnp.int32),
            item=jnp.asarray(np.concatenate(item), jnp.int32),
            levels=tuple(levels),
            root_fanout=int(children[0]),
            fanout=int(max(children[1:].max(), 1)),
        )

    def expand(
        self, node: Int[AnyArray, "B R"], logits: Float[Array, "B R V"], fanout: int, *, among_children: bool = False
    ) -> tuple[Int[Array, "B R C"], Float[Array, "B R C"]]:
        """Return each node's children and their log-probs, -inf where there are fewer; a leaf stays, at no cost.

        Args:
          fanout: C, the most children of any of the nodes.
          among_children: whether the softmax is over the children alone, and not over the whole vocabulary.
        """
        child = self.first[node][..., None] + jnp.arange(fanout)
        real = child < self.first[node + 1][..., None]
        child = jnp.where(real, child, node[..., None])
        log_prob = jnp.take_along_axis(logits, self.token[child], axis=-1)
        among = jnp.where(real, log_prob, -jnp.inf) if among_children else logits
        log_prob -= jax.nn.logsumexp(among, axis=-1, keepdims=True)
        stays = (self.item[node] > 0)[..., None] & (jnp.arange(fanout) == 0)
        return child, jnp.where(real, log_prob, jnp.where(stays, 0.0, -jnp.inf))

    def best_below(self, scores: Float[AnyArray, "B V"]) -> Float[Array, "B nodes"]:
        """Return the highest score among the items at and below each node, for each row of scores of all items."""
        best = jnp.where(self.item > 0, scores[:, self.item], -jnp.inf).T
        for start, stop in reversed([*itertools.pairwise(self.levels)][1:]):  # from the deepest level up
            best = best.at[self.parent[start:stop]].max(best[start:stop], indices_are_sorted=True)
        return best.T
