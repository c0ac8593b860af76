"""Batches put together from streams, each process reading its own (grain).

A batch has the same part from every stream. How many streams there are is settled once, and each process reads some of them, so that
the batches do not depend on how many processes there are, and a run may go on with more or fewer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Streams:
    """Endless batches: rows of each of `parts`, streams by number, one after the other."""

    parts: Mapping[int, grain.IterDataset]

    def __iter__(self) -> "StreamsIterator":
        return StreamsIterator({number: iter(part) for number, part in sorted(self.parts.items())})


class StreamsIterator:
    """Yields batches; its state is JSON by the number of the stream, and holds for whoever reads that stream next."""

    def __init__(self, parts: dict[int, grain.DatasetIterator]):
        self._parts = parts

    def __iter__(self) -> "StreamsIterator":
        return self

    def __next__(self) -> dict[str, Any]:
        rows = [next(part) for part in self._parts.values()]
        return rows[0] if len(rows) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)

    def get_state(self) -> dict[str, Any]:
        """Return where each stream is."""
        return {str(number): part.get_state() for number, part in self._parts.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where the streams were, among them those of this iterator.

        Raises:
          ValueError: a state of other streams.
        """
        if missing := [number for number in self._parts if str(number) not in state]:
            raise ValueError(
                f"The checkpoint holds {len(state)} streams of data and not number {missing[0]}: set data.streams to {len(state)}."
            )
        for number, part in self._parts.items():
            part.set_state(state[str(number)])
