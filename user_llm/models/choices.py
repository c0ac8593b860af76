"""Which tokens a title can go on with: the loss of a title's token is a softmax over these alone (MSL, arXiv 2504.04178).

A softmax over the whole vocabulary also pushes down the tokens that beam search in a trie never looks at. Where one token alone
can follow, it is certain: there is nothing to learn, and the loss leaves the token out.

Axis letters: I items and PAD, T tokens of a row, L tokens of the longest title, R rows, P answer positions of a row, W sets that are
masks, B words of 32 bits of a mask, M bounds of lists, C tokens of all lists together, A titles, K likely items.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from user_llm.common.arrays import AnyArray
from user_llm.models.trie import Trie
from user_llm.nn.columns import LISTED, Columns, packed


class Choices(NamedTuple):
    """The sets of tokens that the titles of a catalogue can go on with: arrays, which a train step takes as arguments.

    Attributes:
      titles: the tokens of each item's title; -1 behind the last, and at PAD.
      of_title: for each item and each place of its title, the number of the set that the token there is chosen from; -1 where only
        one token can follow, and where no token is trained.
      masks, first, listed: the sets, as in `Columns`. Set 0 is the whole vocabulary. It stands in for rows without a set, which are
        not trained.
    """

    titles: Int[AnyArray, "I L"]
    of_title: Int[AnyArray, "I L"]
    masks: UInt32[AnyArray, "W B"]
    first: Int[AnyArray, " M"]
    listed: Int[AnyArray, " C"]

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
        of_list = np.repeat(
            np.isin(np.arange(len(token)), small), children
        )  # of each node but the root: whether its set is a list
        sets = np.full(len(token), -1, np.int32)
        sets[np.concatenate([large, small])] = 1 + np.arange(len(large) + len(small))

        # The nodes from each leaf up to the root: the token at place n leads to the node at depth n + 1, from that at depth n.
        leaves = np.flatnonzero(item)
        path = [leaves]
        while path[-1].any():
            path.append(parent[path[-1]])
        nodes = np.stack(path)
        length = np.searchsorted(trie.levels, leaves, side="right") - 1
        place = np.arange(min(trie.depth, max_title_tokens + 1))
        up = length[:, None] - 1 - place
        at = lambda up: nodes[np.maximum(up, 0), np.arange(len(leaves))[:, None]]  # noqa: E731
        trained = (up >= 0) & (place < np.where(length > max_title_tokens + 1, max_title_tokens, length)[:, None])
        of_title, titles = (np.full((item.max() + 1, len(place)), -1, np.int32) for _ in range(2))
        of_title[item[leaves]] = np.where(trained, sets[at(up + 1)], -1)
        titles[item[leaves]] = np.where(up >= 0, token[at(up)], -1)
        ends = np.concatenate([[0], np.cumsum(children[small])]).astype(np.int32)
        return cls(titles, of_title, packed(masks), ends, token[1:][of_list])

    def at(
        self,
        answers: Int[AnyArray, "R P"],
        items: Int[AnyArray, "R P"],
        length: int,
        freely: Bool[AnyArray, "R P"] | None = None,
    ) -> "Places":
        """Return what the next token is chosen from behind each of the first `length` places of a row.

        Args:
          answers: the places before the first token of each title, in any order.
          items: whose titles they are; 0 for none.
          freely: True for titles whose tokens are predicted over the whole vocabulary (set 0); None for none of them.
        """
        place = jnp.arange(length)
        order = jnp.argsort(jnp.where(items > 0, answers, length), axis=1)
        answers, items = (jnp.take_along_axis(a, order, axis=1) for a in (answers, items))
        begun = ((answers[..., None] <= place) & (items > 0)[..., None]).sum(1)  # titles of the row that have begun
        latest = jnp.maximum(begun - 1, 0)
        answer, item, number = (jnp.take_along_axis(a, latest, axis=1) for a in (answers, items, order))
        into = place - answer
        within = jnp.clip(into, 0, self.of_title.shape[1] - 1)
        sets = jnp.where(into < self.of_title.shape[1], jnp.asarray(self.of_title)[item, within], -1)
        if freely is not None:
            sets = jnp.where(jnp.take_along_axis(freely, number, axis=1), 0, sets)
        return Places(jnp.where(begun > 0, sets, -1), number, within)

    def columns(self, sets: Int[Array, " R"]) -> Columns:
        """Return the columns of rows by the numbers of their sets; those of rows without one do not matter."""
        return Columns(jnp.maximum(sets, 0), self.masks, self.first, self.listed)

    def shares(
        self, items: Int[AnyArray, " A"], likely: Int[AnyArray, "A K"], probs: Float[AnyArray, "A K"]
    ) -> tuple[Int[Array, "A L K"], Float[Array, "A L K"]]:
        """Return the tokens with which likely titles go on from each place of an item's title, and their shares.

        The share of a token is its title's part of the probability of those titles that begin as the item's title does up to there.
        All shares are 0 where no likely title begins so. An item without a title has no share.
        """
        probs = jnp.where(likely < len(self.titles), probs, 0.0)
        own, titles = (jnp.asarray(self.titles)[of] for of in (items[:, None], likely))
        same = jnp.cumprod(jnp.pad(titles == own, ((0, 0), (0, 0), (1, 0)), constant_values=True)[..., :-1], axis=-1)
        below = jnp.swapaxes(same * (titles >= 0) * probs[..., None], 1, 2)
        total = below.sum(-1, keepdims=True)
        return jnp.swapaxes(titles, 1, 2), below / jnp.where(total > 0, total, 1)


class Places(NamedTuple):
    """Where titles stand in rows of text, by the place before each token.

    Attributes:
      sets: the number of the set that the next token is chosen from; -1 where it is no choice.
      answer: the number of the title that the token belongs to, among the row's answer positions.
      into: the place of the token in its title.
    """

    sets: Int[Array, "R T"]
    answer: Int[Array, "R T"]
    into: Int[Array, "R T"]
