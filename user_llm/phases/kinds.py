"""`Kinds`: the datasets, tasks, encoders and LLM families that a config may name, those of the package and those of a caller."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from user_llm.config.check import check
from user_llm.config.phases import PretrainEncoder
from user_llm.config.reader import Config, read_options
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
    """All names that a config may use.

    Attributes:
      datasets: the caller's datasets: what finds each, by what `data.source` calls it.
      tasks: the tasks of the LLM, by what `prompts` calls them: the package's and the caller's.
      encoders: the caller's encoders: dataclasses that satisfy `EncoderConfig`, by what `encoder.kind` calls them.
      families: the families of open LLMs, by what config.json calls their `model_type`: the package's and the caller's.
    """

    datasets: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, PromptTask] = dataclasses.field(default_factory=lambda: TASKS)
    encoders: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    families: Mapping[str, Family] = dataclasses.field(default_factory=lambda: FAMILIES)

    @classmethod
    def of(
        cls,
        datasets: Mapping[str, Source],
        tasks: Mapping[str, PromptTask],
        encoders: Mapping[str, Any],
        families: Mapping[str, Family],
    ) -> "Kinds":
        """Return the names of the package and those of a caller.

        Raises:
          ValueError: a name that the package has itself, or what is none of its kind.
        """
        given: dict[str, tuple[Any, Collection[str], Callable[[Any], bool], str]] = {
            "datasets": (datasets, SOURCES, callable, "a function that returns a Raw"),
            "tasks": (tasks, (*TASKS, "max_title_tokens"), lambda one: isinstance(one, PromptTask), "a PromptTask"),
            "encoders": (encoders, ENCODERS, lambda one: hasattr(one, "kind") and hasattr(one, "build"), "an EncoderConfig"),
            "families": (families, tuple(FAMILIES), lambda one: isinstance(one, Family), "a Family"),
        }
        for argument, (names, own, fits, what) in given.items():
            if not isinstance(names, Mapping):
                raise ValueError(f"{argument} must be a dict of names, not a {type(names).__name__}.")
            for name, one in names.items():
                if name in own:
                    raise ValueError(f"{argument} has {name!r}, which the package has itself: choose another name.")
                if not fits(one):
                    raise ValueError(f"{argument} has {name!r}, which must be {what}, not a {type(one).__name__}.")
        for name, encoder in encoders.items():
            if encoder.kind != name:
                raise ValueError(f"encoders has {name!r}, whose own kind is {encoder.kind!r}: give it by that name.")
        return cls(datasets, {**TASKS, **tasks}, encoders, {**FAMILIES, **families})

    def read(self, config: Mapping[str, Any] | ConfigDict) -> Config:
        """Return a config, typed and checked.

        Raises:
          ValueError: the first key that is wrong; see `config.check.check`.
        """
        if not isinstance(config, Mapping | ConfigDict):
            raise ValueError(f"A config is what `get_config` of a config file returns, not a {type(config).__name__}.")
        read = check(
            config,
            tasks={name: task.settings for name, task in self.tasks.items()},
            sources=(*SOURCES, *self.datasets),
            encoders=(*ENCODERS, *self.encoders),
        )
        for section in (
            read.encoder,
            *(read.encoder_of(name) for name, phase in read.sections.items() if isinstance(phase, PretrainEncoder)),
        ):
            if section.kind in self.encoders:
                read_options(self.encoders[section.kind], section.options, "encoder.options")
        return read
