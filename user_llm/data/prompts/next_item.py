"""Next item: the target is the title of the event at the end of the history.

As text, titles are history and targets at once: a row without an encoder predicts every title after its first, as a causal
decoder learns from all of them at the cost of one.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from user_llm.data.prompts.base import Ids, Items, Lines, TextRow, fitting
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines


class NextItem:
    """Prompts that ask for the next item: rows of at most `max_tokens` tokens, without the oldest lines where they would be longer.

    Raises:
      ValueError: an instruction that is empty, or that leaves no room for a title.
    """

    fields = ()

    def __init__(self, lines: Lines, *, instruction: str, max_tokens: int):
        self.lines, self.max_tokens = lines, max_tokens
        self.settings = dict(instruction=instruction, max_tokens=max_tokens)
        self.instruction = np.concatenate([lines.start, lines.line(instruction)]).astype(np.int32)
        self.shared_tokens = len(self.instruction) - 1
        if not instruction or len(self.instruction) + lines.max_title_tokens + 1 > max_tokens:
            raise ValueError(
                f"The instruction {instruction!r} must not be empty, and its {len(self.instruction)} tokens and a title of "
                f"{lines.max_title_tokens} must fit {max_tokens} tokens: raise max_tokens or change the instruction."
            )

    def prompt(self, items: Items, **fields: object) -> Ids:
        """Return the prompt that ends at the answer position after the history."""
        return self.row(self.lines.history(items), ()).ids

    def row(self, history: list[Ids], targets: Sequence[int] | np.ndarray) -> TextRow:
        """Return the row of a history's lines in which these items are to be predicted one after another."""
        pieces = [*history, *(self.lines.title(item) for item in targets)]
        drop = fitting(pieces, self.max_tokens - len(self.instruction))
        pieces = pieces[drop:]
        first = max(len(history) - drop, 0)
        # The answer position of a piece is the last token before it.
        before = list(itertools.accumulate(map(len, pieces), initial=len(self.instruction) - 1))[:-1]
        ids = np.concatenate([self.instruction, *pieces], dtype=np.int32)
        items = np.asarray(targets, np.int32)[len(targets) - (len(pieces) - first) :]
        return TextRow(ids, np.array(before[first:], np.int32), items)


class NextItemExamples:
    """Every event of a timeline as what is to be predicted from the events before it."""

    ranks = True

    def __init__(self, template: NextItem, timelines: Timelines, split: Split):
        self.template, self.timelines, self.split = template, timelines, split

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the row in which the event at `end` is to be predicted."""
        history = self.template.lines.history(self._history(user, end))
        return self.template.row(history, self.timelines.items(user, end, end + 1))

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return the row in which all events after `start` are to be predicted; with a summary, the last one."""
        if self.template.lines.kind != "titles":
            return self.row(user, end)
        items = self.timelines.items(user, start, end + 1)
        return self.template.row([self.template.lines.title(items[0])], items[1:])

    def prompt(self, user: int, end: int) -> Ids:
        """Return the prompt about the events before `end`."""
        return self.template.prompt(self._history(user, end))

    def _history(self, user: int, end: int) -> Items:
        """Return the events before `end` that the prompt is made of."""
        return self.timelines.items(user, self.template.lines.first(end), end)

    def answer(self, user: int, end: int) -> str:
        """Return the title of the event at `end`."""
        return self.timelines.catalogue.titles[self.timelines.items(user, end, end + 1)[0]]

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split."""
        return self.split.targets[part]
