"""The tasks that ask for a user's favourite genre or category, in the history or in the events after it.

The label of `OfHistory` can be counted from the history, so that the task is easy. The label of `OfFuture` cannot, and is
therefore the fairer test of a model. For `OfFuture` the history of a test user ends where training ends: no phase of training has
seen the events that the label is counted from.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from user_llm.data.prompts.base import Ids, Items, Question, TextRow
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines


class Labels:
    """The classes of a dataset's items, such as their genres.

    Args:
      feature: the bag of the catalogue that holds an item's classes, such as `genres`.
      whole: whether an item's whole bag is one class ("Comedy|Romance", or a category path). Otherwise each member is a class.

    Attributes:
      names: the name of each class by its number; number 0 means no class.

    Raises:
      ValueError: the catalogue has no bag of this name.
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
            found, inverse = np.unique(bags, axis=0, return_inverse=True)  # the empty bag of PAD sorts first
            self.names = ["|".join(vocab[i] for i in bag if i) for bag in found]
            self._of_item = inverse.reshape(-1, 1)
        else:
            self.names, self._of_item = vocab, bags

    def favorite(self, user: int, start: int, stop: int) -> int:
        """Return the most frequent class among the events `start` to `stop` - 1 of a user; 0 if they have no class.

        Of equally frequent classes the one that occurred last wins; of those in the same event the one with the lowest number wins.
        """
        classes = self._of_item[self.timelines.items(user, start, stop)]
        event, column = np.nonzero(classes)
        if not len(event):
            return 0
        found = classes[event, column]
        counts = np.bincount(found)
        last = np.zeros(len(counts), np.int64)
        last[found] = event  # events ascend, so that the last one stays
        return int(np.argmax(counts * len(classes) + np.where(counts > 0, last, 0)))


@dataclasses.dataclass(frozen=True)
class OfHistory:
    """The question for the favourite class of the events before an end."""

    labels: Labels
    split: Split

    def label(self, user: int, end: int) -> int:
        """Return the number of the class to name; 0 if there is none."""
        return self.labels.favorite(user, 0, end)

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the users and the ends of a part of the split that have a label."""
        return self._labelled(*self.split.targets[part])

    def _labelled(self, users: np.ndarray, ends: np.ndarray):
        chosen = np.array([self.label(int(user), int(end)) > 0 for user, end in zip(users, ends, strict=True)], bool)
        return users[chosen], ends[chosen]


class OfFuture(OfHistory):
    """The question for the favourite class of the events after an end.

    In training these are the training events from `end` on. In evaluation `end` is where training ends, and these are all events
    that training has not seen. Validation and test would need the same events of a user, so they use different users: a fifth of
    the users is for validation, the others are for test.
    """

    def label(self, user: int, end: int) -> int:
        """Return the number of the class to name; 0 if there is none."""
        stop = int(self.split.train_stop[user])
        return self.labels.favorite(user, end, stop if end < stop else int(self.labels.timelines.lengths[user]))

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the users and the ends of a part of the split that have a label."""
        stops = self.split.train_stop
        users = np.flatnonzero((stops > 0) & (stops < self.labels.timelines.lengths))
        validates = np.random.default_rng(0).random(len(stops)) < 0.2
        users = users[validates[users] == (part == "validation")]
        return self._labelled(users, stops[users])


class FavoriteExamples:
    """Examples whose target is the name of the favourite class, at every end where there is one."""

    ranks = False

    def __init__(self, template: Question, asked: OfHistory):
        self.template, self.asked, self.timelines = template, asked, asked.labels.timelines

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the prompt with the class's name; None if there is no class."""
        return self.template.row(self._history(user, end), self.answer(user, end))

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return the row of a random end from `start` + 1 to `end`."""
        return self.row(user, int(rng.integers(start + 1, end + 1)))

    def prompt(self, user: int, end: int) -> Ids:
        """Return the prompt about the events before `end`."""
        return self.template.prompt(self._history(user, end))

    def _history(self, user: int, end: int) -> Items:
        """Return the items before `end` that the prompt needs."""
        return self.timelines.items(user, self.template.lines.first(end), end)

    def answer(self, user: int, end: int) -> str:
        """Return the class's name; the empty string if there is no class."""
        return self.asked.labels.names[self.asked.label(user, end)]

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the users and the ends of a part of the split that have a favourite."""
        return self.asked.targets(part)

    @functools.cached_property
    def names(self) -> dict[int, list[int]]:
        """The tokens of every class's name as a line, by the class's number."""
        return {i: self.template.lines.line(name).tolist() for i, name in enumerate(self.asked.labels.names) if name}

    def check_room(self) -> None:
        """Check that the question leaves room for its target.

        Raises:
          ValueError: the question and the target have more than `max_tokens` tokens.
        """
        self.template.room(self.template.ask())
