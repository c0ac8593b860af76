"""Where an item lies among the items that a model knows, by what it is: its categories and the words of its title.

A ridge regression, fitted after training from the contents of the items that training has seen to their rows of the item table, places
an item that training has never seen ("learned linear projection into the id space", arXiv 2508.18442). It trains nothing, so that it
serves any model, and what the model knows of other items stays as it is.

Axis letters: I items that were there in training, PAD included, n further items, F columns of contents, C those that the regression uses, D width of an item's vector.
"""

import dataclasses
import zlib

import numpy as np
import scipy.linalg
import scipy.sparse as sparse
from jaxtyping import Float, Int

from user_llm.data.timelines import WORD, Catalogue

WORDS = 1 << 20  # each word of a title is hashed to one of so many columns
COLUMNS = 2048  # the regression uses at most so many: those that most items have. The time of a fit grows with their cube.
RIDGE = 10.0  # the strength of the pull of the weights to 0, as a number of items
FEW = 10.0  # an item with so many training events has half the weight of an item with very many
# The length of placed rows on average, in lengths of trained ones. Longer ones are recommended more often, in the place of items that
# training knows. launch/benchmark_items.py measures both sides. Where events name the item, the encoder reads its row longer
# (`READ_SCALE` in models/user_encoder.py).
LENGTH = 0.6


def contents(catalogue: Catalogue, first: int = 0, stop: int | None = None) -> sparse.csr_array:
    """Return what the items [first, stop) are: a matrix [I, F] with a 1 for each category and each word of the title.

    Column 0 is 1 for every item.
    """
    titles = catalogue.titles[first:stop]
    count = len(titles)
    rows, columns = [np.arange(count)], [np.zeros(count, np.int64)]
    width = 1
    for name, bag in sorted(catalogue.multi.items()):
        row, place = np.nonzero(bag[first:stop])
        rows.append(row)
        columns.append(width + bag[first:][row, place].astype(np.int64))
        width += len(catalogue.vocab[name])
    words = [{width + zlib.crc32(word.encode()) % WORDS for word in WORD.findall(title.lower())} for title in titles]
    rows.append(np.repeat(np.arange(count), [len(found) for found in words]))
    columns.append(np.fromiter((column for found in words for column in sorted(found)), np.int64))
    where = np.concatenate(rows), np.concatenate(columns)
    found = sparse.csr_array((np.ones(len(where[0]), np.float32), where), shape=(count, width + WORDS))
    found.sum_duplicates()
    found.data[:] = 1
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Content:
    """A fitted regression from contents to item vectors.

    Attributes:
      columns: the columns of the contents that are used.
      weights: the vector of each of them.
    """

    columns: Int[np.ndarray, " C"]
    weights: Float[np.ndarray, "C D"]

    @classmethod
    def fit(
        cls,
        catalogue: Catalogue,
        table: Float[np.ndarray, "I D"],
        counts: Int[np.ndarray, " I"],
    ) -> "Content":
        """Fit the regression to the items that have training events.

        Args:
          catalogue: the items of the training; others may stand behind them and are not read.
          table: the vector of each item of the training.
          counts: the number of training events of each item. An item with more events has more weight in the fit.

        Raises:
          ValueError: no item has training events.
        """
        known = np.flatnonzero(counts[: len(table)] > 0)
        if not len(known):
            raise ValueError("No item of the model has events in training, so that nothing says where a further item lies.")
        content, table = contents(catalogue, 0, len(table))[known], np.asarray(table, np.float64)[known]
        often = np.asarray(content.sum(axis=0)).reshape(-1)
        columns = np.sort(np.argsort(-often, kind="stable")[:COLUMNS])
        columns = columns[often[columns] > 0]
        used = content[:, columns].astype(np.float64)
        share = counts[known] / (counts[known] + FEW)
        share /= share.mean()
        weighted = used.multiply(share[:, None]).tocsr()
        gram = (used.T @ weighted).toarray()
        penalty = np.where(columns == 0, 1e-6, RIDGE)
        weights = scipy.linalg.solve(gram + np.diag(penalty), weighted.T @ table, assume_a="pos")
        # Predicted vectors are shorter than trained ones. All are multiplied by one number, so that their mean length is LENGTH times
        # that of trained vectors.
        long, short = (share @ np.linalg.norm(vectors, axis=1) for vectors in (table, used @ weights))
        return cls(columns, LENGTH * long / max(short, 1e-12) * weights)

    def place(self, catalogue: Catalogue, first: int) -> Float[np.ndarray, "n D"]:
        """Return the vectors of the items from number `first` on."""
        return (contents(catalogue, first)[:, self.columns] @ self.weights).astype(np.float32)
