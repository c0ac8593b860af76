"""`Asking`: an LLM with user tokens that is asked about the users of a dataset, whatever the task."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from user_llm.common import mesh as meshes
from user_llm.data.dataset import Dataset
from user_llm.data.pipeline import HistoryBatch, history_batches
from user_llm.data.prompts.base import Examples, Ids, Lines, Whose
from user_llm.evals.evaluator import rank_each, rank_listed, rank_targets
from user_llm.evals.ranking import Ranks
from user_llm.evals.transitions import weighted_transitions
from user_llm.models.transitions import Transitions, last_items
from user_llm.models.trie import Trie
from user_llm.models.user import User
from user_llm.serving.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Asking:
    """A model together with the dataset that it is asked about.

    A question is named by a user and an `end`: the user's events before `end` are the history.

    Attributes:
      predictor: the model.
      data: the dataset.
      examples: the questions of each task, by the task's name.
      whose: whose history the model is given instead of a user's own, by user; everybody has their own if it is None. The questions
        and the right answers stay those of the user.
    """

    predictor: Predictor
    data: Dataset
    examples: dict[str, Examples]
    whose: Mapping[int, Whose] | None = None

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
        return history_batches(self.data.timelines, users, ends, **self.sizes | sizes)

    def prompts(self, task: str, batch: HistoryBatch) -> list[Ids]:
        """Return the prompt of a task for each row of a batch."""
        asked, pairs = self.examples[task], zip(batch.users.tolist(), batch.positions.tolist(), strict=True)
        if self.whose is None:
            return [asked.prompt(user, end) for user, end in pairs]
        return [asked.prompt(user, end, self.whose[user]) for user, end in pairs]

    def users(self, batch: HistoryBatch) -> User | None:
        """Return what the decoder reads of a batch's users; None if the model has no encoder."""
        given = self._given(batch)
        return self.predictor.users(given.events, given.lengths)

    def _given(self, batch: HistoryBatch) -> HistoryBatch:
        """Return the histories that the model is given for each row of a batch."""
        if self.whose is None:
            return batch
        users, ends = np.array([self.whose[user] for user in batch.users.tolist()]).T
        [(order, read)] = self.batches(users, ends, batch_size=len(users))
        back = np.argsort(order)  # batches are sorted by length
        return dataclasses.replace(read, **{name: rows[back] for name, rows in vars(read).items() if name != "count"})

    def _last(self, batch: HistoryBatch) -> Int[np.ndarray, "B 2"]:
        """Return the last items of these histories; see `Transitions.scores`."""
        given = self._given(batch)
        return last_items(self.data.timelines, given.users, given.positions)

    def test_users(self, count: int) -> User | None:
        """Return what the decoder reads of the first `count` test users. They are repeated if there are fewer."""
        users, ends = (np.resize(part, count) for part in self.data.split.targets["test"])
        [(_, batch)] = self.batches(users, ends, batch_size=count)
        return self.users(batch)

    def score(self, task: str, batch: HistoryBatch) -> Float[Array, "B V"]:
        """Return the item head's score of every item for each row of a batch."""
        return self.predictor.score(task, self.prompts(task, batch), self.users(batch))

    def ranked(self, task: str, batch: HistoryBatch) -> Float[np.ndarray, "B V"]:
        """Return the scores by which items are ranked, for each row of a batch; see `Predictor.ranked`."""
        return self.predictor.ranked(task, self.prompts(task, batch), self.users(batch), self._last(batch))

    def choose(self, task: str, batch: HistoryBatch, trie: Trie, beams: int, weight: float = 0.0) -> Int[np.ndarray, "B beams"]:
        """Return the ids of the likeliest texts of a trie for each row of a batch, best first.

        Args:
          weight: of the item head's scores, which guide the search where it is above 0.
        """
        prompts, users = self.prompts(task, batch), self.users(batch)
        guide = self.predictor.score(task, prompts, users) if weight else None
        return self.predictor.choose(task, prompts, users, trie, beams, guide, weight)[0]

    def choose_among(self, task: str, batch: HistoryBatch, trie: Trie, beams: int) -> Int[np.ndarray, "B beams"]:
        """Return the ids of the `beams` likeliest texts of a trie for each row of a batch, in the order of the item head's scores."""
        written, scores = self.choose(task, batch, trie, beams), meshes.fetch(self.score(task, batch))
        order = np.argsort(-np.take_along_axis(scores, written, axis=1), axis=1, kind="stable")
        return np.take_along_axis(written, order, axis=1)

    def rank(self, task: str, part: str, limit: int | None) -> Ranks:
        """Return the ranks of the targets among all items, by the scores of the item head.

        Args:
          part: the part of the split, `validation` or `test`.
          limit: the most targets; None for all.
        """
        score = lambda batch: self.score(task, batch)  # noqa: E731
        return rank_targets(score, self.data.timelines, self.data.split, part, limit=limit, **self.sizes)

    def rank_sums(self, task: str, part: str, limit: int | None, graph: Transitions, weights: Sequence[float]) -> list[Ranks]:
        """Return the ranks of the targets by the item head's scores and the transitions, for each weight of the transitions.

        The item head scores each target once. The other arguments are those of `rank`.
        """
        sums = lambda batch: graph.sums(meshes.fetch(self.score(task, batch)), self._last(batch), weights)  # noqa: E731
        timelines, split = self.data.timelines, self.data.split
        return rank_each(sums, len(weights), timelines, split, part, limit=limit, **self.sizes)

    def with_transitions(self, task: str, weights: Sequence[float], limit: int | None) -> "Asking":
        """Return the same with a model that has transitions, of the weight that ranks a task's validation targets best.

        The result is the same model without weights, without an item head that ranks for this task, or if this weight is 0.

        Args:
          weights: the weights to choose from; 0 for the item head alone.
          limit: the most targets; None for all.
        """
        if not (self.predictor.ranks and task in self.examples):
            return self
        rank = functools.partial(self.rank_sums, task, "validation", limit)
        graph = weighted_transitions(rank, self.data.timelines, self.data.split, weights)
        return self.of(dataclasses.replace(self.predictor, transitions=graph)) if graph else self

    def rank_written(self, task: str, part: str, limit: int | None, *, weight: float = 0.0, rerank: int = 0) -> Ranks:
        """Return the ranks of the targets among the titles that beam search finds. A target that it does not find is a miss.

        Args:
          part: the part of the split, `validation` or `test`.
          limit: the most targets; None for all.
          weight: of the item head's scores, which guide the search where it is above 0.
          rerank: how many titles are written and then ranked by the item head; 0 leaves the order of the search, which then has
            `predictor.beams` beams.
        """
        lines = self.examples[task].template.lines
        trie = title_trie(lines)
        propose = lambda batch: self.choose(task, batch, trie, self.predictor.beams, weight)  # noqa: E731
        if rerank:
            propose = lambda batch: self.choose_among(task, batch, trie, min(rerank, len(lines.titles) - 1))  # noqa: E731
        return rank_listed(propose, self.data.timelines, self.data.split, part, limit=limit, **self.sizes)

    def choose_name(
        self, task: str, names: Mapping[int, list[int]], users: np.ndarray, ends: np.ndarray
    ) -> Int[np.ndarray, " n"]:
        """Return the number of the likeliest name for each history.

        Args:
          names: the tokens of each name, with the end token, by the name's number.
        """
        trie, best = Trie.build(names), np.zeros(len(users), np.int64)
        for indices, batch in self.batches(users, ends):
            best[indices] = self.choose(task, batch, trie, min(len(names), self.predictor.beams))[: batch.count, 0]
        return best

    def likelihood(self, task: str, most: int, users: np.ndarray, ends: np.ndarray) -> Float[np.ndarray, " n"]:
        """Return the mean log-probability of a token of each right answer, of which the first `most` tokens are read, in nats.

        Of an answer without tokens it is that of the end token alone.
        """
        asked, out = self.examples[task], np.zeros(len(users))
        for indices, batch in self.batches(users, ends):
            pairs = zip(batch.users.tolist(), batch.positions.tolist(), strict=True)
            lines = asked.template.lines
            texts = [lines.line(asked.answer(user, end), most) for user, end in pairs]
            texts = [text if len(text) else np.array([lines.end_id], np.int32) for text in texts]
            sums = self.predictor.likelihood(task, self.prompts(task, batch), self.users(batch), texts)
            out[indices] = (sums / [len(text) for text in texts])[: batch.count]
        return out

    def write(self, task: str, max_tokens: int, users: np.ndarray, ends: np.ndarray) -> list[str]:
        """Return an answer of one line, at most `max_tokens` long, for each history. Each token is the likeliest one."""
        out = [""] * len(users)
        for indices, batch in self.batches(users, ends):
            texts = self.predictor.write(task, self.prompts(task, batch), self.users(batch), max_tokens)
            for index, text in zip(indices, texts, strict=False):
                out[index] = text
        return out


@functools.lru_cache(maxsize=1)  # The tasks of a phase share their lines, and ask for titles in many ways.
def title_trie(lines: Lines) -> Trie:
    """Return the trie of all titles.

    Raises:
      ValueError: two titles that are the same tokens.
    """
    return Trie.build(lines.titles_as_targets())


def random_users(users: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"], seed: int | tuple[int, ...]) -> dict[int, Whose]:
    """Return the history of another user for each user, drawn with a seed; several numbers together are one seed.

    The users stand in one random circle, and each gets the history of the next one. So nobody keeps their own, and every history is
    read once, at the user's first end. The result is empty for fewer than two users.
    """
    different, first = np.unique(users, return_index=True)
    if len(different) < 2:
        return {}
    order = np.random.default_rng(seed).permutation(len(different))
    circle = zip(order.tolist(), np.roll(order, -1).tolist(), strict=True)
    return {int(different[one]): (int(different[other]), int(ends[first[other]])) for one, other in circle}
