"""Which columns of a table each row's softmax is over, where rows differ in it.

Axis letters: R rows, V columns, W masks, N lists, C columns of the longest list.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from user_llm.common.arrays import AnyArray


class Columns(NamedTuple):
    """Which columns the softmax of each row is over: one of several sets, of which the first W are masks and the others are lists.

    Attributes:
      of_row: the number of each row's set.
      masks: the first W sets, at least one; True at their columns.
      lists: the others, as the numbers of at most C columns, -1 behind the last.
    """

    of_row: Int[AnyArray, " R"]
    masks: Bool[AnyArray, "W V"]
    lists: Int[AnyArray, "N C"]

    @classmethod
    def same(cls, valid: Bool[AnyArray, " V"], rows: int) -> "Columns":
        """Return the same columns for every row."""
        return cls(jnp.zeros(rows, jnp.int32), jnp.asarray(valid)[None], jnp.zeros((0, 0), jnp.int32))

    def valid(self, first: int | Array = 0) -> Bool[Array, "R V"] | Bool[Array, "1 V"]:
        """Return a mask over the columns of each row, or one for all rows.

        Args:
          first: the number that the first column of `masks` has in `lists`, where `masks` is one device's part.
        """
        count, width = self.masks.shape
        masks = jnp.asarray(self.masks)
        if not len(self.lists):
            return masks if count == 1 else masks[self.of_row]
        row = jnp.arange(len(self.of_row))
        column = jnp.asarray(self.lists)[jnp.maximum(self.of_row - count, 0)] - first
        column = jnp.where(column < 0, width, column)  # beyond the last column, as those of later devices are
        listed = jnp.zeros((len(row), width), bool).at[row[:, None], column].set(True, mode="drop")
        return jnp.where((self.of_row < count)[:, None], masks[jnp.minimum(self.of_row, count - 1)], listed)
