"""The transition baseline: what others went on to from a user's last two items, with nothing trained.

Han et al. (arXiv 2605.07125) rank the items around a user's last ones in the graph of item transitions, and found no better
model on 10 of 14 public datasets. They take items ring by ring, and within a ring by how alike their texts are. Here an item's
score is a sum instead, which ranks better on our real datasets (BUILD_NOTES.md, "A graph of transitions"):

    the probability that it is one or two steps on, from the last item and half as much from the one before;
    the fewer steps were seen from an item, the more the items' shares of all events count;
    and a little for an item whose title and bags (genres, categories) are like those of these two items.
"""

from array import array
from collections.abc import Callable

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float

from user_llm.data.pipeline import HistoryBatch
from user_llm.data.splits import Split, train_counts
from user_llm.data.timelines import WORD, Catalogue, Timelines
from user_llm.evals.evaluator import rank_targets
from user_llm.evals.ranking import Ranks

# Chosen on the validation targets of four datasets together, by hand.
BACKWARDS = 0.5  # A step from one item to another also counts this much as a step from the other to the one.
MISSING = 20.0  # The items' shares of all events count as this many steps from every item.
BEFORE = 0.5  # The item before the last counts this much; the last counts 1.
ALIKE = 0.01  # The cosine of two items' words counts this much; a probability counts 1.
ENTRIES = 2**24  # The most scores that are computed at once: several arrays of them lie beside each other.
SECOND = 100  # How many items, those most often gone to, a second step may lead to: it bounds the work.


def transition_ranks(timelines: Timelines, split: Split, part: str) -> Ranks:
    """Rank the targets of `part` by the steps that training events take from the last two items of each history."""
    rows = min(max(ENTRIES // (timelines.schema.num_items + 1), 1), 256)
    return rank_targets(transition_scorer(timelines, split), timelines, split, part, max_events=1, batch_size=rows)


def transition_scorer(timelines: Timelines, split: Split) -> Callable[[HistoryBatch], Float[np.ndarray, "B V"]]:
    """Return a function from histories to the scores of all items; those of all items of one history come to about 1 or 1.5."""
    counts = train_counts(timelines, split)
    share = (counts / max(counts.sum(), 1)).astype(np.float32)
    steps = transitions(timelines, split)
    steps = steps + BACKWARDS * steps.T
    left = np.asarray(steps.sum(axis=1)).ravel() + MISSING
    chance, missing = sparse.diags_array(1 / left).tocsr() @ steps, (MISSING / left).astype(np.float32)
    second, words = largest(chance, SECOND), item_words(timelines.catalogue)

    def score(users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the scores of all items; popularity where the history is empty, for item 0 was never left."""
        ends = timelines.offsets[users] + positions
        last, before = (np.where(positions >= back, timelines.item[np.maximum(ends - back, 0)], 0) for back in (1, 2))
        weight = np.where(positions >= 2, BEFORE, 0.0).astype(np.float32)[:, None]
        both = lambda of_items: of_items[last] + of_items[before].multiply(weight)  # noqa: E731
        step, named = both(chance).tocsr(), both(words).tocsr()
        likely = (step + step @ second).toarray() + (missing[last, None] + weight * missing[before, None]) * share
        return (likely + ALIKE * (named @ words.T).toarray()).astype(np.float32)

    def in_parts(batch: HistoryBatch) -> np.ndarray:
        parts = range(0, len(batch.users), max(ENTRIES // len(counts), 1))
        rows = [slice(first, first + parts.step) for first in parts]
        return np.concatenate([score(batch.users[part], batch.positions[part]) for part in rows])

    return in_parts


def transitions(timelines: Timelines, split: Split) -> sparse.csr_array:
    """Return [V, V]: how often training events go from one item (row) to the next (column); the items are numbered from 1."""
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


def item_words(catalogue: Catalogue) -> sparse.csr_array:
    """Return [V, W]: a vector of length 1 for each item, of the words of its title and its bags by tf-idf; 0 for no words."""
    number: dict[str, int] = {}
    items, columns = array("i"), array("i")
    for item, title in enumerate(catalogue.titles):
        found = {number.setdefault(word, len(number)) for word in WORD.findall(title.lower())}
        items.extend([item] * len(found))
        columns.extend(found)
    parts, width = [(np.asarray(items, np.int64), np.asarray(columns, np.int64))], len(number)
    for members in catalogue.multi.values():
        of, place = np.nonzero(members)
        parts.append((of, width + members[of, place]))
        width += int(members.max(initial=0)) + 1
    at = np.concatenate(parts, axis=1)
    shape = (len(catalogue.titles), max(width, 1))
    words = sparse.csr_array((np.ones(at.shape[1], np.float32), (at[0], at[1])), shape=shape)
    words.data[:] = 1  # a bag may name a class twice
    rare = np.log((1 + shape[0]) / (1 + np.bincount(words.indices, minlength=shape[1])))
    words = words @ sparse.diags_array(rare.astype(np.float32)).tocsr()
    length = np.sqrt(np.asarray(words.multiply(words).sum(axis=1)).ravel())
    whole = np.where(length > 0, 1 / np.maximum(length, 1e-9), 0.0).astype(np.float32)
    return (sparse.diags_array(whole).tocsr() @ words).tocsr()
