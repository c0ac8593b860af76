"""The template that asks for the next item: the target is the title of the event after the history.

For a model without an encoder, the titles of a row are history and targets at once. Such a row has every title after the first as a
target, because a causal decoder learns from all of them at the cost of one.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from user_llm.data.prompts.base import Ids, Items, Lines, TextRow, fitting


class NextItem:
    """A template that asks for the next item.

    Args:
      lines: titles and histories as lines of token ids.
      instruction: the first line of every prompt.
      max_tokens: the most tokens of a prompt and its targets together. The oldest lines of a longer row are left out.

    Raises:
      ValueError: the instruction is empty, or leaves no room for a title.
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
        """Return the prompt for a history, up to and including the answer position."""
        return self.row(self.lines.history(items), ()).ids

    def row(self, history: list[Ids], targets: Sequence[int] | np.ndarray) -> TextRow:
        """Return the row of a history, given as lines, and of target items that are predicted one after another."""
        pieces = [*history, *(self.lines.title(item) for item in targets)]
        drop = fitting(pieces, self.max_tokens - len(self.instruction))
        pieces = pieces[drop:]
        first = max(len(history) - drop, 0)
        # The answer position of a piece is the last token before it.
        before = list(itertools.accumulate(map(len, pieces), initial=len(self.instruction) - 1))[:-1]
        ids = np.concatenate([self.instruction, *pieces], dtype=np.int32)
        items = np.asarray(targets, np.int32)[len(targets) - (len(pieces) - first) :]
        return TextRow(ids, np.array(before[first:], np.int32), items)
