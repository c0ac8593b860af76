"""A catalogue's titles as a tree of tokens, which beam search walks.

Left out: titles that are added one by one; a catalogue of 10,000 is built in a fraction of a second.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from user_llm.common.arrays import AnyArray


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

    first: Int[Array, " rows"]
    token: Int[Array, " nodes"]
    item: Int[Array, " nodes"]
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

    def of_shape(self, other: "Trie") -> "Trie":
        """Return the same trie with arrays and bounds as large as those of a trie that holds these titles and more.

        One compiled program then serves both, at the cost of the larger one.
        """
        more = len(other.token) - len(self.token)
        token, item = (jnp.pad(array, (0, more)) for array in (self.token, self.item))
        first = jnp.pad(self.first, (0, more), mode="edge")  # nodes without children, which nothing leads to
        return dataclasses.replace(other, first=first, token=token, item=item)

    def expand(
        self, node: Int[AnyArray, "B R"], logits: Float[Array, "B R V"], fanout: int
    ) -> tuple[Int[Array, "B R C"], Float[Array, "B R C"]]:
        """Return each node's children and their log-probs, -inf where there are fewer; a leaf stays, at no cost."""
        child = self.first[node][..., None] + jnp.arange(fanout)
        real = child < self.first[node + 1][..., None]
        child = jnp.where(real, child, node[..., None])
        log_prob = jnp.take_along_axis(logits, self.token[child], axis=-1)
        log_prob -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        stays = (self.item[node] > 0)[..., None] & (jnp.arange(fanout) == 0)
        return child, jnp.where(real, log_prob, jnp.where(stays, 0.0, -jnp.inf))
