"""From a config to its records, one key at a time; the first that does not fit is named. Here alone a `ConfigDict` is read."""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from ml_collections import ConfigDict

from user_llm.config import variants
from user_llm.config.defaults import FROZEN_ENCODER
from user_llm.config.phases import PHASES, TASKS, Contextualize, Phase, PretrainEncoder, Prompts
from user_llm.config.records import Encoder, Shared
from user_llm.config.values import CHANGES, Count

R = TypeVar("R")

# Programs hold whole numbers in 32 bits.
LARGEST = 2**31 - 1
TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """All that a config says, typed.

    Attributes:
      sections: the settings of each phase that the config describes, by the phase's name, whether it runs or not. Variants that
        no phase of the run needs have none.
      said: the same config as plain JSON values; identities and config.json are made of it.
    """

    sections: Mapping[str, Phase]
    said: Mapping[str, Any]

    def but(self, **changes: Mapping[str, Any]) -> "Config":
        """Return the same config with some keys of shared sections changed, such as `data={"source": "synthetic"}`."""
        said = {name: variants.changed(self.said[name], new) for name, new in changes.items()}
        return dataclasses.replace(changed(self, changes), said={**self.said, **said})

    def encoder_of(self, phase: str) -> Encoder:
        """Return the section `encoder` as a phase that pretrains an encoder changes it."""
        pretrains = self.sections[phase]
        assert isinstance(pretrains, PretrainEncoder)
        return changed(self.encoder, pretrains.encoder)

    def contextual(self, phase: str) -> Contextualize:
        """Return the settings of a phase that contextualizes the LLM."""
        section = self.sections[phase]
        assert isinstance(section, Contextualize)
        return section

    def trainable(self, phase: str) -> tuple[tuple[str, bool], ...]:
        """Return the rules that say which parameters a phase trains: those of its strategy, but for a frozen encoder."""
        section = self.sections[phase]
        rules = self.strategies[section.strategy].trainable
        frozen = isinstance(section, Contextualize) and section.encoder_init == "frozen"
        return (FROZEN_ENCODER, *rules) if frozen else rules


def changed(record: Any, changes: Mapping[str, Any]) -> Any:
    """Return a record with some fields, or fields of its records, changed."""
    parts = {
        name: changed(getattr(record, name), new)
        if isinstance(new, dict) and dataclasses.is_dataclass(getattr(record, name))
        else new
        for name, new in changes.items()
    }
    return dataclasses.replace(record, **parts)


def read_config(config: Mapping[str, Any] | ConfigDict, tasks: Mapping[str, type] = TASKS) -> Config:
    """Return the records of a config.

    Args:
      tasks: the settings of each task that prompts may name, by the task's name.

    Raises:
      ValueError: see `check`.
    """
    values = variants.with_variants(
        config.copy_and_resolve_references().to_dict() if isinstance(config, ConfigDict) else dict(config)
    )
    reader = Reader(tasks)
    sections = {name: value for name, value in values.items() if isinstance(value, Mapping) and "task" in value}
    shared = reader.read(Shared, {name: value for name, value in values.items() if name not in sections}, "")
    phases = {}
    for name, section in sections.items():
        if not isinstance(section["task"], str) or section["task"] not in PHASES:
            raise fault(f"{name}.task", section["task"], f"choose {either(list(PHASES))}{near_miss(section['task'], PHASES)}")
        phases[name] = reader.read(PHASES[section["task"]], section, name)
    try:
        said = json.loads(json.dumps(values))
    except TypeError as error:
        raise ValueError(
            f"A value of the config is none that JSON can hold ({error}): give plain numbers and texts."
        ) from error
    return Config(**vars(shared), sections=phases, said=said)


def read_record(record: type[R], value: Any, key: str, instead: Mapping[Any, Any] | None = None) -> R:
    """Return a record as its annotations read it, of a section that anybody may have written.

    Args:
      key: of the section, for messages.
      instead: by a protocol, the dataclass that is read in its place.

    Raises:
      ValueError: the first key that does not fit, named.
    """
    return Reader({}, instead or {}).read(record, value, key)


def read_options(record: type, value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the fields of a record besides its `schema`, as its annotations read them.

    Raises:
      ValueError: the first key that does not fit, or that is missing.
    """
    found = Reader({})._section(record, value, key, partial=True)
    if "schema" in found:
        raise ValueError(f"The config has no key {key}.schema.")
    for field in dataclasses.fields(record):
        if field.name not in found and field.name != "schema" and not _has_default(field):
            raise ValueError(f"The config lacks the key {key}.{field.name}.")
    return found


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads values by annotations.

    Attributes:
      tasks: the settings of each task that a section of `Prompts` may name.
      instead: by a protocol, the dataclass that is read in its place.
    """

    tasks: Mapping[str, type]
    instead: Mapping[Any, Any] = dataclasses.field(default_factory=dict)

    def read(self, annotation: object, value: Any, key: str) -> Any:
        """Return a value as its annotation reads it: sections as records, lists as tuples."""
        hint: Any = annotation
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            base, *marks = parts
            if marks[0] == CHANGES:
                return self._section(marks[1], value, key, partial=True)
            read = self.read(base, value, key)
            for must in marks:
                if not must.holds(read):
                    raise fault(key, value, f"it must be {must.words}")
            return read
        if type(None) in parts and (rest := _without_none(parts)) in TYPES:
            return None if value is None else self.read(rest, value, key)
        if hint is Prompts:
            return self._prompts(value, key)
        if dataclasses.is_dataclass(annotation):
            return hint(**self._section(hint, value, key))
        if origin is tuple:
            return self._tuple(parts, value, key)
        if origin is dict:
            return {name: self.read(parts[1], entry, f"{key}.{name}") for name, entry in _mapping(value, key).items()}
        if hint is Any:
            return value
        if hint in TYPES:
            return _read_plain(hint, value, key)
        return self._choice(hint, value, key)

    def _prompts(self, value: Any, key: str) -> Prompts:
        """Return a section whose keys are `max_title_tokens` and the names of tasks; the tasks come in the order of `tasks`."""
        section = _mapping(value, key)
        for name in section.keys() - {"max_title_tokens"} - self.tasks.keys():
            raise ValueError(f"The config has no key {key}.{name}{near_miss(name, self.tasks)}.")
        if "max_title_tokens" not in section:
            raise ValueError(f"The config lacks the key {key}.max_title_tokens.")
        if len(section) == 1:
            raise ValueError(f"{key} names no task: add one of {', '.join(self.tasks)}.")
        most = self.read(Count, section.pop("max_title_tokens"), f"{key}.max_title_tokens")
        asked = [name for name in self.tasks if name in section]
        return Prompts(most, {name: self.read(self.tasks[name], section[name], f"{key}.{name}") for name in asked})

    def _choice(self, hint: Any, value: Any, key: str) -> Any:
        """Return a value that is one of several: a literal, None, or a record where None stands for its absence."""
        parts = typing.get_args(hint) or (hint,)
        options = [self.instead.get(option, option) for part in parts for option in (typing.get_args(part) or (part,))]
        records = [option for option in options if dataclasses.is_dataclass(option)]
        if records and value is not None:
            return self.read(records[0], value, key)
        choices = [None if option is type(None) else option for option in options]
        if unread := [one for one in choices if isinstance(one, type) and not dataclasses.is_dataclass(one)]:
            raise ValueError(f"{key}: values annotated with {unread[0].__name__} are not read; `config/values.py` has what is.")
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise fault(key, value, f"choose {either(choices)}{near_miss(value, choices)}")
        return value

    def _tuple(self, parts: tuple, value: Any, key: str) -> tuple:
        many = parts[-1] is Ellipsis
        if not isinstance(value, tuple | list):
            raise fault(key, value, "it must be a tuple, written as ('a', 'b'), or ('a',) for one")
        if not many and len(value) != len(parts):
            raise fault(key, value, f"it must have {len(parts)} entries")
        hints = parts[:1] * len(value) if many else parts
        return tuple(
            self.read(hint, entry, f"{key}[{number}]") for number, (hint, entry) in enumerate(zip(hints, value, strict=True))
        )

    def _section(self, record: Any, value: Any, key: str, *, partial: bool = False) -> dict[str, Any]:
        """Return the fields of a section; `partial`, sections in it too, need not have all of them."""
        section, every = _mapping(value, key), typing.get_type_hints(record, include_extras=True)
        hints = {field.name: every[field.name] for field in dataclasses.fields(record)}
        dotted = lambda name: f"{key}.{name}" if key else name  # noqa: E731
        for name in section:
            if name not in hints:
                raise ValueError(f"The config has no key {dotted(name)}{near_miss(name, hints)}.")
        for field in dataclasses.fields(record):
            if field.name not in section and not _has_default(field) and not partial:
                raise ValueError(f"The config lacks the key {dotted(field.name)}.")
        return {
            name: self._section(hints[name], entry, dotted(name), partial=True)
            if partial and dataclasses.is_dataclass(hints[name])
            else self.read(hints[name], entry, dotted(name))
            for name, entry in section.items()
        }


def _without_none(parts: tuple) -> Any:
    """Return X of `X | None`; None where more than one type is left."""
    rest = [part for part in parts if part is not type(None)]
    return rest[0] if len(rest) == 1 else None


def _read_plain(hint: Any, value: Any, key: str) -> Any:
    """Return a number, a truth value or a text. True is no number; a whole number is a number."""
    kind: Any = type(value)
    if kind is not hint and not (hint is float and kind is int):
        raise fault(key, value, f"it must be {TYPES[hint]}")
    if hint is float and not math.isfinite(value):
        raise fault(key, value, "it must be a finite number")
    if hint is int and abs(value) > LARGEST:
        raise fault(key, value, f"it must be a whole number of at most {LARGEST}")
    return value


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping | ConfigDict):
        raise fault(key, value, "it must be a section of keys")
    return dict(value.items())


def fault(key: str, value: Any, why: str) -> ValueError:
    """Return the error that names a key, its value and what is wrong with it."""
    shown = repr(value)
    return ValueError(f"{key}={shown if len(shown) <= 80 else shown[:77] + '...'}: {why}.")


def either(choices: Sequence[Any]) -> str:
    """Return the choices as `a, b or c`."""
    *most, last = (str(choice) or "''" for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last


def near_miss(value: Any, choices: Any) -> str:
    """Return a question for what was probably meant."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
    return f" (did you mean {near[0]}?)" if near else ""
