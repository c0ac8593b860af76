"""The tasks `favorite` and `favorite_future`, which ask for a user's favourite genre or category, in the history or in the events after it.

The label of `OfHistory` can be counted from the history, so that the task is easy. The label of `OfFuture` cannot, and is
therefore the fairer test of a model. For `OfFuture` the history of a test user ends where training ends: no phase of training has
seen the events that the label is counted from.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from user_llm.config import phases as settings
from user_llm.config.phases import ContextualEval
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset
from user_llm.data.prompts.base import Ids, Items, Lines, Question, TextRow, Whose
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.evals.measured import Measured
from user_llm.models.trie import Trie
from user_llm.tasks.asking import Asking
from user_llm.tasks.task import Found, PromptTask


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

    def prompt(self, user: int, end: int, whose: Whose | None = None) -> Ids:
        """Return the prompt about the events before `end`, or about the history of `whose`."""
        return self.template.prompt(self._history(*(whose or (user, end))))

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


def favorite_baselines(asked: OfHistory, part: str = "test") -> dict[str, Measured]:
    """Return of each method its accuracy, 1 for each target whose class it names.

    `counting` names the favourite of the history, which of the task `favorite` is the label itself. `majority` names the class
    that is the favourite of most users' training events.

    Raises:
      ValueError: nobody has a label.
    """
    users, ends = asked.targets(part)
    if not len(users):
        raise ValueError(f"No user of the {part} part has a favourite: raise data.withhold, or ask no favourites.")
    pairs = list(zip(users.tolist(), ends.tolist(), strict=True))
    expected = np.array([asked.label(user, end) for user, end in pairs])
    counted = np.array([asked.labels.favorite(user, 0, end) for user, end in pairs])
    trained = [asked.labels.favorite(user, 0, int(stop)) for user, stop in enumerate(asked.split.train_stop)]
    most = np.bincount([label for label in trained if label]).argmax()
    correct = {"counting": counted == expected, "majority": expected == most}
    return {method: Measured(users, ends, {"accuracy": named.astype(np.float64)}) for method, named in correct.items()}


def check(asked: FavoriteExamples, sizes: ContextualEval) -> None:
    """See that the names of classes can be told apart, and that a prompt has room for one.

    Raises:
      ValueError: they cannot, or it has not.
    """
    Trie.build(asked.names)
    asked.check_room()


def names(asked: FavoriteExamples) -> dict[int, str]:
    """Return the names that are possible answers, by their numbers."""
    return {number: asked.asked.labels.names[number] for number in asked.names}


def best_classes(asking: Asking, name: str, users: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the number of the likeliest class for each history."""
    return asking.choose_name(name, _examples(asking, name).names, users, ends)


def measure(asking: Asking, name: str, part: str, limit: int | None, sizes: ContextualEval) -> list[Found]:
    """Measure how often the likeliest class is the label."""
    asked = _examples(asking, name)
    users, ends = (array[:limit] for array in asked.targets(part))
    best = best_classes(asking, name, users, ends)
    labels = [asked.asked.label(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    correct = (best == labels).astype(np.float64)
    return [Found(Measured(users, ends, {"accuracy": correct}))]


def show(asking: Asking, name: str, users: np.ndarray, ends: np.ndarray) -> list[str]:
    """Return the name of the likeliest class."""
    labels = _examples(asking, name).asked.labels
    return [labels.names[i] for i in best_classes(asking, name, users, ends)]


def _examples(asking: Asking, name: str) -> FavoriteExamples:
    asked = asking.examples[name]
    assert isinstance(asked, FavoriteExamples)
    return asked


def task(of: type[OfHistory]) -> PromptTask:
    """Return the task that asks for the favourite class, of the history or of the future."""

    def about(data: Dataset, config: Config) -> OfHistory:
        return of(Labels(data.timelines, feature=config.labels.feature, whole=config.labels.whole), data.split)

    def examples(lines: Lines, data: Dataset, asked: settings.Question, config: Config) -> FavoriteExamples:
        return FavoriteExamples(Question.of(lines, asked), about(data, config))

    return PromptTask(
        settings.Question, ("accuracy",), examples, measure, show, check, names,
        baselines=lambda data, config: favorite_baselines(about(data, config)),
    )  # fmt: skip


OF_HISTORY, OF_FUTURE = task(OfHistory), task(OfFuture)
