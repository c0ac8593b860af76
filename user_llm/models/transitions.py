"""Transitions: what others went on to from a user's last two items. They are counted in training events, and nothing is trained.

Han et al. (arXiv 2605.07125) rank the items around a user's last ones in the graph of item transitions, and found no better
model on 10 of 14 public datasets. They take items ring by ring, and within a ring by how alike their texts are. Here an item's
score is a sum instead, which ranks better on our real datasets (BUILD_NOTES.md, "A graph of transitions"):

    the probability that it is one or two steps on, from the last item and half as much from the one before;
    the fewer steps were seen from an item, the more the items' shares of all events count;
    and a little for an item whose title and bags (genres, categories) are like those of these two items.

A model and the transitions rank better together than either alone: `Transitions.sums` adds the weighted logarithm of these scores to
those of the model. Evaluation and a model in use both go this way.

Axis letters: B users, I items that were there in training and V items of the catalogue, PAD (number 0) included in both; W different
words, R scores of a row, which are those of the V items and of rows of the item table that hold no item yet.
"""

import dataclasses
from array import array
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float, Int

from user_llm.data.splits import Split, train_counts
from user_llm.data.timelines import WORD, Catalogue, Timelines

LAST = 2  # How many of a user's last items count.
# Chosen on the validation targets of four datasets together, by hand.
BACKWARDS = 0.5  # A step from one item to another also counts this much as a step from the other to the one.
MISSING = 20.0  # The items' shares of all events count as this many steps from every item.
BEFORE = 0.5  # The item before the last counts this much; the last counts 1.
ALIKE = 0.01  # The cosine of two items' words counts this much; a probability counts 1.
NEIGHBOURS = 100  # So many steps from each item are kept, the likeliest ones: it bounds the memory and the work.
LEAST = 1e-7  # A lower score counts as this beside a model: a score may be rounded to 0, which has no logarithm.
ENTRIES = 2**24  # The most scores that are computed at once: several arrays of them lie beside each other.


@dataclasses.dataclass(frozen=True, eq=False)
class Transitions:
    """The graph of item transitions.

    Attributes:
      chance: [I, I]: the probability of a step from an item (row) to another one (column). Of each row the NEIGHBOURS likeliest steps are
        there; what the row lacks to 1 goes to all items by their shares.
      missing: [I]: what each row lacks to 1.
      share: [V]: each item's share of all training events. An item without any has the least share that another item has: without it
        the item would lie below all others in every ranking, however much the model likes it. Items from number I on were added after
        the training: no step leads to them, and they have this least share too.
      words: [V, W]: the words of each item; see `item_words`.
      having: [W, V]: the same the other way, the items that have a word.
      weight: how much the logarithm of the scores counts beside the scores of the model that has these transitions.
    """

    chance: sparse.csr_array
    missing: Float[np.ndarray, " I"]
    share: Float[np.ndarray, " V"]
    words: sparse.csr_array
    having: sparse.csr_array
    weight: float = 0.0

    @classmethod
    def of(
        cls, chance: sparse.csr_array, share: Float[np.ndarray, " I"], catalogue: Catalogue, weight: float = 0.0
    ) -> "Transitions":
        """Return the transitions of these steps and shares. All that scoring needs is computed here, so that no request waits for it.

        Args:
          catalogue: the V items.
        """
        whole = np.pad(share, (0, len(catalogue.keys) - len(share)))
        whole = np.where(whole > 0, whole, np.min(share, where=share > 0, initial=1))
        missing = (1 - np.asarray(chance.sum(axis=1)).ravel()).astype(np.float32)
        words = item_words(catalogue, len(share))
        return cls(chance, missing, whole, words, words.T.tocsr(), weight)

    @classmethod
    def counted(cls, timelines: Timelines, split: Split) -> "Transitions":
        """Return the transitions of the training events."""
        steps = count_steps(timelines, split)
        steps = (steps + BACKWARDS * steps.T).tocsr()
        left = np.asarray(steps.sum(axis=1)).ravel() + MISSING
        chance = largest((sparse.diags_array(1 / left).tocsr() @ steps).astype(np.float32), NEIGHBOURS)
        return cls.of(chance, shares(train_counts(timelines, split)), timelines.catalogue)

    def scores(self, last: Int[np.ndarray, "B 2"]) -> Float[np.ndarray, "B V"]:
        """Return the scores of all items; those of all items of one user come to about 1 or 1.5.

        Args:
          last: each user's last item and the one before, 0 where there is none. Without both, items are scored by popularity.
        """
        rows = max(ENTRIES // len(self.share), 1)
        return np.concatenate([self._scores(last[first : first + rows]) for first in range(0, len(last), rows)])

    def _scores(self, last: Int[np.ndarray, "B 2"]) -> Float[np.ndarray, "B V"]:
        weight = np.where(last[:, 1:] > 0, np.float32(BEFORE), np.float32(0))
        both = lambda of_items, items: of_items[items[:, 0]] + of_items[items[:, 1]].multiply(weight).tocsr()  # noqa: E731
        trained = np.where(last < len(self.missing), last, 0)  # no step leaves PAD, nor an item that was added
        step, missing = both(self.chance, trained), self.missing[trained]
        out = ALIKE * (both(self.words, last) @ self.having).toarray()
        out[:, : len(self.missing)] += (step + step @ self.chance).toarray()
        out += (missing[:, :1] + weight * missing[:, 1:]) * self.share
        return out.astype(np.float32)

    def sums(
        self, scores: Float[np.ndarray, "B R"], last: Int[np.ndarray, "B 2"], weights: Sequence[float]
    ) -> list[Float[np.ndarray, "B R"]]:
        """Return a model's scores plus each weight times the logarithm of the transitions' scores.

        Args:
          scores: of the model. Those of rows that hold no item stay as they are.
          last: as in `scores`.
        """
        scores = scores.astype(np.float32)
        prior = np.zeros_like(scores)
        prior[:, : len(self.share)] = np.log(np.maximum(self.scores(last), LEAST))
        return [scores + np.float32(weight) * prior for weight in weights]

    def weighted(self, weight: float) -> "Transitions":
        """Return the same transitions with another weight."""
        return dataclasses.replace(self, weight=weight)

    def extended(self, catalogue: Catalogue) -> "Transitions":
        """Return the same transitions with a catalogue that has further items behind its own.

        The further items are scored by the least share and their words.
        """
        return self.of(self.chance, self.share[: len(self.missing)], catalogue, self.weight)


def last_items(timelines: Timelines, users: Int[np.ndarray, " B"], ends: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B 2"]:
    """Return the item before each user's event number `end`, and the one before that; 0 where there is none."""
    back = np.arange(1, LAST + 1)
    events = (timelines.offsets[users] + ends)[:, None] - back
    return np.where(ends[:, None] >= back, timelines.item[np.maximum(events, 0)], 0).astype(np.int32)


def shares(counts: Int[np.ndarray, " I"]) -> Float[np.ndarray, " I"]:
    """Return each item's share of all events."""
    return (counts / max(counts.sum(), 1)).astype(np.float32)


def count_steps(timelines: Timelines, split: Split) -> sparse.csr_array:
    """Return [I, I]: how often training events go from one item (row) to the next (column)."""
    size = timelines.schema.num_items + 1
    steps = [np.zeros((2, 0), np.int32)]
    for chunk in timelines.chunks():
        item = np.asarray(timelines.item[chunk.events])
        trained = chunk.positions < split.train_stop[chunk.users]
        goes = trained[1:] & (chunk.users[1:] == chunk.users[:-1])
        steps.append(np.stack([item[:-1][goes], item[1:][goes]]).astype(np.int32))
    source, target = np.concatenate(steps, axis=1)
    return sparse.csr_array((np.ones(len(source), np.float32), (source, target)), shape=(size, size))  # adds what occurs again


def largest(matrix: sparse.csr_array, count: int) -> sparse.csr_array:
    """Return the same matrix with the `count` largest entries of each row alone."""
    kept = np.ones(matrix.nnz, bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > count):
        entries = slice(*matrix.indptr[row : row + 2])
        kept[entries][np.argsort(-matrix.data[entries], kind="stable")[count:]] = False
    data = np.where(kept, matrix.data, 0).astype(matrix.dtype)
    found = sparse.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape, copy=True)
    found.eliminate_zeros()
    return found


def item_words(catalogue: Catalogue, trained: int) -> sparse.csr_array:
    """Return [V, W]: a vector of length 1 for each item, of the words of its title and its bags by tf-idf; 0 for no words.

    Args:
      trained: the number I. How rare a word is, is counted among these items, so that further items change no vector of theirs.
    """
    number: dict[str, int] = {}
    items, columns = array("i"), array("i")
    for item, title in enumerate(catalogue.titles):
        found = dict.fromkeys(number.setdefault(word, len(number)) for word in WORD.findall(title.lower()))
        items.extend([item] * len(found))
        columns.extend(found)
    parts, width = [(np.asarray(items, np.int64), np.asarray(columns, np.int64))], len(number)
    for _, members in sorted(catalogue.multi.items()):
        of, place = np.nonzero(members)
        parts.append((of, width + members[of, place]))
        width += int(members.max(initial=0)) + 1
    at = np.concatenate(parts, axis=1)
    shape = (len(catalogue.titles), max(width, 1))
    words = sparse.csr_array((np.ones(at.shape[1], np.float32), (at[0], at[1])), shape=shape)
    words.data[:] = 1  # a bag may name a class twice
    seen = np.bincount(words.indices[: words.indptr[trained]], minlength=shape[1])
    words = words @ sparse.diags_array(np.log((1 + trained) / (1 + seen)).astype(np.float32)).tocsr()
    length = np.sqrt(np.asarray(words.multiply(words).sum(axis=1)).ravel())
    whole = np.where(length > 0, 1 / np.maximum(length, 1e-9), 0.0).astype(np.float32)
    return (sparse.diags_array(whole).tocsr() @ words).tocsr()
