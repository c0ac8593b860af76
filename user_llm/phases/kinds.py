"""`Kinds`: the datasets, tasks, encoders and LLM families that a config may name, those of the package and those of a caller."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from user_llm.config.check import check
from user_llm.config.reader import Config
from user_llm.config.values import ENCODERS, SOURCES
from user_llm.data.dataset import Source
from user_llm.models.families import FAMILIES, Family
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
      encoders: dataclasses that satisfy `EncoderConfig`, by what `encoder.kind` calls them, which is their own `kind`.
      families: the families of open LLMs, by what config.json calls their `model_type`; those of the package among them.

    Raises:
      ValueError: a name that the package itself has, or an encoder that goes by another name.
    """

    datasets: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, PromptTask] = dataclasses.field(default_factory=lambda: TASKS)
    encoders: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    families: Mapping[str, Family] = dataclasses.field(default_factory=lambda: FAMILIES)

    def __post_init__(self) -> None:
        for kind, names, own in (("datasets", self.datasets, SOURCES), ("encoders", self.encoders, ENCODERS)):
            if taken := sorted(set(names) & set(own)):
                raise ValueError(f"{kind} has {taken[0]!r}, which the package has itself: choose another name.")
        for name, encoder in self.encoders.items():
            if encoder.kind != name:
                raise ValueError(f"encoders has {name!r}, whose own kind is {encoder.kind!r}: give it by that name.")

    def read(self, config: ConfigDict) -> Config:
        """Return a config, typed and checked.

        Raises:
          ValueError: the first key that is wrong; see `config.check.check`.
        """
        return check(
            config,
            tasks={name: task.settings for name, task in self.tasks.items()},
            sources=(*SOURCES, *self.datasets),
            encoders=(*ENCODERS, *self.encoders),
        )
