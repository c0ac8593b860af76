"""Users as the server has them: events in a store, which are the truth, and states, which are computed when they are needed.

A state is used only with the events and the model that it was computed from: the store compares the user's version and the
model's identity, and the cache in memory does the same with the version that the store has at that moment.
"""

import asyncio
import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from user_llm.data.timelines import hash_key
from user_llm.data.vocabulary import Vocabulary
from user_llm.serve.engine import Engine
from user_llm.serve.store import NOBODY, Event, Store, Version, pack
from user_llm.serving.user import User

MOST_REFUSED = 100  # events of a request that are looked at each for itself
LONGEST_ID = 256  # characters of a user's id, and of an event's key


class Refused(NamedTuple):
    """An event that was not stored.

    Attributes:
      place: the place of the event in the request, from 0.
      reason: what is wrong, as one sentence.
    """

    place: int
    reason: str


class Stored(NamedTuple):
    """What became of the events of a request.

    Attributes:
      stored: the number of events that were stored.
      repeated: the number of events that the users have already.
      unknown: the number of stored or repeated events whose item the model does not know.
      refused: the events that were not stored.
      users: the version of each user who is named.
    """

    stored: int
    repeated: int
    unknown: int
    refused: list[Refused]
    users: dict[str, Version]


@dataclasses.dataclass
class _Readable:
    """Events that a model reads, by user, with the number of those whose item it does not know."""

    events: dict[str, list[Event]] = dataclasses.field(default_factory=dict)
    unknown: int = 0
    refused: list[Refused] = dataclasses.field(default_factory=list)


class Users:
    """The users of a server.

    Args:
      store: what is kept.
      engine: returns the engine that computes states at this moment.
      cached: the number of users whose states are kept in memory.
      encoded: is called whenever a state was computed.
    """

    def __init__(self, store: Store, engine: Callable[[], Engine], cached: int, encoded: Callable[[], None] = lambda: None):
        self.store, self._engine, self._most, self._encoded = store, engine, cached, encoded
        self._deletions = 0  # a state that is computed while one happens is not kept in memory
        self._cache: OrderedDict[str, tuple[str, Version, User]] = OrderedDict()

    async def state(self, user: str) -> tuple[User, Engine]:
        """Return a user by id, and the engine whose model encoded that user.

        A user without events is nobody in particular, and gets what the model has for nobody.

        Raises:
          StoreError: the store failed.
          Busy, Closing: see `Engine`.
        """
        engine, deletions = self._engine(), self._deletions
        model = engine.model
        version = (await asyncio.to_thread(self.store.versions, [user])).get(user, NOBODY)
        if version == NOBODY:
            return model.reader.nobody(), engine
        there = self._cache.get(user)
        if there is not None and there[:2] == (model.identity, version):
            self._cache.move_to_end(user)
            return there[2], engine
        data = (await asyncio.to_thread(self.store.states, [user], model.identity)).get(user)
        found = None if data is None else _read_state(data, user)
        if found is None:
            history = (await asyncio.to_thread(self.store.histories, [user])).get(user)
            if history is None:  # deleted meanwhile
                return model.reader.nobody(), engine
            version = history.version
            read = await asyncio.to_thread(model.reader.unencoded, history.rows, model.keep)
            if user not in read:
                raise ValueError(f"The model does not read the id {user!r} as it is.")
            data = (await engine.encode(read[user])).to_bytes()
            self._encoded()
            await asyncio.to_thread(self.store.keep, model.identity, {user: (version, data)})
            # What is used is what the store keeps, rounded tokens included: an answer does not depend on where it came from.
            found = User.from_bytes(data)
        if deletions == self._deletions:
            self._cache[user] = (model.identity, version, found)
        while len(self._cache) > self._most:
            self._cache.popitem(last=False)
        return found, engine

    async def add(self, rows: Sequence[Any], user: str | None = None, keys: Sequence[str] | None = None) -> Stored:
        """Store events; they are on disk when this returns.

        Args:
          rows: the events, in the columns of the model.
          user: the user of all of them; if it is None, each names its user in the model's column of users.
          keys: a text for each event, by which an event that is sent again is known. If it is not given, an event is known by its
            item and its exact time, as in training.

        Raises:
          ValueError: the numbers of keys and events differ, or the id or a key is of another form.
          StoreError: the store failed; nothing was stored.
        """
        if keys is not None and len(keys) != len(rows):
            raise ValueError(f"{len(keys)} keys for {len(rows)} events: give one for each, or none.")
        for key in keys or ():
            check_id(key, "A key")
        vocabulary = self._engine().model.vocabulary
        read = await asyncio.to_thread(readable, vocabulary, rows, user, keys)
        added = await asyncio.to_thread(self.store.add, read.events) if read.events else {}
        return Stored(
            sum(one.stored for one in added.values()),
            sum(one.repeated for one in added.values()),
            read.unknown,
            read.refused,
            {name: one.version for name, one in added.items()},
        )

    async def delete(self, user: str) -> bool:
        """Delete a user's events and states, and return whether there were any."""
        self._deletions += 1
        self._cache.pop(user, None)
        try:
            return await asyncio.to_thread(self.store.delete, user)
        finally:
            self._deletions += 1
            self._cache.pop(user, None)


def _read_state(data: bytes, user: str) -> User | None:
    """Return the state that a store kept; None, and a line in the log, where it is damaged or another user's."""
    try:
        found = User.from_bytes(data)
    except ValueError as error:
        logging.error("A state of the store cannot be read, and is computed again: %s", error)
        return None
    if found.key != hash_key(user):
        logging.error("A state of the store is of another user, and is computed again.")
        return None
    return found


def check_id(text: Any, what: str) -> str:
    """Return an id.

    Raises:
      ValueError: it is no text, is empty or too long, holds characters that cannot be shown, or cannot be part of a path.
    """
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_ID or not text.isprintable() or text != text.strip():
        raise ValueError(f"{what} is a text of 1 to {LONGEST_ID} printable characters, without spaces around it.")
    if "/" in text or text in (".", ".."):
        raise ValueError(f"{what} is {text!r}, which cannot be part of a path.")
    return text


def readable(vocabulary: Vocabulary, rows: Sequence[Any], user: str | None, keys: Sequence[str] | None) -> _Readable:
    """Return which events the model's rules can read, and why they cannot read the others; see `Users.add`."""
    column, found = vocabulary.fields.user, _Readable()
    there: list[tuple[int, dict[str, Any]]] = []
    for index, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise ValueError("An event is an object of its columns.")
            named = user if row.get(column) is None else row[column]
            if type(named) not in (str, int):
                raise ValueError("A user's id is a text or a whole number.")
            if user is not None and str(named) != user:
                raise ValueError(f"The event is of another user, by its column {column!r}.")
            given = {**row, column: check_id(str(named), "A user's id")}
            pack(given)
            there.append((index, given))
        except ValueError as error:
            found.refused.append(Refused(index, str(error)))
    _read(vocabulary, there, keys, found)
    found.refused.sort()
    return found


def _read(vocabulary: Vocabulary, rows: list[tuple[int, dict]], keys: Sequence[str] | None, found: _Readable) -> None:
    """Read rows with their places; where some cannot be read, each half is read alone, until these are found."""
    if not rows:
        return
    if len(found.refused) > MOST_REFUSED:
        found.refused += [Refused(place, f"Not read, after {MOST_REFUSED} events that cannot be.") for place, _ in rows]
        return
    try:
        batches = list(vocabulary.batches([row for _, row in rows]))
    except ValueError as error:
        if len(rows) == 1:
            reason = str(error).removeprefix("The list of events, row 1").lstrip(":, ")
            found.refused.append(Refused(rows[0][0], reason[:1].upper() + reason[1:]))
            return
        half = len(rows) // 2
        _read(vocabulary, rows[:half], keys, found)
        _read(vocabulary, rows[half:], keys, found)
        return
    facts = [fact for batch in batches for fact in zip(*(batch[name].to_pylist() for name in FACTS), strict=True)]
    for (index, row), (user, item, whole, fraction) in zip(rows, facts, strict=True):
        if user != row[vocabulary.fields.user]:
            found.refused.append(Refused(index, f"The user's id is read as {user!r}."))
            continue
        key = _key(item, whole, fraction) if keys is None else keys[index]
        found.events.setdefault(user, []).append(Event(key, row))
        found.unknown += not vocabulary.knows(item)


FACTS = ("user", "item", "whole", "fraction")


def _key(item: str, whole: int, fraction: int) -> str:
    """Return the key of an event that was given without one."""
    return hashlib.sha256(f"{whole}.{fraction} {item}".encode()).hexdigest()[:32]
