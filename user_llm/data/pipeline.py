"""From timelines to batches: windows cut on the fly, shuffled by seed, shared out over streams, packed, resumable (grain).

A window is a stretch of one user's usable events, cut when it is asked for; nothing is expanded on disk. Long histories are cut
by a grid that moves at random from epoch to epoch, so that over time every event is seen with every amount of context.

Each stream reads every n-th window; `data/streams.py` puts batches together from them.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from user_llm.data.prompts.base import Prompts, TextRow, pad_rows
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

    def __init__(self, stops: Int[np.ndarray, "U"], length: int, seed: int):
        super().__init__()
        inputs = np.maximum(stops - 1, 0)
        slots = np.where(inputs <= length, np.minimum(inputs, 1), -(-inputs // length) + 1)
        self._users = np.repeat(np.arange(len(stops)), slots)
        self._cells = np.arange(len(self._users)) - np.repeat(np.cumsum(slots) - slots, slots)
        self._inputs, self._length, self._seed = inputs, length, seed

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, slot = divmod(int(index), len(self))
        user, cell = int(self._users[slot]), int(self._cells[slot])
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
    stops: Int[np.ndarray, "U"],
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
        events = timelines.events(w.user, w.start, w.stop + 1)
        return {"events": events[:-1], "next": events[1:]}

    windows = _stream(Windows(stops, window, seed), seed, stream).map(cut)
    return _pack(windows, "events", rows, row_length, float(np.minimum(stops - 1, window).mean()), seed)


def packed_text(
    lines: Sequence[Int[np.ndarray, "T"]],
    *,
    rows: int,
    row_length: int,
    seed: int,
    stream: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Return endless batches for language modelling, several tokenised lines packed into each row.

    Each batch has `tokens`, `next`, `segments` and `positions`, all int32 [rows, row_length].
    """

    def cut(line: Int[np.ndarray, "T"]) -> Batch:
        line = line[: row_length + 1]
        return {"tokens": line[:-1], "next": line[1:]}

    typical = float(np.mean([len(line) for line in lines]))
    return _pack(_stream(grain.MapDataset.source(lines), seed, stream).map(cut), "tokens", rows, row_length, typical, seed)


def _pack(dataset: grain.IterDataset, name: str, rows: int, row_length: int, typical: float, seed: int) -> grain.IterDataset:
    """Pack elements {name, next} of some `typical` length several to a row.

    Adds `segments` (0 = padding) and `positions` within the segment.
    """

    def tidy(batch: Batch) -> Batch:
        renamed = {
            name: batch[name],
            "next": batch["next"],
            "segments": batch[f"{name}_segment_ids"],
            "positions": batch[f"{name}_positions"],
        }
        return {key: array.astype(np.int32) for key, array in renamed.items()}

    batches = int(np.clip(np.ceil(16 * typical / row_length), 1, MAX_PACKING_BATCHES))
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset, length_struct={name: row_length, "next": row_length}, num_packing_bins=batches * rows, seed=seed
    )
    return packed.batch(rows, drop_remainder=True).map(tidy)


def _stream(dataset: grain.MapDataset, seed: int, stream: tuple[int, int]) -> grain.IterDataset:
    """Shuffle anew each epoch, repeat without end, and keep the stream's share."""
    index, count = stream
    dataset = dataset.shuffle(seed).repeat()
    return dataset[index::count].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))


@dataclasses.dataclass(frozen=True)
class HistoryBatch:
    """Histories that end right before a target, for evaluation. Rows beyond `count` are padding.

    Attributes:
      users, targets: the user and the target's item id of each row.
      events: [B, E, A] right-padded; lengths: number of real events in each row.
      seen: item ids of the *whole* history, however much of it `events` holds, 0-padded.
    """

    users: Int[np.ndarray, "B"]
    targets: Int[np.ndarray, "B"]
    events: Int[np.ndarray, "B E A"]
    lengths: Int[np.ndarray, "B"]
    seen: Int[np.ndarray, "B X"]
    positions: Int[np.ndarray, "B"]
    count: int


def history_batches(
    timelines: Timelines,
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
    *,
    max_events: int,
    batch_size: int,
    bucket: int = BUCKET,
) -> Iterator[tuple[np.ndarray, HistoryBatch]]:
    """Yield (indices into `users`, batch) with users of like length together, padded to a multiple of `bucket` events.

    Sorting by length keeps padding small, rounding keeps the number of compiled shapes small.
    """
    lengths = np.minimum(positions, max_events)
    order = np.argsort(lengths, kind="stable")
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        rows = np.pad(indices, (0, batch_size - len(indices)), mode="edge")
        padded = int(-(-max(lengths[rows].max(), 1) // bucket) * bucket)
        seen_width = int(2 ** np.ceil(np.log2(max(positions[rows].max(), 1))))
        width = timelines.events(0, 0, 0).shape[1]
        events = np.zeros((batch_size, padded, width), np.int32)
        seen = np.zeros((batch_size, seen_width), np.int32)
        targets = np.zeros(batch_size, np.int32)
        for i, row in enumerate(rows):
            user, position, length = int(users[row]), int(positions[row]), int(lengths[row])
            events[i, :length] = timelines.events(user, position - length, position)
            first = timelines.offsets[user]
            seen[i, :position] = timelines.item[first : first + position]
            targets[i] = timelines.item[first + position]
        yield indices, HistoryBatch(users[rows], targets, events, lengths[rows], seen, positions[rows], len(indices))


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
    stops: Int[np.ndarray, "U"],
    prompts: Prompts,
    config: ExampleConfig,
    *,
    batch_size: int,
    seed: int,
    stream: tuple[int, int] = (0, 1),
    task: str = "next_item",
    text_weight: float = 1.0,
) -> grain.IterDataset:
    """Return endless batches of one task for contextualization.

    Each batch of B histories with J ends has `events` [B, E, A] and `lengths` [B] (absent without an encoder), `prefix` [B, J]
    (events before each end), `text` [B, J, T] and `text_lengths` [B, J], `answers` [B, J, P] (positions in the text, 0 = none), if
    the task ranks, `items` [B, J, P] (the items to rank there, 0 = none), and `text_weight` {task: [B]}, the given one.

    With an encoder each end is one row with one answer. Without, a row is a task's `stretch`. A window in which nothing can be
    asked is left out.
    """
    ends = config.targets_per_history if config.max_events else 1

    def cut(w: Window) -> Batch | None:
        rng = np.random.default_rng((seed, w.epoch, w.slot))
        weight = {task: np.array(text_weight, np.float32)}
        if not config.max_events:
            row = prompts.stretch(w.user, w.start, w.stop, rng)
            if row is None:
                return None
            text = _text_arrays([row], prompts, config.answers)
            return {"prefix": np.zeros(1, np.int32), "text_weight": weight, **text}
        count = w.stop - w.start
        asked = ((end, prompts.row(w.user, w.start + end)) for end in rng.permutation(np.arange(1, count + 1)).tolist())
        found = sorted(itertools.islice((pair for pair in asked if pair[1] is not None), ends), key=operator.itemgetter(0))
        if not found:
            return None
        events = timelines.events(w.user, w.start, w.stop)
        padded = np.zeros((config.max_events, events.shape[1]), np.int32)
        padded[:count] = events
        prefix = np.zeros(ends, np.int32)
        prefix[: len(found)] = [end for end, _ in found]
        text = _text_arrays([row for _, row in found if row is not None], prompts, config.answers, ends)
        return {"events": padded, "lengths": np.array(count, np.int32), "prefix": prefix, "text_weight": weight, **text}

    windows = _stream(Windows(stops, config.window, seed), seed, stream)
    return windows.map(cut).filter(lambda example: example is not None).batch(batch_size, drop_remainder=True)


def _text_arrays(rows: list[TextRow], prompts: Prompts, answers: int, count: int = 1) -> Batch:
    """Return the rows, at most `count`, as arrays of `count` rows."""
    lengths = np.zeros(count, np.int32)
    lengths[: len(rows)] = [len(row.ids) for row in rows]
    arrays = {
        "text": pad_rows([row.ids for row in rows], prompts.max_tokens, count),
        "text_lengths": lengths,
        "answers": pad_rows([row.answers for row in rows], answers, count),
    }
    return arrays | ({"items": pad_rows([row.items for row in rows], answers, count)} if prompts.ranks else {})
