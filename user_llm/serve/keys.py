"""API keys: who may read, and who may write. The file holds hashes, so that who reads the file cannot use the keys.

    # name  scopes      SHA-256 of the key
    app     read,write  9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08

`read` is for texts, recommendations and looking at users. `write` is for storing and deleting events. `items` is for
adding items, which are recommended to everybody and cannot be removed.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

SCOPES = ("read", "write", "items")


class Key(NamedTuple):
    """The holder of a key.

    Attributes:
      name: for the log.
      scopes: what the holder may do, some of `SCOPES`.
    """

    name: str
    scopes: frozenset[str]


class Keys:
    """The keys of a file.

    Args:
      by_hash: the holders, by the hash of their keys.
    """

    def __init__(self, by_hash: Mapping[str, Key]):
        self._by_hash = dict(by_hash)

    def __len__(self) -> int:
        return len(self._by_hash)

    def holder(self, key: str) -> Key | None:
        """Return the holder of a key; None if nobody has it.

        The key is looked up by its hash. How long that takes says nothing about the keys of others.
        """
        return self._by_hash.get(_hash(key))


def read_keys(file: str | os.PathLike) -> Keys:
    """Read a file of keys.

    Raises:
      ValueError: there is no such file, a line is of another form, or there is no key in it.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The keys cannot be read from {file}: {error}.") from None
    found: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, scopes, digest = [*line.split(), "", "", ""][:3]
        given = frozenset(scopes.split(","))
        if len(line.split()) != 3 or not given <= set(SCOPES) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(
                f"{file}, line {number}: a line holds a name, scopes ({','.join(SCOPES)}) and a hash; --new_key writes one."
            )
        found[digest] = Key(name, given)
    if not found:
        raise ValueError(f"{file} holds no key: add one by --new_key=NAME:read,write.")
    return Keys(found)


def add_key(file: str | os.PathLike, spelled: str) -> str:
    """Make a key, append its hash to a file, which is created where it is missing, and return the key.

    Args:
      spelled: the name of the holder and the scopes, such as "app:read,write".

    Raises:
      ValueError: the name or a scope is of another form.
    """
    if not file:
        raise ValueError("--new_key needs --api_keys=FILE, to which the hash of the key is added.")
    name, _, scopes = spelled.partition(":")
    if not re.fullmatch(r"[\w.-]{1,64}", name) or not set(scopes.split(",")) <= set(SCOPES):
        raise ValueError(f"--new_key={spelled}: name a holder and scopes, such as app:read,write.")
    key = f"ul-{secrets.token_urlsafe(32)}"
    begun = Path(file).read_text() if Path(file).exists() else ""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a") as lines:
        lines.write("" if begun.endswith("\n") or not begun else "\n")
        lines.write(f"{name}  {scopes}  {_hash(key)}\n")
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
