"""Which columns of a table each row's softmax is over, where rows differ in it, and which distribution over columns it is trained towards.

Axis letters: R rows, V columns, W masks, B words of 32 bits of a mask, M ends of lists (one more than there are lists), C columns of all
lists together, K columns of a target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from user_llm.common.arrays import AnyArray

LISTED = 64  # the most columns of a set that is a list; a larger one is a mask over all columns
BITS = np.arange(32, dtype=np.uint32)


class Columns(NamedTuple):
    """Which columns the softmax of each row is over: one of several sets, of which the first W are masks and the others are lists.

    Attributes:
      of_row: the number of each row's set.
      masks: the first W sets, at least one; a mask has a bit for each column (`packed`).
      first, listed: the others. List n holds the columns listed[first[n]] to listed[first[n + 1] - 1], at most LISTED.
    """

    of_row: Int[AnyArray, " R"]
    masks: UInt32[AnyArray, "W B"]
    first: Int[AnyArray, " M"]
    listed: Int[AnyArray, " C"]

    @classmethod
    def same(cls, valid: Bool[AnyArray, " V"], rows: int) -> "Columns":
        """Return the same columns for every row."""
        none = np.zeros(0, np.int32)
        return cls(jnp.zeros(rows, jnp.int32), packed(jnp.asarray(valid)[None]), np.zeros(1, np.int32), none)

    def valid(self, width: int, first: int | Array = 0) -> Bool[Array, "R V"] | Bool[Array, "1 V"]:
        """Return a mask over `width` columns from column `first` on, for each row, or one for all rows."""
        count, lists = len(self.masks), len(self.first) - 1
        masks = jnp.asarray(self.masks)
        if not lists:
            return unpacked(masks if count == 1 else masks[self.of_row], width, first)
        row, place = jnp.arange(len(self.of_row)), jnp.arange(LISTED)
        number, bounds = jnp.maximum(self.of_row - count, 0), jnp.asarray(self.first)
        place = bounds[number][:, None] + place
        column = jnp.take(jnp.asarray(self.listed), place, mode="clip") - first
        # Beyond the last column, as those of other devices are, which have other parts of the columns.
        column = jnp.where((place < bounds[number + 1][:, None]) & (column >= 0), column, width)
        listed = jnp.zeros((len(row), width), bool).at[row[:, None], column].set(True, mode="drop")
        masked = unpacked(masks[jnp.minimum(self.of_row, count - 1)], width, first)
        return jnp.where((self.of_row < count)[:, None], masked, listed)


class Targets(NamedTuple):
    """The distribution that each row's softmax is trained towards: shares of K columns, of which some may be the same.

    Attributes:
      columns: of each row.
      shares: of these columns, which sum to 1 in each row.
    """

    columns: Int[AnyArray, "R K"]
    shares: Float[AnyArray, "R K"]

    @classmethod
    def single(cls, columns: Int[AnyArray, " R"]) -> "Targets":
        """Return targets that are one column each."""
        return cls(jnp.asarray(columns)[:, None], jnp.ones((len(columns), 1), jnp.float32))

    def over(self, width: int, first: int | Array = 0) -> Float[Array, "R V"]:
        """Return the share of each of `width` columns from column `first` on, for each row."""
        column = self.columns - first
        if column.shape[1] == 1:
            return jnp.where(jnp.arange(width) == column, self.shares, 0.0)
        column = jnp.where(column >= 0, column, width)  # of another device, as those beyond the last column are
        shares = jnp.zeros((len(column), width), self.shares.dtype)
        return shares.at[jnp.arange(len(column))[:, None], column].add(self.shares, mode="drop")


def packed(masks: Bool[AnyArray, "W V"]) -> UInt32[AnyArray, "W B"]:
    """Return masks with 32 columns in a word, the lowest bit first; bits behind the last column are 0."""
    xp = jnp if isinstance(masks, jax.Array) else np
    words = xp.pad(masks, ((0, 0), (0, -masks.shape[1] % 32))).reshape(len(masks), -1, 32)
    return (words.astype(np.uint32) << BITS).sum(-1, dtype=np.uint32)


def unpacked(masks: UInt32[Array, "W B"], width: int, first: int | Array = 0) -> Bool[Array, "W V"]:
    """Return `width` columns of packed masks from column `first` on."""
    bits = (masks[..., None] >> BITS & 1).astype(bool).reshape(len(masks), -1)
    return jax.lax.dynamic_slice_in_dim(bits, first, width, axis=1)
