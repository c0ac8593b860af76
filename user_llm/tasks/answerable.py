"""Can each task of a phase be asked and measured? What would end an evaluation is refused before training."""

import numpy as np
from ml_collections import ConfigDict

from user_llm.common.errors import naming
from user_llm.data.prompts.base import Examples
from user_llm.data.prompts.favorite import FavoriteExamples
from user_llm.data.prompts.next_item import NextItemExamples
from user_llm.data.prompts.review import ReviewExamples
from user_llm.evals.ranking import Ranks
from user_llm.evals.rouge import ROUGES
from user_llm.models.trie import Trie

# The names of the metrics of a ranking, whatever is ranked.
RANKING = tuple(Ranks(np.zeros(1, int), np.zeros(1, int), np.ones(1), np.ones(1)).metrics())
METRICS = {"next_item": RANKING, "favorite": ("accuracy",), "favorite_future": ("accuracy",), "review": ROUGES}


def check_answers(task: str, asked: Examples, settings: ConfigDict, *, monitored: bool) -> None:
    """See that a task has whom to ask, that its prompts have room, and that its answers can be told apart.

    Args:
      settings: the phase's section `eval`.
      monitored: whether the task is measured on validation too.

    Raises:
      ValueError: what is wrong, beginning with the key of the task.
    """
    with naming(f"prompts.{task}"):
        if isinstance(asked, NextItemExamples) and settings.generate_users:
            Trie.build(asked.template.lines.titles_as_targets())
        if isinstance(asked, FavoriteExamples):
            Trie.build(asked.names)
        if isinstance(asked, FavoriteExamples | ReviewExamples):
            asked.check_room()
        if isinstance(asked, ReviewExamples) and not asked.trains():
            raise ValueError("nobody wrote anything in training: set its weight to 0 to leave the task out.")
        for part in ("validation", "test") if monitored else ("test",):
            if not len(asked.targets(part)[0]):
                raise ValueError(f"no user of the {part} part has what it asks for: set its weight to 0 to leave the task out.")
