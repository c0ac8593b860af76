"""Review: given the product and the rating, write what this user wrote about it."""

import string

import numpy as np
from jaxtyping import Int

from user_llm.data.mapped import filled
from user_llm.data.prompts.base import Ids, Lines, Question
from user_llm.data.splits import Split

# Titles cut to the same number of tokens differ in how they join the question: of so many the longest question is taken.
LONG_TITLES = 100


class Review(Question):
    """The target is a text of the event at the end of the history.

    Args:
      column: the text to write, `review` or `summary`.
      question: may hold {title} and {rating}, of that event.
    """

    def __init__(self, lines: Lines, split: Split, *, column: str, **template):
        super().__init__(lines, **template)
        timelines = lines.timelines
        if column not in timelines.columns or timelines.columns[column].dtype.kind != "T":
            texts = [name for name, values in timelines.columns.items() if values.dtype.kind == "T"]
            raise ValueError(f"{timelines.name} has no text {column!r} to write: its texts are {', '.join(texts) or 'none'}.")
        fields = {field for _, field, _, _ in string.Formatter().parse(self.question) if field is not None}
        if unknown := fields - {"title", "rating"}:
            raise ValueError(f"The question of review asks for {{{unknown.pop()}}}: it may name {{title}} and {{rating}}.")
        self.column, self.split = timelines.columns[column], split

    def ask(self, user: int, end: int) -> str:
        """Return the question about the event at `end`; a long title is cut."""
        timelines = self.lines.timelines
        event = timelines.offsets[user] + end
        return self.about(timelines.item[event], timelines.columns["rating"][event])

    def about(self, item: int, rating: int) -> str:
        """Return the question about an item and what it was rated."""
        title = self.lines.tokenizer.decode(self.lines.titles[item][: self.lines.max_title_tokens])
        return self.question.format(title=title, rating=rating)

    def longest(self) -> Ids:
        """Return the longest question about the items of the longest titles, rated with two digits."""
        titles = self.lines.titles
        items = sorted(range(1, len(titles)), key=lambda item: len(titles[item]), reverse=True)[:LONG_TITLES]
        return max((self.lines.line(self.about(item, 10)) for item in items), key=len)

    def trains(self) -> bool:
        """Return whether anybody wrote anything in training."""
        starts = self.lines.timelines.offsets
        return any(
            (self.column[start : start + stop] != "").any() for start, stop in zip(starts, self.split.train_stop, strict=False)
        )

    def answer(self, user: int, end: int) -> str:
        """Return what the user wrote."""
        return str(self.column[self.lines.timelines.offsets[user] + end])

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split where something was written."""
        users, ends = self.split.targets[part]
        chosen = filled(self.column, self.lines.timelines.offsets[users] + ends)
        return users[chosen], ends[chosen]
