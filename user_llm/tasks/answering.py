"""How the answers of an LLM with user tokens are measured, task by task.

| task | answer | metrics |
|---|---|---|
| `next_item` | the item head ranks all items; with method `/generate`, beam search in a trie ranks titles | ranks |
| `favorite`, `favorite_future` | beam search in a trie of all classes' names finds the likeliest | accuracy |
| `review` | a text, of which each token is the likeliest one | ROUGE |
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from user_llm.data.pipeline import HistoryBatch, history_batches
from user_llm.data.prompts.base import Examples, Ids
from user_llm.data.prompts.favorite import FavoriteExamples
from user_llm.data.prompts.next_item import NextItemExamples
from user_llm.data.prompts.review import ReviewExamples
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.evals.evaluator import rank_listed, rank_targets
from user_llm.evals.measured import Measured
from user_llm.evals.ranking import Ranks
from user_llm.evals.rouge import rouge
from user_llm.models.trie import Trie
from user_llm.models.user import User
from user_llm.serving.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Asking:
    """A model together with the dataset that it is asked about.

    A question is named by a user and an `end`: the user's events before `end` are the history.

    Attributes:
      predictor: the model.
      timelines: the events of the dataset's users.
      split: which events are for training, validation and test.
      examples: the questions of each task, by the task's name.
    """

    predictor: Predictor
    timelines: Timelines
    split: Split
    examples: dict[str, Examples]

    @property
    def sizes(self) -> dict[str, int]:
        """The settings by which histories are put into batches."""
        p = self.predictor
        return {"max_events": max(p.max_events, 1), "batch_size": p.batch_size, "bucket": p.bucket}

    def of(self, predictor: Predictor) -> "Asking":
        """Return the same dataset and questions with another model."""
        return dataclasses.replace(self, predictor=predictor)

    def batches(self, users: np.ndarray, ends: np.ndarray, **sizes: int) -> Iterator[tuple[np.ndarray, HistoryBatch]]:
        """Yield batches of histories, each with the indices of its rows in `users`; `sizes` replace those of `self.sizes`."""
        return history_batches(self.timelines, users, ends, **self.sizes | sizes)

    def prompts(self, task: str, batch: HistoryBatch) -> list[Ids]:
        """Return the prompt of a task for each row of a batch."""
        asked = self.examples[task]
        return [asked.prompt(int(user), int(end)) for user, end in zip(batch.users, batch.positions, strict=True)]

    def users(self, batch: HistoryBatch) -> User | None:
        """Return what the decoder reads of a batch's users; None if the model has no encoder."""
        return self.predictor.users(batch.events, batch.lengths)

    def test_users(self, count: int) -> User | None:
        """Return what the decoder reads of the first `count` test users. They are repeated if there are fewer."""
        users, ends = (np.resize(part, count) for part in self.split.targets["test"])
        [(_, batch)] = self.batches(users, ends, batch_size=count)
        return self.users(batch)

    def score(self, task: str, batch: HistoryBatch) -> Float[Array, "B V"]:
        """Return the item head's score of every item for each row of a batch."""
        return self.predictor.score(task, self.prompts(task, batch), self.users(batch))

    def choose(self, task: str, batch: HistoryBatch, trie: Trie, beams: int) -> Int[np.ndarray, "B beams"]:
        """Return the ids of the likeliest texts of a trie for each row of a batch, best first."""
        return self.predictor.choose(task, self.prompts(task, batch), self.users(batch), trie, beams)[0]

    def rank(self, task: str, part: str, limit: int | None) -> Ranks:
        """Return the ranks of the targets among all items, by the scores of the item head.

        Args:
          part: the part of the split, `validation` or `test`.
          limit: the most targets; None for all.
        """
        score = lambda batch: self.score(task, batch)  # noqa: E731
        return rank_targets(score, self.timelines, self.split, part, limit=limit, **self.sizes)

    def rank_written(self, task: str, part: str, limit: int | None) -> Ranks:
        """Return the ranks of the targets among the titles that beam search finds. A target that it does not find is a miss.

        Args:
          part: the part of the split, `validation` or `test`.
          limit: the most targets; None for all.
        """
        trie = Trie.build(self.examples[task].template.lines.titles_as_targets())
        propose = lambda batch: self.choose(task, batch, trie, self.predictor.beams)  # noqa: E731
        return rank_listed(propose, self.timelines, self.split, part, limit=limit, **self.sizes)

    def favorites(self, task: str, asked: FavoriteExamples, users: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the number of the likeliest class for each history."""
        trie, best = Trie.build(asked.names), np.zeros(len(users), np.int64)
        for indices, batch in self.batches(users, ends):
            best[indices] = self.choose(task, batch, trie, min(len(asked.names), self.predictor.beams))[: batch.count, 0]
        return best

    def write(self, task: str, asked: ReviewExamples, users: np.ndarray, ends: np.ndarray) -> list[str]:
        """Return an answer of one line for each history. Each token is the likeliest one."""
        out = [""] * len(users)
        for indices, batch in self.batches(users, ends):
            texts = self.predictor.write(task, self.prompts(task, batch), self.users(batch), asked.template.max_target_tokens)
            for index, text in zip(indices, texts, strict=False):
                out[index] = text
        return out


@dataclasses.dataclass(frozen=True)
class Found:
    """The measured result of one way of answering a task.

    Attributes:
      measured: the metrics of each question.
      suffix: what is added to the method's name, such as `/generate`.
    """

    measured: Measured
    suffix: str = ""


def measure_next_item(
    asking: Asking, task: str, asked: NextItemExamples, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Measure the ranks of next items.

    The item head ranks them if it is trained. Beam search over titles ranks them in the test part, and in every part if the item
    head is not trained.

    Raises:
      ValueError: the item head is not trained, and the settings write no titles.
    """
    ranks = asking.predictor.ranks
    written = settings.generate_users if part == "test" or not ranks else 0
    if not (ranks or written):
        raise ValueError("With loss.catalogue=0 no item head is trained, so titles must be written: set eval.generate_users.")
    found = []
    if ranks:
        found.append(Found(asking.rank(task, part, limit).measured()))
    if written:
        found.append(Found(asking.rank_written(task, part, written).measured(), "/generate"))
    return found


def measure_favorite(
    asking: Asking, task: str, asked: FavoriteExamples, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Measure how often the likeliest class is the label."""
    users, ends = (array[:limit] for array in asked.targets(part))
    best = asking.favorites(task, asked, users, ends)
    labels = [asked.asked.label(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    correct = (best == labels).astype(np.float64)
    return [Found(Measured(users, ends, {"accuracy": correct}))]


def measure_review(
    asking: Asking, task: str, asked: ReviewExamples, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Measure how similar the written texts are to those of the users, for at most `review_users` questions."""
    users, ends = (array[: min(limit or len(array), settings.review_users)] for array in asked.targets(part))
    targets = [asked.answer(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    scores = rouge(targets, asking.write(task, asked, users, ends))
    return [Found(Measured(users, ends, scores))]


MEASURES: dict[str, Callable[..., list[Found]]] = {
    "next_item": measure_next_item,
    "favorite": measure_favorite,
    "favorite_future": measure_favorite,
    "review": measure_review,
}
