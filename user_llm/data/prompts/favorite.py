"""Favourite genre or category, of the history or of the events after it.

`OfHistory`'s label can be counted from the history by construction; `OfFuture`'s cannot, and is the honest one. The history of
a test user ends where the split ends training, so that no phase has seen the events that make the label.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from user_llm.data.prompts.base import Ids, Items, Question, TextRow
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines


class Labels:
    """The classes of a dataset's items.

    Args:
      feature: the bag of the catalogue that holds an item's classes, such as `genres`.
      whole: take an item's whole bag as one class ("Comedy|Romance", a category path), not each of its members.

    Attributes:
      names: of the classes; 0 is none.
    """

    def __init__(self, timelines: Timelines, *, feature: str, whole: bool):
        catalogue = timelines.catalogue
        if feature not in catalogue.multi:
            known = ", ".join(catalogue.multi) or "none"
            raise ValueError(
                f"{timelines.name} has no {feature!r} to be a favourite: set labels.feature to one of its own ({known})."
            )
        self.timelines = timelines
        bags, vocab = catalogue.multi[feature], catalogue.vocab[feature]
        if whole:
            found, inverse = np.unique(bags, axis=0, return_inverse=True)  # PAD's empty bag sorts first
            self.names = ["|".join(vocab[i] for i in bag if i) for bag in found]
            self._of_item = inverse.reshape(-1, 1)
        else:
            self.names, self._of_item = vocab, bags

    def favorite(self, user: int, start: int, stop: int) -> int:
        """Return the most frequent class among events [start, stop) of a user, ties by the most recent, then by name; 0 for none."""
        classes = self._of_item[self.timelines.items(user, start, stop)]
        event, column = np.nonzero(classes)
        if not len(event):
            return 0
        found = classes[event, column]
        counts = np.bincount(found)
        last = np.zeros(len(counts), np.int64)
        last[found] = event  # in order, so that the last one stays
        return int(np.argmax(counts * len(classes) + np.where(counts > 0, last, 0)))


@dataclasses.dataclass(frozen=True)
class OfHistory:
    """Which class is the favourite of the events before an end, and of whom it is asked."""

    labels: Labels
    split: Split

    def label(self, user: int, end: int) -> int:
        """Return the class to name, 0 for none."""
        return self.labels.favorite(user, 0, end)

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split that have a label."""
        return self._labelled(*self.split.targets[part])

    def _labelled(self, users: np.ndarray, ends: np.ndarray):
        chosen = np.array([self.label(int(user), int(end)) > 0 for user, end in zip(users, ends, strict=True)], bool)
        return users[chosen], ends[chosen]


class OfFuture(OfHistory):
    """Which class is the favourite of the events after an end: in training of those that train, at its end of those withheld.

    A fifth of the users validates and the others test, since both parts need all that is withheld.
    """

    def label(self, user: int, end: int) -> int:
        """Return the class to name, 0 for none."""
        stop = int(self.split.train_stop[user])
        return self.labels.favorite(user, end, stop if end < stop else int(self.labels.timelines.lengths[user]))

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split that have a label."""
        stops = self.split.train_stop
        users = np.flatnonzero((stops > 0) & (stops < self.labels.timelines.lengths))
        validates = np.random.default_rng(0).random(len(stops)) < 0.2
        users = users[validates[users] == (part == "validation")]
        return self._labelled(users, stops[users])


class FavoriteExamples:
    """The name of a class, at every end of a timeline that has one."""

    ranks = False

    def __init__(self, template: Question, asked: OfHistory):
        self.template, self.asked, self.timelines = template, asked, asked.labels.timelines

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the prompt with the class's name."""
        return self.template.row(self._history(user, end), self.answer(user, end))

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return the row of a random end after `start`."""
        return self.row(user, int(rng.integers(start + 1, end + 1)))

    def prompt(self, user: int, end: int) -> Ids:
        """Return the prompt about the events before `end`."""
        return self.template.prompt(self._history(user, end))

    def _history(self, user: int, end: int) -> Items:
        """Return the events before `end` that the prompt is made of."""
        return self.timelines.items(user, self.template.lines.first(end), end)

    def answer(self, user: int, end: int) -> str:
        """Return the class's name, empty for none."""
        return self.asked.labels.names[self.asked.label(user, end)]

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split that have a favourite."""
        return self.asked.targets(part)

    @functools.cached_property
    def names(self) -> dict[int, list[int]]:
        """Every class's name as a line."""
        return {i: self.template.lines.line(name).tolist() for i, name in enumerate(self.asked.labels.names) if name}

    def check_room(self) -> None:
        """See that the question leaves room for its target.

        Raises:
          ValueError: it does not.
        """
        self.template.room(self.template.ask())
