"""The task `review`: given an item and the user's rating of it, write what the user wrote about it."""

import numpy as np
from jaxtyping import Int

from user_llm.config import phases as settings
from user_llm.config.phases import ContextualEval
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset
from user_llm.data.mapped import filled
from user_llm.data.prompts.base import Ids, Items, Lines, Question, TextRow, Whose
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.evals import texts
from user_llm.evals.measured import Measured
from user_llm.tasks.asking import Asking, random_users
from user_llm.tasks.task import Found, PromptTask

# Titles that are cut to the same number of tokens still make questions of different lengths. The longest question is therefore
# looked for among this many of the longest titles.
LONG_TITLES = 100
FIELDS = ("title", "rating")  # what a question may name of the reviewed event
LATEST = 100  # The events whose texts say how a user writes: counting those of thousands would take longer than writing.


class ReviewExamples:
    """Examples whose target is what a user wrote about an event.

    Args:
      column: the column of the texts to write, `review` or `summary`.

    Raises:
      ValueError: the dataset has no such column of texts, or the question names a field that is not in FIELDS.
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
        """Return the prompt with what the user wrote about the event at `end`; None if the user wrote nothing."""
        return self.template.row(self._history(user, end), self.answer(user, end), **self._about(user, end))

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return the row of a random end from `start` + 1 to `end`; None if the user wrote nothing about that event."""
        return self.row(user, int(rng.integers(start + 1, end + 1)))

    def prompt(self, user: int, end: int, whose: Whose | None = None) -> Ids:
        """Return the prompt that asks about the event at `end`, with the events before it, or those of `whose`, as history."""
        return self.template.prompt(self._history(*(whose or (user, end))), **self._about(user, end))

    def _about(self, user: int, end: int) -> dict[str, object]:
        event = self.timelines.offsets[user] + end
        return self.fields(self.timelines.item[event], self.timelines.columns["rating"][event])

    def fields(self, item: int, rating: int) -> dict[str, object]:
        """Return the values of the question's fields for an item and its rating."""
        return {"title": self.timelines.catalogue.titles[item], "rating": rating}

    def _history(self, user: int, end: int) -> Items:
        """Return the items before `end` that the prompt needs."""
        return self.timelines.items(user, self.template.lines.first(end), end)

    def answer(self, user: int, end: int) -> str:
        """Return what the user wrote about the event at `end`."""
        return str(self.column[self.timelines.offsets[user] + end])

    def texts(self, user: int, end: int) -> list[str]:
        """Return what the user wrote about the last `LATEST` events before `end`."""
        start = self.timelines.offsets[user]
        return [str(text) for text in self.column[start + max(end - LATEST, 0) : start + end] if text]

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the users and the ends of a part of the split at which the user wrote something."""
        users, ends = self.split.targets[part]
        chosen = filled(self.column, self.timelines.offsets[users] + ends)
        return users[chosen], ends[chosen]

    def trains(self) -> bool:
        """Return whether any training event has a text."""
        starts = self.timelines.offsets
        return any(
            (self.column[start : start + stop] != "").any() for start, stop in zip(starts, self.split.train_stop, strict=False)
        )

    def check_room(self) -> None:
        """Check that the longest question leaves room for its target.

        The longest question is about an item with one of the longest titles, and has a rating of two digits.

        Raises:
          ValueError: the question and the target have more than `max_tokens` tokens.
        """
        titles = self.template.lines.titles
        items = sorted(range(1, len(titles)), key=lambda item: len(titles[item]), reverse=True)[:LONG_TITLES]
        self.template.room(max((self.template.ask(**self.fields(item, 10)) for item in items), key=len))


def examples(lines: Lines, data: Dataset, asked: settings.Review, config: Config) -> ReviewExamples:
    """Return the questions for what users wrote in a column of texts."""
    return ReviewExamples(Question.of(lines, asked), data.timelines, data.split, column=asked.column)


def check(asked: ReviewExamples, sizes: ContextualEval) -> None:
    """See that prompts have room for a review, and that there are reviews to train on.

    Raises:
      ValueError: they have not, or there are none, or `eval.bert_score` asks for a package or a model that is not there.
    """
    asked.check_room()
    if not asked.trains():
        raise ValueError("nobody wrote anything in training: set its weight to 0 to leave the task out.")
    if sizes.bert_score:
        texts.check_bert_score(sizes.bert_score)


def measure(asking: Asking, name: str, part: str, limit: int | None, sizes: ContextualEval) -> list[Found]:
    """Measure how similar the written texts are to those of the users, for at most `review_users` questions.

    BERTScore is measured on the test part alone. Of each question also `log_likelihood`, of the text that the user wrote, a mean over its tokens; and `nearer_to_author`: whether
    the written text is nearer to what its user wrote before than to what another user did. It is left out where there is no other.
    """
    asked = _examples(asking, name)
    users, ends = (array[: min(limit or len(array), sizes.review_users)] for array in asked.targets(part))
    pairs = list(zip(users.tolist(), ends.tolist(), strict=True))
    targets, written = [asked.answer(user, end) for user, end in pairs], show(asking, name, users, ends)
    others = random_users(*asked.targets(part), seed=0)  # the same however many are asked
    values = texts.rouge(targets, written) | texts.sentence_scores(targets, written) | texts.meteor(targets, written)
    if sizes.bert_score and part == "test":
        values |= texts.bert_score(targets, written, sizes.bert_score)
    values["log_likelihood"] = asking.likelihood(name, asked.template.max_target_tokens, users, ends)
    if others:
        of_author, of_other = (
            [asked.texts(*whose) for whose in those] for those in (pairs, [others[user] for user, _ in pairs])
        )
        values["nearer_to_author"] = texts.nearer_to_author(written, of_author, of_other)
    return [Found(Measured(users, ends, values), together=texts.corpus_scores(targets, written))]


def show(asking: Asking, name: str, users: np.ndarray, ends: np.ndarray) -> list[str]:
    """Return what is written."""
    return asking.write(name, _examples(asking, name).template.max_target_tokens, users, ends)


def _examples(asking: Asking, name: str) -> ReviewExamples:
    asked = asking.examples[name]
    assert isinstance(asked, ReviewExamples)
    return asked


METRICS = (*texts.ROUGES, *texts.SENTENCES, "log_likelihood", "nearer_to_author")
TASK = PromptTask(settings.Review, METRICS, examples, measure, show, check)
