"""How each task measures a contextualized LLM's answers.

| task | answer | metrics |
|---|---|---|
| `next_item` | all items ranked by the item head; method `/generate`: titles written by beam search in a trie | ranks |
| `favorite`, `favorite_future` | the likeliest class's name, among all, by beam search in a trie | accuracy |
| `review` | a text written greedily | ROUGE |
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
    """A model that is asked about users of a dataset, by the number of their events before a target.

    Attributes:
      examples: of each task.
    """

    predictor: Predictor
    timelines: Timelines
    split: Split
    examples: dict[str, Examples]

    @property
    def sizes(self) -> dict[str, int]:
        """How histories are batched."""
        p = self.predictor
        return {"max_events": max(p.max_events, 1), "batch_size": p.batch_size, "bucket": p.bucket}

    def of(self, predictor: Predictor) -> "Asking":
        """Return the same for another model."""
        return dataclasses.replace(self, predictor=predictor)

    def batches(self, users: np.ndarray, ends: np.ndarray, **sizes: int) -> Iterator[tuple[np.ndarray, HistoryBatch]]:
        """Yield (indices into `users`, batch)."""
        return history_batches(self.timelines, users, ends, **self.sizes | sizes)

    def prompts(self, task: str, batch: HistoryBatch) -> list[Ids]:
        """Return the prompts of a batch."""
        asked = self.examples[task]
        return [asked.prompt(int(user), int(end)) for user, end in zip(batch.users, batch.positions, strict=True)]

    def users(self, batch: HistoryBatch) -> User | None:
        """Return what the decoder reads of a batch's users, None without an encoder."""
        return self.predictor.users(batch.events, batch.lengths)

    def test_users(self, count: int) -> User | None:
        """Return the first `count` test users, over again where there are fewer."""
        users, ends = (np.resize(part, count) for part in self.split.targets["test"])
        [(_, batch)] = self.batches(users, ends, batch_size=count)
        return self.users(batch)

    def score(self, task: str, batch: HistoryBatch) -> Float[Array, "B V"]:
        """Score all items by the item head."""
        return self.predictor.score(task, self.prompts(task, batch), self.users(batch))

    def choose(self, task: str, batch: HistoryBatch, trie: Trie, beams: int) -> Int[np.ndarray, "B beams"]:
        """Return the ids of the likeliest texts of a trie, best first."""
        return self.predictor.choose(task, self.prompts(task, batch), self.users(batch), trie, beams)[0]

    def rank(self, task: str, part: str, limit: int | None) -> Ranks:
        """Rank all items by the item head."""
        score = lambda batch: self.score(task, batch)  # noqa: E731
        return rank_targets(score, self.timelines, self.split, part, limit=limit, **self.sizes)

    def rank_written(self, task: str, part: str, limit: int | None) -> Ranks:
        """Rank items by beam search over the titles of the catalogue; what is not among the beams is not found."""
        trie = Trie.build(self.examples[task].template.lines.titles_as_targets())
        propose = lambda batch: self.choose(task, batch, trie, self.predictor.beams)  # noqa: E731
        return rank_listed(propose, self.timelines, self.split, part, limit=limit, **self.sizes)

    def favorites(self, task: str, asked: FavoriteExamples, users: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the likeliest class of each history."""
        trie, best = Trie.build(asked.names), np.zeros(len(users), np.int64)
        for indices, batch in self.batches(users, ends):
            best[indices] = self.choose(task, batch, trie, min(len(asked.names), self.predictor.beams))[: batch.count, 0]
        return best

    def write(self, task: str, asked: ReviewExamples, users: np.ndarray, ends: np.ndarray) -> list[str]:
        """Write an answer to each prompt, greedily, one line."""
        out = [""] * len(users)
        for indices, batch in self.batches(users, ends):
            texts = self.predictor.write(task, self.prompts(task, batch), self.users(batch), asked.template.max_target_tokens)
            for index, text in zip(indices, texts, strict=False):
                out[index] = text
        return out


@dataclasses.dataclass(frozen=True)
class Found:
    """What one way of answering a task was worth.

    Attributes:
      suffix: of the method's name.
    """

    measured: Measured
    suffix: str = ""


def measure_next_item(
    asking: Asking, task: str, asked: NextItemExamples, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Rank the next item: by the item head, and in the test part also by writing titles; by writing alone without a trained head.

    Raises:
      ValueError: no way to rank is left.
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
    """Say how often the likeliest class is the label."""
    users, ends = (array[:limit] for array in asked.targets(part))
    best = asking.favorites(task, asked, users, ends)
    labels = [asked.asked.label(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    correct = (best == labels).astype(np.float64)
    return [Found(Measured(users, ends, {"accuracy": correct}))]


def measure_review(
    asking: Asking, task: str, asked: ReviewExamples, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Compare what is written with what the user wrote, for the first `review_users`."""
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
