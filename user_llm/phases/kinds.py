"""`Kinds`: the datasets, tasks, encoders and LLM families that a config may name, those of the package and those of a caller."""

import dataclasses
from collections.abc import Mapping

from user_llm.config.check import check
from user_llm.config.reader import Config
from user_llm.config.values import ENCODERS, SOURCES
from user_llm.data.dataset import Source
from user_llm.tasks import favorite, next_item, review
from user_llm.tasks.task import PromptTask

TASKS = {
    "next_item": next_item.TASK,
    "favorite": favorite.OF_HISTORY,
    "favorite_future": favorite.OF_FUTURE,
    "review": review.TASK,
}


@dataclasses.dataclass(frozen=True)
class Kinds:
    """What a config may name besides what the package itself has.

    Attributes:
      datasets: finds a dataset, by what `data.source` calls it.
      tasks: the tasks of the LLM, by what `prompts` calls them; those of the package among them.
    """

    datasets: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, PromptTask] = dataclasses.field(default_factory=lambda: TASKS)

    def read(self, config) -> Config:
        """Return a config, typed and checked.

        Raises:
          ValueError: the first key that is wrong; see `config.check.check`.
        """
        return check(
            config,
            tasks={name: task.settings for name, task in self.tasks.items()},
            sources=(*SOURCES, *self.datasets),
            encoders=ENCODERS,
        )
