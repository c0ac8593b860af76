"""From a config to its records, one key at a time; the first that does not fit is named."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from ml_collections import ConfigDict

from user_llm.config.phases import PHASES, Phase
from user_llm.config.records import Run
from user_llm.config.values import CHANGES

R = TypeVar("R")

# Programs hold whole numbers in 32 bits.
LARGEST = 2**31 - 1
TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def read_config(config: Mapping[str, Any]) -> tuple[Run, dict[str, Phase]]:
    """Return the records of a config: of the run, and of each phase by its name.

    Raises:
      ValueError: see `check`.
    """
    sections = {name: value for name, value in config.items() if isinstance(value, Mapping | ConfigDict) and "task" in value}
    run = _read(Run, {name: value for name, value in config.items() if name not in sections}, "")
    phases = {}
    # Phases that follow another come after it: what is wrong with both is wrong with that one.
    for name, section in sorted(sections.items(), key=lambda pair: "like" in pair[1]):
        if section["task"] not in PHASES:
            raise fault(f"{name}.task", section["task"], f"choose {either(list(PHASES))}{near_miss(section['task'], PHASES)}")
        phases[name] = _read(PHASES[section["task"]], section, name)
    return run, phases


def read_record(record: type[R], value: Any, key: str) -> R:
    """Return a record as its annotations read it, of a section that anybody may have written.

    Args:
      key: of the section, for messages.

    Raises:
      ValueError: the first key that does not fit, named.
    """
    return _read(record, value, key)


def _read(annotation: object, value: Any, key: str) -> Any:
    """Return a value as its annotation reads it: sections as records, lists as tuples."""
    hint: Any = annotation
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, *marks = parts
        if marks[0] == CHANGES:
            return _read_section(marks[1], value, key, partial=True)
        read = _read(base, value, key)
        for must in marks:
            if not must.holds(read):
                raise fault(key, value, f"it must be {must.words}")
        return read
    if type(None) in parts and (rest := _without_none(parts)) in TYPES:
        return None if value is None else _read(rest, value, key)
    if dataclasses.is_dataclass(annotation):
        return hint(**_read_section(hint, value, key))
    if origin is tuple:
        return _read_tuple(parts, value, key)
    if origin is dict:
        return {name: _read(parts[1], entry, f"{key}.{name}") for name, entry in _mapping(value, key).items()}
    if hint is Any:
        return value
    if hint in TYPES:
        return _read_plain(hint, value, key)
    return _read_choice(hint, value, key)


def _without_none(parts: tuple) -> Any:
    """Return what a value is that may be None; None where it is one of several."""
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


def _read_choice(hint: Any, value: Any, key: str) -> Any:
    """Return a value that is one of several: a literal, None, or a record where None stands for its absence."""
    options = [option for part in (typing.get_args(hint) or (hint,)) for option in (typing.get_args(part) or (part,))]
    records = [option for option in options if dataclasses.is_dataclass(option)]
    if records and value is not None:
        return _read(records[0], value, key)
    choices = [None if option is type(None) else option for option in options]
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise fault(key, value, f"choose {either(choices)}{near_miss(value, choices)}")
    return value


def _read_tuple(parts: tuple, value: Any, key: str) -> tuple:
    many = parts[-1] is Ellipsis
    if not isinstance(value, tuple | list):
        raise fault(key, value, "it must be a tuple, written as ('a', 'b'), or ('a',) for one")
    if not many and len(value) != len(parts):
        raise fault(key, value, f"it must have {len(parts)} entries")
    hints = parts[:1] * len(value) if many else parts
    return tuple(_read(hint, entry, f"{key}[{number}]") for number, (hint, entry) in enumerate(zip(hints, value, strict=True)))


def _read_section(record: Any, value: Any, key: str, *, partial: bool = False) -> dict[str, Any]:
    """Return the fields of a section; `partial`, sections in it too, need not have all of them."""
    section, hints = _mapping(value, key), typing.get_type_hints(record, include_extras=True)
    dotted = lambda name: f"{key}.{name}" if key else name  # noqa: E731
    for name in section:
        if name not in hints:
            raise ValueError(f"The config has no key {dotted(name)}{near_miss(name, hints)}.")
    for field in dataclasses.fields(record):
        if field.name not in section and field.default is dataclasses.MISSING and not partial:
            raise ValueError(f"The config lacks the key {dotted(field.name)}.")
    return {
        name: _read_section(hints[name], entry, dotted(name), partial=True)
        if partial and dataclasses.is_dataclass(hints[name])
        else _read(hints[name], entry, dotted(name))
        for name, entry in section.items()
    }


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
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def near_miss(value: Any, choices: Any) -> str:
    """Return a question for what was probably meant."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
    return f" (did you mean {near[0]}?)" if near else ""
