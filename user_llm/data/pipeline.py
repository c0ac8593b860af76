"""From timelines to batches: windows cut on the fly, shuffled by seed, shared out over streams, packed, resumable (grain).

A window is a stretch of one user's usable events, cut when it is asked for; nothing is expanded on disk. Long histories are cut
by a grid that moves at random from epoch to epoch, so that over time every event is seen with every amount of context.

Each stream reads every n-th window; `data/streams.py` puts batches together from them.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from user_llm.data.prompts.base import Examples, TextRow, pad_rows
from user_llm.data.timelines import Timelines

Batch = dict[str, Any]


# Rows filled side by side, in batches: the more, the fuller each gets, and the later the first. Short windows need but one.
MAX_PACKING_BATCHES = 8
BUCKET = 50  # events; histories to evaluate are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class Window:
    """Events [start, stop) of a user as input; each has a next event, the last one's is at `stop`."""

    user: int
    start: int
    stop: int
    epoch: int
    slot: int


class Windows(grain.MapDataset):
    """All windows of at most `length` inputs over the usable events of every user.

    Element i of epoch e is slot i; a user of n usable events has n - 1 inputs, thus one slot, or where that is more than
    `length`, one slot per cell of a grid shifted by a random amount that depends on seed, epoch and user. A cell that the
    shift leaves empty is None, which grain drops.
    """

    def __init__(self, stops: Int[np.ndarray, " U"], length: int, seed: int):
        super().__init__()
        inputs = np.maximum(stops - 1, 0)
        slots = np.where(inputs <= length, np.minimum(inputs, 1), -(-inputs // length) + 1)
        self._starts = np.concatenate([[0], np.cumsum(slots)])  # user u has slots [starts[u], starts[u + 1])
        self._inputs, self._length, self._seed = inputs, length, seed

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, slot = divmod(int(index), len(self))
        user = int(self._starts.searchsorted(slot, "right")) - 1
        cell = slot - int(self._starts[user])
        inputs, length = int(self._inputs[user]), self._length
        if inputs <= length:
            return Window(user, 0, inputs, epoch, slot)
        shift = int(np.random.default_rng((self._seed, epoch, user)).integers(length))
        start, stop = max(cell * length - shift, 0), min((cell + 1) * length - shift, inputs)
        return Window(user, start, stop, epoch, slot) if start < stop else None

    @property
    def total_inputs(self) -> int:
        """Number of (event, next event) pairs in one epoch."""
        return int(self._inputs.sum())


def packed_windows(
    timelines: Timelines,
    stops: Int[np.ndarray, " U"],
    *,
    window: int,
    rows: int,
    row_length: int,
    seed: int,
    stream: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Return endless batches for encoder pretraining, several windows packed into each row.

    Each batch has `events` and `next` int32 [rows, row_length, A], `segments` and `positions` int32 [rows, row_length];
    segment 0 is padding. `stream` = (index, count): which of how many shares of the windows.
    """
    if row_length < window:
        raise ValueError(f"Rows of {row_length} events cannot hold windows of {window}: raise row_length to at least that.")

    def cut(w: Window) -> Batch:
        first = int(timelines.offsets[w.user])
        return {"events": np.arange(first + w.start, first + w.stop)}

    def features(batch: Batch) -> Batch:  # of a whole batch at once, which costs less than of each window
        real = batch["segments"] > 0
        events = {"events": np.where(real, batch["events"], -1), "next": np.where(real, batch["events"] + 1, -1)}
        return batch | {name: timelines.features(numbers) for name, numbers in events.items()}

    windows = _stream(Windows(stops, window, seed), seed, stream).map(cut)
    typical = float(np.minimum(stops - 1, window).mean())
    return _pack(windows, ("events",), rows, row_length, typical, seed).map(features)


def packed_text(
    lines: Sequence[Int[np.ndarray, " T"]],
    *,
    rows: int,
    row_length: int,
    seed: int,
    stream: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Return endless batches for language modelling, several tokenised lines packed into each row.

    Each batch has `tokens`, `next`, `segments` and `positions`, all int32 [rows, row_length].
    """

    def cut(line: Int[np.ndarray, " T"]) -> Batch:
        line = line[: row_length + 1]
        return {"tokens": line[:-1], "next": line[1:]}

    typical = float(np.mean([len(line) for line in lines]))
    return _pack(
        _stream(grain.MapDataset.source(lines), seed, stream).map(cut), ("tokens", "next"), rows, row_length, typical, seed
    )


def _pack(
    dataset: grain.IterDataset, names: tuple[str, ...], rows: int, row_length: int, typical: float, seed: int
) -> grain.IterDataset:
    """Pack elements, arrays of these names of some `typical` length, several to a row.

    Adds int32 `segments` (0 = padding) and `positions` within the segment, of the first name.
    """
    first = names[0]

    def tidy(batch: Batch) -> Batch:
        added = {"segments": batch[f"{first}_segment_ids"], "positions": batch[f"{first}_positions"]}
        return {name: batch[name] for name in names} | {name: array.astype(np.int32) for name, array in added.items()}

    batches = int(np.clip(np.ceil(16 * typical / row_length), 1, MAX_PACKING_BATCHES))
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset, length_struct=dict.fromkeys(names, row_length), num_packing_bins=batches * rows, seed=seed
    )
    return packed.batch(rows, drop_remainder=True).map(tidy)


def _stream(dataset: grain.MapDataset, seed: int, stream: tuple[int, int], epochs: int | None = None) -> grain.IterDataset:
    """Shuffle anew each epoch, repeat for so many epochs or without end, and keep the stream's share."""
    index, count = stream
    dataset = dataset.shuffle(seed).repeat(epochs)
    return dataset[index::count].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))


@dataclasses.dataclass(frozen=True)
class HistoryBatch:
    """Histories that end right before a target, for evaluation. Rows beyond `count` are padding.

    Attributes:
      users, targets: the user and the target's item id of each row.
      events: [B, E, A] right-padded; lengths: number of real events in each row.
      seen: the different item ids of the *whole* history, however much of it `events` holds, 0-padded.
    """

    users: Int[np.ndarray, " B"]
    targets: Int[np.ndarray, " B"]
    events: Int[np.ndarray, "B E A"]
    lengths: Int[np.ndarray, " B"]
    seen: Int[np.ndarray, "B X"]
    positions: Int[np.ndarray, " B"]
    count: int


def length_batches(
    lengths: Int[np.ndarray, " n"], batch_size: int, bucket: int = BUCKET
) -> Iterator[tuple[Int[np.ndarray, " m"], Int[np.ndarray, " B"], int]]:
    """Yield the indices of a batch's rows, the same filled up to `batch_size` rows by the last one again, and a padded length.

    Rows of like length are together, which keeps padding small, and their length is rounded up to a multiple of `bucket`, which
    keeps the number of compiled shapes small.
    """
    order = np.argsort(lengths, kind="stable")
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        rows = np.pad(indices, (0, batch_size - len(indices)), mode="edge")
        yield indices, rows, int(-(-max(lengths[rows].max(), 1) // bucket) * bucket)


def history_batches(
    timelines: Timelines,
    users: Int[np.ndarray, " n"],
    positions: Int[np.ndarray, " n"],
    *,
    max_events: int,
    batch_size: int,
    bucket: int = BUCKET,
) -> Iterator[tuple[np.ndarray, HistoryBatch]]:
    """Yield (indices into `users`, batch); see `length_batches`."""
    lengths = np.minimum(positions, max_events)
    for indices, rows, padded in length_batches(lengths, batch_size, bucket):
        goal = timelines.offsets[users[rows]] + positions[rows]
        place = np.arange(padded)
        history = np.where(place < lengths[rows, None], (goal - lengths[rows])[:, None] + place, -1)
        pairs = zip(users[rows].tolist(), positions[rows].tolist(), strict=True)
        items = [np.unique(timelines.items(user, 0, position)) for user, position in pairs]
        seen = pad_rows(items, 2 ** math.ceil(math.log2(max(1, *(len(row) for row in items)))))
        targets = timelines.item[goal].astype(np.int32)
        yield (
            indices,
            HistoryBatch(users[rows], targets, timelines.features(history), lengths[rows], seen, positions[rows], len(indices)),
        )


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
    """How histories and targets become training examples of contextualization.

    Attributes:
      max_events: longest history given to the encoder; 0 for none (text prompts only).
      targets_per_history: J ends of each history that are predicted, each from the events before it. The encoder runs once
        for all of them.
      text_items: how many of the most recent items stand in the prompt as text.
      history: how they do, `titles` or `summary`.
    """

    max_events: int
    targets_per_history: int
    text_items: int
    history: str = "titles"

    @property
    def window(self) -> int:
        """The longest stretch of events of an example."""
        return self.max_events or max(self.text_items, 1)

    @property
    def answers(self) -> int:
        """The most answers of a row: without an encoder, the events of a stretch."""
        return 1 if self.max_events or self.history != "titles" else max(self.text_items, 1)


def contextual_examples(
    timelines: Timelines,
    stops: Int[np.ndarray, " U"],
    asked: Examples,
    config: ExampleConfig,
    *,
    seed: int,
    stream: tuple[int, int] = (0, 1),
    task: str = "next_item",
    text_weight: float = 1.0,
    epochs: int | None = None,
) -> grain.IterDataset:
    """Return the examples of one task for contextualization, endless for no number of epochs.

    An example is a history with J ends, or without an encoder a task's `stretch`. `contextual_batches` makes batches of them. An example has what a batch has, without the leading axis, and for `events` their numbers [E] among those of all users (-1 =
    none). With an encoder each end is one row with one answer. Without, a row is a task's `stretch`. A window in which nothing can be
    asked is left out.
    """
    ends = config.targets_per_history if config.max_events else 1

    def cut(w: Window) -> Batch | None:
        rng = np.random.default_rng((seed, w.epoch, w.slot))
        weight = {task: np.array(text_weight, np.float32)}
        if not config.max_events:
            row = asked.stretch(w.user, w.start, w.stop, rng)
            if row is None:
                return None
            text = _text_arrays([row], asked, config.answers)
            return {"prefix": np.zeros(1, np.int32), "text_weight": weight, **text}
        count = w.stop - w.start
        rows = ((end, asked.row(w.user, w.start + end)) for end in rng.permutation(np.arange(1, count + 1)).tolist())
        found = sorted(itertools.islice((pair for pair in rows if pair[1] is not None), ends), key=operator.itemgetter(0))
        if not found:
            return None
        first = int(timelines.offsets[w.user]) + w.start
        events = np.full(config.max_events, -1)
        events[:count] = np.arange(first, first + count)
        prefix = np.zeros(ends, np.int32)
        prefix[: len(found)] = [end for end, _ in found]
        text = _text_arrays([row for _, row in found if row is not None], asked, config.answers, ends)
        return {"events": events, "lengths": np.array(count, np.int32), "prefix": prefix, "text_weight": weight, **text}

    windows = _stream(Windows(stops, config.window, seed), seed, stream, epochs)
    return windows.map(cut).filter(lambda example: example is not None)


def contextual_batches(examples: grain.IterDataset, timelines: Timelines, size: int) -> grain.IterDataset:
    """Return endless batches of `size` examples of `contextual_examples`, or of as many bundles of them (`PackedExamples`).

    Each batch of B histories with J ends has `events` [B, E, A] and `lengths` [B] (absent without an encoder), `prefix` [B, J]
    (events before each end), `text` [B, J, T] and `text_lengths` [B, J], `answers` [B, J, P] (positions in the text, 0 = none), if
    the task ranks, `items` [B, J, P] (the items to rank there, 0 = none), and `text_weight` {task: [B]}, the given one.
    """

    def features(batch: Batch) -> Batch:
        return batch | ({"events": timelines.features(batch["events"])} if "events" in batch else {})

    return examples.batch(size, drop_remainder=True).map(features)


def _text_arrays(rows: list[TextRow], asked: Examples, answers: int, count: int = 1) -> Batch:
    """Return the rows, at most `count`, as arrays of `count` rows."""
    lengths = np.zeros(count, np.int32)
    lengths[: len(rows)] = [len(row.ids) for row in rows]
    arrays = {
        "text": pad_rows([row.ids for row in rows], asked.template.max_tokens, count),
        "text_lengths": lengths,
        "answers": pad_rows([row.answers for row in rows], answers, count),
    }
    return arrays | ({"items": pad_rows([row.items for row in rows], answers, count)} if asked.ranks else {})
