"""The task `next_item`: which item comes next? Every item of the catalogue is ranked.

The item head ranks all items by one product. Where titles are written, beam search in a trie of all titles ranks those that it
finds: the LLM alone, with the item head as a guide, or for the item head to rank what was written. Without a model, popularity
ranks them, of all time and of the seven days before, and the graph of transitions does.
"""

import dataclasses

import numpy as np
from absl import logging
from jaxtyping import Int

from user_llm.config import phases as settings
from user_llm.config.phases import ContextualEval
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset
from user_llm.data.prompts.base import Ids, Items, Lines, TextRow, Whose
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.evals.measured import Measured
from user_llm.evals.popularity import popularity_ranks, recent_popularity_ranks
from user_llm.evals.ranking import RANKING
from user_llm.evals.transitions import TOGETHER, transition_ranks
from user_llm.tasks.asking import Asking, title_trie
from user_llm.tasks.task import Found, PromptTask

SHOWN = 5  # items of a ranking


class NextItemExamples:
    """Examples whose target is an event: it is predicted from the events before it."""

    ranks = True

    def __init__(self, template: NextItem, timelines: Timelines, split: Split):
        self.template, self.timelines, self.split = template, timelines, split

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the row whose target is the event at `end`."""
        history = self.template.lines.history(self._history(user, end))
        return self.template.row(history, self.timelines.items(user, end, end + 1))

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return the row whose targets are the events `start` + 1 to `end`; with a summary, the event at `end` alone."""
        if self.template.lines.kind != "titles":
            return self.row(user, end)
        items = self.timelines.items(user, start, end + 1)
        return self.template.row([self.template.lines.title(items[0])], items[1:])

    def prompt(self, user: int, end: int, whose: Whose | None = None) -> Ids:
        """Return the prompt about the events before `end`, or about the history of `whose`."""
        return self.template.prompt(self._history(*(whose or (user, end))))

    def _history(self, user: int, end: int) -> Items:
        """Return the items before `end` that the prompt needs."""
        return self.timelines.items(user, self.template.lines.first(end), end)

    def answer(self, user: int, end: int) -> str:
        """Return the title of the event at `end`."""
        return self.timelines.catalogue.titles[self.timelines.items(user, end, end + 1)[0]]

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the users and the ends of a part of the split."""
        return self.split.targets[part]


def examples(lines: Lines, data: Dataset, asked: settings.NextItem, config: Config) -> NextItemExamples:
    """Return the questions for the next item."""
    template = NextItem(lines, instruction=asked.instruction, max_tokens=asked.max_tokens)
    return NextItemExamples(template, data.timelines, data.split)


def check(asked: NextItemExamples, sizes: ContextualEval) -> None:
    """See that titles which are to be written can be told apart.

    Raises:
      ValueError: two titles that are the same tokens.
    """
    if sizes.generate_users:
        title_trie(asked.template.lines)


def measure(asking: Asking, name: str, part: str, limit: int | None, sizes: ContextualEval) -> list[Found]:
    """Measure the ranks of next items.

    The item head ranks them if it is trained. Beam search over titles ranks them in the test part, and in every part if the item
    head is not trained. What the head and the search find together is measured in the test part, with the weight that `settle` chose.
    With a model that has transitions, the head is measured alone and together with them.

    Raises:
      ValueError: the item head is not trained, and the settings write no titles; or the settings have several weights of the guide.
    """
    ranks = asking.predictor.ranks
    written = sizes.generate_users if part == "test" or not ranks else 0
    if not (ranks or written):
        raise ValueError("With loss.catalogue=0 no item head is trained, so titles must be written: set eval.generate_users.")
    found = []
    if ranks and (graph := asking.predictor.transitions):
        alone, both = asking.rank_sums(name, part, limit, graph, (0.0, graph.weight))
        found += [Found(alone.measured()), Found(both.measured(), TOGETHER)]
    elif ranks:
        found.append(Found(asking.rank(name, part, limit).measured()))
    if written:
        found.append(Found(asking.rank_written(name, part, written).measured(), "/generate"))
    if ranks and written and sizes.guide:
        (weight,) = sizes.guide
        guided = asking.rank_written(name, part, written, weight=weight)
        found.append(Found(guided.measured(), "/generate_guided"))
    if ranks and written and sizes.rerank:
        found.append(Found(asking.rank_written(name, part, written, rerank=sizes.rerank).measured(), "/generate_reranked"))
    return found


def settle(asking: Asking, name: str, sizes: ContextualEval) -> ContextualEval:
    """Return the settings with one weight of the item head in beam search: that which ranks best on validation, by NDCG@10.

    Of equals it is the smallest. Everybody has their own history then, so that what the controls ask is asked with the same weight.
    """
    if len(sizes.guide) < 2 or not (asking.predictor.ranks and sizes.generate_users):
        return sizes
    ranked = {
        weight: asking.rank_written(name, "validation", sizes.generate_users, weight=weight).metrics()["ndcg@10"]
        for weight in sorted(sizes.guide)
    }
    best = max(ranked, key=lambda weight: ranked[weight])
    logging.info("%s: the item head guides the writing of titles with weight %g, which ranks best on validation.", name, best)
    return dataclasses.replace(sizes, guide=(best,))


def show(asking: Asking, name: str, users: np.ndarray, ends: np.ndarray) -> list[str]:
    """Return the titles of the items that rank highest, as `recommend` ranks them.

    The item head ranks them, with the transitions if the model has any. Where no head is trained, they are written.
    """
    titles, out = asking.data.timelines.catalogue.titles, [""] * len(users)
    trie = None if asking.predictor.ranks else title_trie(asking.examples[name].template.lines)
    for indices, batch in asking.batches(users, ends):
        if trie is None:
            best = np.argsort(-asking.ranked(name, batch), axis=1, kind="stable")
        else:
            best = asking.choose(name, batch, trie, asking.predictor.beams)
        for index, row in zip(indices, best[:, :SHOWN], strict=False):
            out[index] = "; ".join(titles[item] for item in row)
    return out


def baselines(data: Dataset, config: Config) -> dict[str, Measured]:
    """Return the ranks by popularity, of all time and, where events have times, of the seven days before, and by transitions."""
    found = {"popularity": popularity_ranks(data.timelines, data.split, "test").measured()}
    if "timestamp" in data.timelines.columns:
        found["popularity_7d"] = recent_popularity_ranks(data.timelines, data.split, "test", days=7).measured()
    found["transitions"] = transition_ranks(data.timelines, data.split, "test").measured()
    return found


TASK = PromptTask(settings.NextItem, RANKING, examples, measure, show, check, baselines=baselines, settle=settle)
