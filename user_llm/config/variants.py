"""Variants: phases that a config describes by what they change of another one. They exist in a run that names them."""

import copy
from collections.abc import Mapping
from typing import Any


def with_variants(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with a section for each variant that its `phases` name, and for each that these start from.

    The section of a variant is a copy of the phase that it is like, with all flags of the command line applied, and then changed.
    A section that is there already stays.
    """
    found = dict(config)
    phases, variants = config.get("phases", ()), config.get("variants", {})
    if isinstance(phases, tuple | list) and isinstance(variants, Mapping):
        for name in phases:
            _add(found, variants, name, ())
    return found


def _add(config: dict[str, Any], variants: Mapping[str, Any], name: Any, above: tuple[str, ...]) -> None:
    """Add the section of a variant and of those that it needs; `above` are the variants that need it."""
    if not isinstance(name, str) or name in above:
        return
    if name not in config and name in variants:
        variant = variants[name]
        if not isinstance(variant, Mapping) or not isinstance(variant.get("changes"), Mapping):
            return  # reading says what is wrong with it
        _add(config, variants, variant.get("like"), (*above, name))
        like = config.get(str(variant.get("like")))
        if isinstance(like, Mapping):
            config[name] = changed(like, variant["changes"])
    section = config.get(name)
    if isinstance(section, Mapping):
        rules = section.get("load", ())
        sources = [rule[1] for rule in rules if isinstance(rule, tuple | list) and len(rule) == 2]
        for source in (section.get("encoder"), *sources):
            _add(config, variants, source, (*above, name))


def changed(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a section with some keys changed, those of its sections too."""
    found = copy.deepcopy(dict(section))
    for key, value in changes.items():
        inner = found.get(key)
        found[key] = changed(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes whose keys are dotted, such as `resampler.kind`, as sections."""
    found: dict[str, Any] = {}
    for path, value in changes.items():
        *sections, key = path.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return found
