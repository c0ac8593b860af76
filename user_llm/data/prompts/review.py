"""Review: given the product and the rating, write what this user wrote about it."""

import numpy as np
from jaxtyping import Int

from user_llm.data.mapped import filled
from user_llm.data.prompts.base import Ids, Items, Question, TextRow
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines

# Titles cut to the same number of tokens differ in how they join the question: of so many the longest question is taken.
LONG_TITLES = 100
FIELDS = ("title", "rating")  # of the reviewed event, which a question may name


class ReviewExamples:
    """What users wrote, at every event with a text.

    Args:
      column: the text to write, `review` or `summary`.

    Raises:
      ValueError: a dataset without this text, or a question that names something else than FIELDS.
    """

    ranks = False

    def __init__(self, template: Question, timelines: Timelines, split: Split, *, column: str):
        if column not in timelines.columns or timelines.columns[column].dtype.kind != "T":
            texts = [name for name, values in timelines.columns.items() if values.dtype.kind == "T"]
            raise ValueError(f"{timelines.name} has no text {column!r} to write: its texts are {', '.join(texts) or 'none'}.")
        if unknown := set(template.fields) - set(FIELDS):
            raise ValueError(f"The question of review asks for {{{unknown.pop()}}}: it may name {{title}} and {{rating}}.")
        self.template, self.timelines, self.split = template, timelines, split
        self.column = timelines.columns[column]

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the prompt with what the user wrote about the event at `end`, None for nothing."""
        return self.template.row(self._history(user, end), self.answer(user, end), **self._about(user, end))

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return the row of a random end after `start`."""
        return self.row(user, int(rng.integers(start + 1, end + 1)))

    def prompt(self, user: int, end: int) -> Ids:
        """Return the prompt about the event at `end`, after the events before it."""
        return self.template.prompt(self._history(user, end), **self._about(user, end))

    def _about(self, user: int, end: int) -> dict[str, object]:
        event = self.timelines.offsets[user] + end
        return self.fields(self.timelines.item[event], self.timelines.columns["rating"][event])

    def fields(self, item: int, rating: int) -> dict[str, object]:
        """Return what the question says of an item and what it was rated."""
        return {"title": self.timelines.catalogue.titles[item], "rating": rating}

    def _history(self, user: int, end: int) -> Items:
        """Return the events before `end` that the prompt is made of."""
        return self.timelines.items(user, self.template.lines.first(end), end)

    def answer(self, user: int, end: int) -> str:
        """Return what the user wrote."""
        return str(self.column[self.timelines.offsets[user] + end])

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split where something was written."""
        users, ends = self.split.targets[part]
        chosen = filled(self.column, self.timelines.offsets[users] + ends)
        return users[chosen], ends[chosen]

    def trains(self) -> bool:
        """Return whether anybody wrote anything in training."""
        starts = self.timelines.offsets
        return any(
            (self.column[start : start + stop] != "").any() for start, stop in zip(starts, self.split.train_stop, strict=False)
        )

    def check_room(self) -> None:
        """See that the longest question, about the items of the longest titles and rated with two digits, leaves room for its target.

        Raises:
          ValueError: it does not.
        """
        titles = self.template.lines.titles
        items = sorted(range(1, len(titles)), key=lambda item: len(titles[item]), reverse=True)[:LONG_TITLES]
        self.template.room(max((self.template.ask(**self.fields(item, 10)) for item in items), key=len))
