"""Rotary positions (Su et al. 2021): queries and keys are turned by angles that grow with their positions.

Axis letters as in `nn/attention.py`; `half` is half of the numbers of a head that positions turn.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from user_llm.common.arrays import AnyArray

SCALINGS = ("linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched to reach beyond the length that a model was first trained on.

    Attributes:
      kind: which frequencies `factor` divides. `linear` divides all of them. `llama3` and `yarn` divide those of slow turns, leave
        those of fast turns, and blend between: `llama3` by how often a frequency turns within `original_length` positions, with
        `low_freq_factor` and `high_freq_factor` turns at the ends; `yarn` by the frequency's number, with the numbers at the ends
        that would turn `slow_turns` and `fast_turns` times (Peng et al. 2023). `longrope` divides each frequency by one of
        `factors` (Ding et al. 2024).
      whole_numbers: whether the ends of `yarn` are rounded outwards to whole numbers of frequencies.
      factors: what `longrope` divides each frequency by. A checkpoint has two such lists; these are the ones for texts of at most
        `original_length` positions.
      magnitude: what rotated queries and keys are multiplied by.
      query_growth: queries at position p are multiplied by 1 + query_growth * log(1 + floor(p / original_length)) (Llama 4,
        Ministral 3), which is 1 for the first `original_length` positions.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    slow_turns: float = 1.0
    fast_turns: float = 32.0
    whole_numbers: bool = True
    factors: tuple[float, ...] = ()
    magnitude: float = 1.0
    query_growth: float = 0.0

    def __post_init__(self):
        if self.kind not in SCALINGS:
            raise ValueError(f"Unknown scaling {self.kind!r} of rotary positions: choose one of {', '.join(SCALINGS)}.")

    @property
    def longest(self) -> int | None:
        """The most positions of a text that the scaling is made for; None for no limit. The caller must not pass longer texts."""
        return self.original_length if self.kind == "longrope" else None


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, " half"]:
    """Return the angular frequencies theta^(-2i/dim) of rotary embeddings (Su et al. 2021) of `dim` numbers, scaled."""
    frequencies = theta ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / jnp.array(scaling.factors)
    if scaling.kind == "yarn":
        kept = 1 - _yarn_ramp(dim, theta, scaling)
    else:
        turns = scaling.original_length * frequencies / (2 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_ramp(dim: int, theta: float, scaling: RopeScaling) -> Float[Array, " half"]:
    """Return 0 for frequencies that are left, 1 for those that are divided, and between the ends what lies between."""
    number = lambda turns: dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
    first, last = number(scaling.fast_turns), number(scaling.slow_turns)
    if scaling.whole_numbers:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return jnp.clip((jnp.arange(dim // 2) - first) / max(last - first, 0.001), 0.0, 1.0)


class Rotation(NamedTuple):
    """Cosine and sine of position * frequency, by which rotary embeddings turn queries and keys.

    Attributes:
      growth: queries are multiplied by it besides; None for 1.
    """

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]
    growth: Float[Array, "B T 1 1"] | None = None

    def still(self) -> "Rotation":
        """Return the rotation that turns nothing."""
        return self._replace(cos=jnp.ones_like(self.cos), sin=jnp.zeros_like(self.sin))


def rotation(
    positions: Int[AnyArray, "B T"], frequencies: Float[Array, " half"], scaling: RopeScaling | None = None
) -> Rotation:
    """Return the rotation of each position; all layers share it. Frequencies are scaled already."""
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin, growth = jnp.cos(angle), jnp.sin(angle), None
    if scaling is not None and scaling.magnitude != 1.0:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    if scaling is not None and scaling.query_growth:
        growth = 1 + scaling.query_growth * jnp.log1p(jnp.floor(positions[..., None, None] / scaling.original_length))
    return Rotation(cos, sin, growth)


def apply_rope(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + half) of each head: the pairing of Hugging Face checkpoints. Numbers beyond 2 half stay as they are."""
    half = by.cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin, rest], axis=-1)
    return rotated.astype(x.dtype)
