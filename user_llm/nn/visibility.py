"""Who sees whom: drawn, an array that is True where a query may see a key, or described, where rows attend to themselves.

A drawing takes T S values for each row. A description takes what `nn/kernels.py` needs to skip what nobody sees, and is drawn
where no kernel serves. What no description says (beams side by side, steps of decoding, latents, user tokens) is drawn from the start.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from user_llm.common.arrays import AnyArray


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("segments", "windowed"), meta_fields=("causal", "window")
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class SelfMask:
    """How the positions of rows see each other; keys are the queries' own row.

    Attributes:
      segments: positions see those of their own number alone, which stand side by side; 0 is padding, which neither is seen nor
        sees. None where all of a row is one segment.
      windowed: whether the window holds, where a scan over layers says so as it runs; None for always.
      causal: whether a position sees itself and what came before alone; else what comes after too.
      window: how many positions back a position sees, its own included; None for all.
    """

    segments: Int[Array, "B T"] | None = None
    windowed: Bool[Array, ""] | None = None
    causal: bool = True
    window: int | None = None

    def drawn(self, length: int) -> Bool[Array, "#B T T"]:
        """Return the mask of rows of `length` positions as an array."""
        mask = jnp.ones((1, length, length), bool)
        if self.causal:
            mask = jnp.tril(mask)
        if self.window is not None:
            at = jnp.arange(length)
            near = at[:, None] - at < self.window
            mask &= near if self.windowed is None else near | ~self.windowed
        if self.segments is not None:
            same = self.segments[:, :, None] == self.segments[:, None, :]
            mask &= same & (self.segments > 0)[:, :, None]
        return mask


def causal_mask(valid: Bool[AnyArray, "B T"]) -> SelfMask:
    """Let each real position see itself and the real ones before it; padding neither is seen nor sees.

    For valid = 1 1 1 0:    1 . . .
                            1 1 . .
                            1 1 1 .
                            . . . .
    """
    return segment_mask(valid.astype(np.int32))


def segment_mask(segments: Int[AnyArray, "B T"], *, causal: bool = True) -> SelfMask:
    """Causal, or both ways, within a segment of a packed row; segment 0 is padding and is neither seen nor sees.

    For segments = 1 1 2 2 0:   1 . . . .   not causal:   1 1 . . .
                                1 1 . . .                 1 1 . . .
                                . . 1 . .                 . . 1 1 .
                                . . 1 1 .                 . . 1 1 .
                                . . . . .                 . . . . .
    """
    return SelfMask(jnp.asarray(segments), causal=causal)


def cache_mask(positions: Int[AnyArray, "B T"], slots: int) -> Bool[Array, "B T S"]:
    """Let the query at position p see cache slots 0..p, where slot s of the cache holds position s of its row."""
    return jnp.arange(slots) <= positions[..., None]
