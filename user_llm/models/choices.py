"""Which tokens a title can go on with: the loss of a title's token is a softmax over these alone (MSL, arXiv 2504.04178).

A softmax over the whole vocabulary also pushes down the tokens that beam search in a trie never looks at. Where one token alone
can follow, it is certain: there is nothing to learn, and the loss leaves the token out.

Axis letters: V tokens of the vocabulary, I items and PAD, T tokens of a row, L tokens of the longest title, R rows, P answer positions
of a row, W sets that are masks, N sets that are lists, C tokens of the longest list.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from user_llm.common.arrays import AnyArray
from user_llm.models.trie import Trie
from user_llm.nn.losses import Columns

LISTED = 64  # the most tokens of a set that is a list; a larger one is a mask over the vocabulary


class Choices(NamedTuple):
    """The sets of tokens that the titles of a catalogue can go on with.

    Attributes:
      of_title: for each item and each place of its title, the number of the set that the token there is chosen from; -1 where it is no
        choice, and where no token is trained.
      masks, lists: the sets, as in `Columns`. Set 0 is the whole vocabulary. It stands in for rows without a set, which are
        not trained.
    """

    of_title: Int[np.ndarray, "I L"]
    masks: Bool[np.ndarray, "W V"]
    lists: Int[np.ndarray, "N C"]

    @classmethod
    def build(cls, trie: Trie, vocab_size: int, max_title_tokens: int) -> "Choices":
        """Return the sets of all titles of a trie.

        Args:
          max_title_tokens: the most tokens of a title in training. A longer title is cut there, and its end is not trained.
        """
        first, parent, token, item = (np.asarray(a) for a in (trie.first, trie.parent, trie.token, trie.item))
        children = np.diff(first)
        large, small = np.flatnonzero(children > LISTED), np.flatnonzero((children > 1) & (children <= LISTED))
        masks = np.zeros((1 + len(large), vocab_size), bool)
        masks[0] = True
        for mask, node in zip(masks[1:], large, strict=True):
            mask[token[first[node] : first[node + 1]]] = True
        place = np.arange(children[small].max(initial=1))
        lists = np.where(place < children[small, None], token[np.minimum(first[small, None] + place, len(token) - 1)], -1)
        sets = np.full(len(token), -1, np.int32)
        sets[np.concatenate([large, small])] = 1 + np.arange(len(large) + len(small))

        # The nodes above each leaf, from the leaf's parent up to the root: the token at place n was chosen at depth n.
        leaves = np.flatnonzero(item)
        above = [parent[leaves]]
        while above[-1].any():
            above.append(parent[above[-1]])
        length = np.searchsorted(trie.levels, leaves, side="right") - 1
        place = np.arange(min(trie.depth, max_title_tokens + 1))
        up = length[:, None] - 1 - place
        trained = (up >= 0) & (place < np.where(length > max_title_tokens + 1, max_title_tokens, length)[:, None])
        of_title = np.full((item.max() + 1, len(place)), -1, np.int32)
        of_title[item[leaves]] = np.where(
            trained, sets[np.stack(above)[np.maximum(up, 0), np.arange(len(leaves))[:, None]]], -1
        )
        return cls(of_title, masks, lists.astype(np.int32))

    def at(self, answers: Int[AnyArray, "R P"], items: Int[AnyArray, "R P"], length: int) -> Int[Array, "R T"]:
        """Return, for each of the first `length` places of a row, the number of the set that the next token is chosen from.

        It is -1 where the next token is no choice.

        Args:
          answers: the places before the first token of each title, in any order.
          items: whose titles they are; 0 for none.
        """
        place = jnp.arange(length)
        order = jnp.argsort(jnp.where(items > 0, answers, length), axis=1)
        answers, items = (jnp.take_along_axis(a, order, axis=1) for a in (answers, items))
        begun = ((answers[..., None] <= place) & (items > 0)[..., None]).sum(1)  # titles of the row that have begun
        latest = jnp.maximum(begun - 1, 0)
        answer, item = (jnp.take_along_axis(a, latest, axis=1) for a in (answers, items))
        into = place - answer
        sets = jnp.asarray(self.of_title)[item, jnp.clip(into, 0, self.of_title.shape[1] - 1)]
        return jnp.where((begun > 0) & (into < self.of_title.shape[1]), sets, -1)

    def columns(self, sets: Int[Array, " R"]) -> Columns:
        """Return the columns of rows by the numbers of their sets; those of rows without one do not matter."""
        return Columns(jnp.maximum(sets, 0), self.masks, self.lists)
