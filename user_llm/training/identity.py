"""The identity of a phase: what it depends on by name, and all of that in one hash.

Every phase of a run keeps its identity in `identity.json` beside its parameters. Two phases of equal identity have the same parameters
and results, up to the rounding of other devices, so that one can stand in for the other. What differs between two identities can be
said by name. `config/inputs.py` and `phases/identities.py` say what a phase depends on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from user_llm.common.files import write_json
from user_llm.common.records import read_json, text

FILE = "identity.json"
FORM = {"identity": text, "inputs": {}, "settings": {}, "built_on": {}}
SHOWN = 3  # differences that a sentence names; more are counted


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a phase depends on, and nothing else.

    Attributes:
      inputs: the SHA-256 of every file that it reads, by names such as `data/ratings.csv`.
      settings: JSON values by their keys in the config.
      built_on: the hashes of the identities, as they were trained, of the phases whose parameters it starts from, by their names.
      first: the hash of the identity by which its parameters were trained, where only settings of the test have changed since. It is no
        part of the identity: what starts from the parameters depends on them, and not on how they were measured.
    """

    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    built_on: Mapping[str, str] = dataclasses.field(default_factory=dict)
    first: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        # As it is read back: tuples are lists in JSON.
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))

    @property
    def hash(self) -> str:
        """Twelve hex digits."""
        return hashlib.sha256(json.dumps(self._parts(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def trained(self) -> str:
        """The hash of the identity by which the parameters were trained."""
        return self.first or self.hash

    def _parts(self) -> dict[str, dict[str, Any]]:
        return {"inputs": dict(self.inputs), "settings": dict(self.settings), "built_on": dict(self.built_on)}

    def write(self, directory: epath.Path, **facts: Any) -> None:
        """Write identity.json, with further facts for its readers, by the first process alone."""
        first = {"first": self.first} if self.first else {}
        write_json(directory / FILE, {"identity": self.hash, **first, **facts, **self._parts()})


def read_identity(directory: epath.Path) -> Identity | None:
    """Return the identity of what a directory holds; None if the directory does not say.

    Raises:
      ValueError: a damaged file.
    """
    path = directory / FILE
    if not path.exists():
        return None
    facts = read_json(path, FORM, f"delete {directory} and run the same command")
    identity = Identity(facts["inputs"], facts["settings"], facts["built_on"], str(facts.get("first", "")))
    if identity.hash != facts["identity"]:
        raise ValueError(f"{path} was changed by hand: its parts are not those of identity {facts['identity']}.")
    return identity


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `key: value before -> value now` of every setting that differs."""
    differ = [
        key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key) or (key in before) != (key in now)
    ]
    show = lambda settings, key: _short(settings[key]) if key in settings else "unset"  # noqa: E731
    return [f"{key}: {show(before, key)} -> {show(now, key)}" for key in differ]


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what became of every file that differs."""
    words = {True: "changed", False: "is gone"}
    gone = [f"{name} {words[name in now]}" for name in before if before[name] != now.get(name)]
    return gone + [f"{name} is new" for name in now if name not in before]


def changed_phases(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return every phase underneath that differs."""
    return [f"{name} below it is another" for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]


def listed(differences: Sequence[str]) -> str:
    """Return the first few differences, and how many more there are."""
    more = len(differences) - SHOWN
    return ", ".join([*differences[:SHOWN], *([f"{more} more"] if more > 0 else [])])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
