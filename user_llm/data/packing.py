"""Several prompts in one row of a batch of contextualization, so that few of its tokens are padding.

Prompts of different histories share a row. What a row needs of its histories must lie beside it, on the same device and in the same part
of an accumulated batch, so that a batch is made of *bundles*: some histories, and the rows of text that ask about them. The sizes of a
bundle are settled before training, for compiled programs have fixed shapes: it asks a fixed number of prompts, in as many rows as these
mostly need. Where they need more, the prompts that are left over begin the next bundle.
"""

import dataclasses
import itertools
from typing import Any

import grain
import numpy as np

Batch = dict[str, Any]

SAMPLE = 16  # bundles, by which sizes are settled
# Rows are so many that this share of the sampled bundles fits; with more rows, most of the added tokens would be padding.
COVERED = 0.8


@dataclasses.dataclass(frozen=True)
class Packing:
    """The sizes of a bundle.

    Attributes:
      prompts: a bundle asks at most this many prompts.
      histories: these prompts are about at most this many histories.
      rows, row_length: a bundle has so many rows of text, of so many tokens each.
      segments: a row holds at most this many prompts.
      soft: a soft prompt has so many tokens; 0 for none.
      leading: so many tokens of a prompt stand before its soft prompt.
    """

    prompts: int
    histories: int
    rows: int
    row_length: int
    segments: int
    soft: int = 0
    leading: int = 0


def settle(examples: grain.IterDataset, histories: int, row_length: int, *, soft: int = 0, leading: int = 0) -> Packing:
    """Return sizes of bundles that ask, on average, the prompts of so many histories; measured on the first examples.

    Raises:
      ValueError: no example.
    """
    sample = list(itertools.islice(examples, SAMPLE * histories))
    if not sample:
        raise ValueError("nobody has what it asks for in training: set its weight to 0 to leave the task out.")
    prompts = max(round(histories * float(np.mean([_count(example) for example in sample]))), 1)
    ample = Packing(prompts, prompts, prompts, row_length, row_length, soft, leading)
    needed, bundle = [], _Bundle(ample)
    for example in sample:
        first = 0
        while (first := bundle.add(example, first)) < _count(example):
            needed.append(bundle.used())
            bundle = _Bundle(ample)
    needed.append(bundle.used())
    whole = np.array(needed[:-1] or needed)  # the last asks fewer
    of_histories, of_rows = (int(np.ceil(np.quantile(whole[:, column], COVERED))) for column in (0, 1))
    return dataclasses.replace(ample, histories=of_histories, rows=of_rows, segments=int(whole[:, 2].max()))


class PackedExamples(grain.IterDataset):
    """Bundles of the prompts of examples, each a history with its ends as `pipeline.contextual_examples` makes them.

    Of H histories with J ends, R rows of T tokens, S segments a row, P answers a prompt, a bundle has `events` [H, E] and `lengths` [H]
    (absent without an encoder), `prefix` [H, J], `text`, `segments` and `positions` [R, T] as in `models.user.Packed`, `predicted` [R, T]
    (1 where the text loss asks for the next token), `users` [R, S] (of each segment history * J + end), `answers` [H, J, P] (places among the R T tokens, 0 = none), `items` [H, J, P] if the task ranks, and `text_weight`.

    All prompts are asked, in the order of the examples; one that finds no room begins the next bundle, for which its history is encoded again.
    """

    def __init__(self, parent: grain.IterDataset, packing: Packing):
        super().__init__(parent)
        self._packing = packing

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), self._packing)


class _PackedIterator(grain.DatasetIterator):
    """Its state is where the example that comes next is, and how many of its prompts are asked already."""

    def __init__(self, parent: grain.DatasetIterator, packing: Packing):
        super().__init__(parent)
        self._packing, self._asked = packing, 0
        self._example: Batch | None = None
        self._before = parent.get_state()

    def __next__(self) -> Batch:
        bundle = _Bundle(self._packing)
        while True:
            if self._example is None:
                self._before = self._parent.get_state()
                self._example = next(self._parent)
            self._asked = bundle.add(self._example, self._asked)
            if self._asked < _count(self._example):
                return bundle.arrays
            self._example, self._asked = None, 0

    def get_state(self) -> dict[str, Any]:
        return {"example": self._before if self._example is not None else self._parent.get_state(), "asked": self._asked}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["example"])
        self._before, self._example, self._asked = state["example"], None, state["asked"]


class _Bundle:
    """A bundle that is being filled."""

    def __init__(self, packing: Packing):
        self.packing = packing
        self.arrays: Batch = {}
        self._asked = self._histories = 0
        self._free = np.full(packing.rows, packing.row_length)
        self._segments = np.zeros(packing.rows, int)

    def used(self) -> tuple[int, int, int]:
        """Return the numbers of histories, of rows and of segments in the fullest row."""
        return self._histories, int((self._segments > 0).sum()), int(self._segments.max())

    def add(self, example: Batch, first: int) -> int:
        """Put in an example's prompts, from number `first` on while they find room; return the number of the next.

        Raises:
          ValueError: a prompt that is longer than a row.
        """
        if self._histories == self.packing.histories:
            return first
        history, number = self._histories, first
        for number in range(first, _count(example)):
            length = int(example["text_lengths"][number]) + self.packing.soft
            if length > self.packing.row_length:
                raise ValueError(f"A prompt of {length} tokens does not fit a row of {self.packing.row_length}.")
            fits = (self._free >= length) & (self._segments < self.packing.segments)
            if self._asked == self.packing.prompts or not fits.any():
                break
            if number == first:
                self._begin(example, history)
            # The fullest row: what is left of the others may yet hold a longer prompt.
            self._put(example, history, number, int(np.where(fits, self._free, self.packing.row_length + 1).argmin()), length)
        else:
            number += 1
        return number

    def _begin(self, example: Batch, history: int) -> None:
        """Take up a history."""
        p = self.packing
        if not self.arrays:
            of_histories = [name for name in HISTORY if name in example]
            self.arrays = {name: np.zeros((p.histories, *example[name].shape), example[name].dtype) for name in of_histories}
            self.arrays |= {name: np.zeros((p.rows, p.row_length), np.int32) for name in TEXT}
            self.arrays |= {"users": np.zeros((p.rows, p.segments), np.int32), "text_weight": example["text_weight"]}
            if "events" in self.arrays:
                self.arrays["events"] -= 1  # no event
        for name in ("events", "lengths"):
            if name in self.arrays:
                self.arrays[name][history] = example[name]
        self._histories += 1

    def _put(self, example: Batch, history: int, number: int, row: int, length: int) -> None:
        """Put a prompt behind those of a row."""
        p, a = self.packing, self.arrays
        start = p.row_length - self._free[row]
        position = np.arange(length)
        written = np.r_[: p.leading, p.leading + p.soft : length]  # where its own tokens are
        self._free[row] -= length
        self._segments[row] += 1
        self._asked += 1
        here = row, slice(start, start + length)
        a["text"][row, start + written] = example["text"][number, : len(written)]
        a["segments"][here], a["positions"][here] = self._segments[row], position
        a["users"][row, self._segments[row] - 1] = history * len(example["prefix"]) + number
        a["prefix"][history, number] = example["prefix"][number]
        answers = example["answers"][number]
        moved = np.where(answers > 0, written[answers], 0)
        a["predicted"][here] = (moved[0] > 0) & (position >= moved[0]) & (position + 1 < length)
        a["answers"][history, number] = np.where(answers > 0, row * p.row_length + start + moved, 0)
        if "items" in a:
            a["items"][history, number] = example["items"][number]


HISTORY = ("events", "lengths", "prefix", "answers", "items")
TEXT = ("text", "segments", "positions", "predicted")


def _count(example: Batch) -> int:
    """Return the number of an example's prompts."""
    return int((example["text_lengths"] > 0).sum())
