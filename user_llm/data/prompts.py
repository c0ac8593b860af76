r"""Prompts and targets of the next-item task as token ids, tokenised once per item.

    <instruction> \n <title> \n <title> \n ... <title> \n

Every title ends in the end token, one newline; the token before a title (the instruction's newline or another title's) is the
*answer position* from which the next item is ranked or written. With no titles as text this is the prompt of User-LLM (the
same for all users); with the last 10 or 50 it is the text-prompt baseline; with both, the paper's hybrid.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from user_llm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextRow:
    """One tokenised row.

    Attributes:
      ids: the tokens, unpadded.
      answers: position of the answer position of each item that is to be predicted.
      items: those items.
    """

    ids: Int[np.ndarray, "T"]
    answers: Int[np.ndarray, "P"]
    items: Int[np.ndarray, "P"]


class NextItemPrompts:
    """Builds rows of at most `max_tokens` tokens from item ids.

    Titles longer than `max_title_tokens` are cut in prompts and training targets (never in the ranking trie). Where a row
    would be too long, the oldest titles are left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, titles: Sequence[str], *, instruction: str, max_tokens: int, max_title_tokens: int
    ):
        # Encoded apart and joined, so that a title has the same tokens wherever it stands.
        self.end_id = tokenizer.encode("\n")[-1]
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.instruction = np.array([*start, *tokenizer.encode(instruction), self.end_id], np.int32)
        self.titles = [np.array(tokenizer.encode(title), np.int32) for title in titles]
        self.max_tokens, self.max_title_tokens = max_tokens, max_title_tokens
        if len(self.instruction) + max_title_tokens + 1 > max_tokens:
            raise ValueError(
                f"The instruction ({len(self.instruction)} tokens) and a title of {max_title_tokens} do not fit "
                f"{max_tokens} tokens: raise max_tokens or shorten the instruction."
            )

    def row(self, items: Sequence[int] | np.ndarray, given: int) -> TextRow:
        """Return the row in which `items[given:]` are to be predicted and those before are context."""
        pieces = [np.append(self.titles[item][: self.max_title_tokens], self.end_id) for item in items]
        drop, budget = 0, self.max_tokens - len(self.instruction)
        while sum(map(len, pieces[drop:])) > budget:
            drop += 1
        pieces = pieces[drop:]
        starts = len(self.instruction) + np.cumsum([0, *map(len, pieces)])[:-1]
        first = max(given - drop, 0)
        ids = np.concatenate([self.instruction, *pieces]).astype(np.int32)
        return TextRow(ids, (starts[first:] - 1).astype(np.int32), np.asarray(items[drop + first :], np.int32))

    def prompt(self, history: Sequence[int]) -> Int[np.ndarray, "T"]:
        """Return the prompt that ends at the answer position after `history` (item ids, oldest first)."""
        return self.row(history, len(history)).ids

    def targets(self) -> dict[int, list[int]]:
        """Return the whole title of every item id, with its end token."""
        return {item: [*self.titles[item].tolist(), self.end_id] for item in range(1, len(self.titles))}


def pad_rows(rows: Sequence[Int[np.ndarray, "T"]], length: int) -> Int[np.ndarray, "B T"]:
    """Right-pad rows with 0 to `length`."""
    out = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
