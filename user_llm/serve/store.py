"""What the server keeps of users and items: the events, which are the truth, and the states that a model computed from them.

A user exists from their first event until they are deleted. A `Store` is safe to use from several threads, and several server
processes may use the same one at the same time.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

FORMS = "sqlite:FILE, redis://HOST[:PORT][/DB], rediss://HOST[:PORT][/DB] or unix:///SOCKET[?db=DB]"


class StoreError(OSError):
    """The store cannot be reached, read or written. The message is one sentence that may be shown to operators."""


class Event(NamedTuple):
    """An event of a user.

    Attributes:
      key: the key tells the event from the other events of its user, so that an event that is sent again is stored once.
      row: the event as a JSON object, in the columns of the model's training data.
    """

    key: str
    row: Mapping[str, Any]


class Version(NamedTuple):
    """The version of a user's history: two histories of the same user and version are the same.

    Attributes:
      epoch: a random number of 63 bits that is drawn with the user's first event. A user who was deleted and comes back
        therefore has another epoch.
      events: the number of events.
    """

    epoch: int
    events: int


UNLIMITED = 1 << 53  # events of a user; the largest whole number that Redis's scripts count exactly
NOBODY = Version(0, 0)  # the version of a user who does not exist


class Added(NamedTuple):
    """The result of adding events of one user.

    Attributes:
      stored: the number of events that were stored.
      repeated: the number of events that were not stored, because the user had an event of the same key.
      beyond: the places, among the events that were given, of those that were not stored because the user had the most events.
      version: the user's version afterwards.
    """

    stored: int
    repeated: int
    beyond: list[int]
    version: Version


class History(NamedTuple):
    """The events of one user.

    Attributes:
      version: the user's version, which belongs to exactly these rows.
      rows: the rows of the events, in the order in which they were stored.
    """

    version: Version
    rows: list[dict[str, Any]]


class Counts(NamedTuple):
    """The numbers of users, of their events, and of the states that are kept."""

    users: int
    events: int
    states: int


class Store(Protocol):
    """Users' events and states, and items. Every method raises `StoreError` if the store fails."""

    def add(self, events: Mapping[str, Sequence[Event]], most: int = UNLIMITED) -> dict[str, Added]:
        """Store events by user, all in one transaction; they are on disk when the call returns.

        Stored events stay until their user is deleted. States of users who get further events are removed.

        Args:
          most: events of one user. A user who has so many gets no more of them.

        Raises:
          ValueError: a row cannot be written as JSON; nothing is stored then.
        """

    def histories(self, users: Sequence[str]) -> dict[str, History]:
        """Return the histories of the users who exist."""

    def versions(self, users: Sequence[str]) -> dict[str, Version]:
        """Return the versions of the users who exist."""

    def states(self, users: Sequence[str], model: str) -> dict[str, bytes]:
        """Return the states that the model of this identity computed from the users' present versions, where they are kept."""

    def keep(self, model: str, states: Mapping[str, tuple[Version, bytes]]) -> int:
        """Keep states, each only if its user still has the version that it was computed from; return how many were kept.

        A user has at most one state: a later one takes the place of an earlier one, whichever models computed them.
        """

    def delete(self, user: str) -> bool:
        """Delete a user's events and states; return whether the user existed. Each store says what is left of them, and where."""

    def add_items(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store items behind those that are there, in one transaction; they are on disk when the call returns.

        A row is a JSON object with the item's `id`. An item that is there stays as it is, and where it is.

        Raises:
          ValueError: a row has no text as `id`, or cannot be written as JSON; nothing is stored then.
        """

    def items(self, first: int = 0) -> list[dict[str, Any]]:
        """Return the rows of the items in the order in which they were stored, from place `first` on, counted from 0."""

    def counts(self) -> Counts:
        """Return how much the store holds. The numbers are maintained, so that the call takes no longer with more users."""

    def ping(self) -> None:
        """Raise a `StoreError` if the store cannot be reached."""

    def close(self) -> None:
        """Close all connections. The store can no longer be used."""


def open_store(url: str) -> Store:
    """Open the store that a URL names: `sqlite:users.db`, `sqlite:/folder/users.db` or `redis://localhost:6379/0`.

    A SQLite file is created if it is missing. A message never shows a Redis URL whole, because it may hold a password.

    Raises:
      ValueError: the URL is of no known form, or the file cannot be used as a store.
      StoreError: Redis cannot be reached.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite":
        from user_llm.serve.sqlite import SQLiteStore

        return SQLiteStore(rest)
    if scheme in ("redis", "rediss", "unix"):
        try:
            from user_llm.serve.redis import RedisStore
        except ModuleNotFoundError:
            raise ValueError("A store in Redis needs the extra `redis`: pip install 'user_llm[redis]'.") from None
        return RedisStore(url)
    raise ValueError(f"The store is not of a known form: name it as {FORMS}.")


def text_bytes(text: str) -> bytes:
    """Return an id or a key as bytes. Any text is allowed, halves of surrogate pairs included, which JSON may hold."""
    return text.encode("utf-8", "surrogatepass")


def bytes_text(data: bytes) -> str:
    """Return the text whose `text_bytes` are given."""
    return data.decode("utf-8", "surrogatepass")


def pack(row: Mapping[str, Any]) -> bytes:
    """Return a JSON object as compact bytes.

    Raises:
      ValueError: the row holds what JSON cannot express, such as NaN.
    """
    try:
        return text_bytes(json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"A row cannot be written as JSON: {error}.") from None


def unpack(rows: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the JSON objects whose `pack` are given. They are parsed as one list, which is several times as fast as one by one."""
    return json.loads(bytes_text(b"[" + b",".join(rows) + b"]"))


def pack_items(rows: Sequence[Mapping[str, Any]]) -> dict[bytes, bytes]:
    """Return the packed rows of items by the bytes of their ids; the first row of an id counts.

    Raises:
      ValueError: a row has no text as `id`, or cannot be written as JSON.
    """
    for row in rows:
        if not isinstance(row.get("id"), str):
            raise ValueError("An item needs a text as its `id`.")
    found: dict[bytes, bytes] = {}
    for row in rows:
        found.setdefault(text_bytes(row["id"]), pack(row))
    return found
