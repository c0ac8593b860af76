"""Next item: the target is the title of the event at the end of the history.

As text, titles are history and targets at once: a row without an encoder predicts every title after its first, as a causal
decoder learns from all of them at the cost of one.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from user_llm.data.prompts.base import Ids, Lines, TextRow, fitting
from user_llm.data.splits import Split


class NextItem:
    """Rows of at most `max_tokens` tokens; where a row would be too long, the oldest lines are left out."""

    ranks = True

    def __init__(self, lines: Lines, split: Split, *, instruction: str, max_tokens: int):
        self.lines, self.split, self.max_tokens = lines, split, max_tokens
        self.instruction = np.concatenate([lines.start, lines.line(instruction)]).astype(np.int32)
        self.shared_tokens = len(self.instruction) - 1
        if not instruction or len(self.instruction) + lines.max_title_tokens + 1 > max_tokens:
            raise ValueError(
                f"The instruction {instruction!r} must not be empty, and its {len(self.instruction)} tokens and a title of "
                f"{lines.max_title_tokens} must fit {max_tokens} tokens: raise max_tokens or change the instruction."
            )

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the row in which the event at `end` is to be predicted."""
        return self._row(self.lines.history(user, end), self.lines.timelines.items(user, end, end + 1))

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return the row in which all events after `start` are to be predicted; with a summary, the last one."""
        if self.lines.kind != "titles":
            return self.row(user, end)
        items = self.lines.timelines.items(user, start, end + 1)
        return self._row([self.lines.title(items[0])], items[1:])

    def prompt(self, user: int, end: int) -> Ids:
        """Return the prompt that ends at the answer position after the history."""
        return self._row(self.lines.history(user, end), ()).ids

    def answer(self, user: int, end: int) -> str:
        """Return the title of the event at `end`."""
        return self.lines.timelines.catalogue.titles[self.lines.timelines.items(user, end, end + 1)[0]]

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split."""
        return self.split.targets[part]

    def _row(self, history: list[Ids], targets: Sequence[int] | np.ndarray) -> TextRow:
        pieces = [*history, *(self.lines.title(item) for item in targets)]
        drop = fitting(pieces, self.max_tokens - len(self.instruction))
        pieces = pieces[drop:]
        first = max(len(history) - drop, 0)
        # The answer position of a piece is the last token before it.
        before = list(itertools.accumulate(map(len, pieces), initial=len(self.instruction) - 1))[:-1]
        ids = np.concatenate([self.instruction, *pieces], dtype=np.int32)
        items = np.asarray(targets, np.int32)[len(targets) - (len(pieces) - first) :]
        return TextRow(ids, np.array(before[first:], np.int32), items)
