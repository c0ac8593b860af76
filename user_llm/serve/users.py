"""Users as the server has them: events in a store, which are the truth. What is computed from them is in states.py."""

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from user_llm.data.vocabulary import Vocabulary
from user_llm.serve.limits import Limits
from user_llm.serve.states import States
from user_llm.serve.store import Event, Store, Version, pack

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
      unknown: the number of events that can be read and whose item the model does not know.
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
    """Events that a model reads, by user, with their places in the request and the number of those whose item it does not know."""

    events: dict[str, list[Event]] = dataclasses.field(default_factory=dict)
    places: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    unknown: int = 0
    refused: list[Refused] = dataclasses.field(default_factory=list)


class Users:
    """The users of a server.

    Args:
      store: what is kept.
      states: what is computed from it.
      vocabulary: returns the rules by which events are read at this moment.
      limits: see `Limits`.
    """

    def __init__(self, store: Store, states: States, vocabulary: Callable[[], Vocabulary], limits: Limits):
        self._store, self._states, self._vocabulary, self._limits = store, states, vocabulary, limits

    async def add(self, rows: Sequence[Any], user: str | None = None, keys: Sequence[str] | None = None) -> Stored:
        """Store events; they are on disk when this returns. Events beyond the most of a user are refused.

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
        read = await asyncio.to_thread(readable, self._vocabulary(), rows, user, keys, self._limits.event_bytes)
        most = self._limits.user_events
        added = await asyncio.to_thread(self._store.add, read.events, most) if read.events else {}
        beyond = [read.places[name][place] for name, one in added.items() for place in one.beyond]
        full = f"A user has at most {most} events: delete the user to begin again, or start the server with a larger --user_events."
        return Stored(
            sum(one.stored for one in added.values()),
            sum(one.repeated for one in added.values()),
            read.unknown,
            sorted([*read.refused, *(Refused(place, full) for place in beyond)]),
            {name: one.version for name, one in added.items()},
        )

    async def delete(self, user: str) -> bool:
        """Delete a user's events and states, and return whether there were any. What has begun ends even where nobody waits for it."""
        return await asyncio.shield(self._deleted(user))

    async def _deleted(self, user: str) -> bool:
        self._states.forget(user)
        try:
            return await asyncio.to_thread(self._store.delete, user)
        finally:
            self._states.forget(user)


def check_id(text: Any, what: str) -> str:
    """Return an id.

    Raises:
      ValueError: it is no text, is empty or too long, holds characters that cannot be shown or were no UTF-8, or cannot be part of a path.
    """
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_ID or not text.isprintable() or text != text.strip():
        raise ValueError(f"{what} is a text of 1 to {LONGEST_ID} printable characters, without spaces around it.")
    if "\ufffd" in text:
        raise ValueError(f"{what} holds U+FFFD, which stands for bytes that are not UTF-8.")
    if "/" in text or text in (".", ".."):
        raise ValueError(f"{what} is {text!r}, which cannot be part of a path.")
    return text


def readable(
    vocabulary: Vocabulary, rows: Sequence[Any], user: str | None, keys: Sequence[str] | None, most_bytes: int
) -> _Readable:
    """Return which events the model's rules can read, and why they cannot read the others; see `Users.add`.

    Args:
      most_bytes: the most bytes of an event as JSON.
    """
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
            if (size := len(pack(given))) > most_bytes:
                raise ValueError(f"The event has {size} bytes, more than {most_bytes}: leave out what the model does not read.")
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
        found.places.setdefault(user, []).append(index)
        found.unknown += not vocabulary.knows(item)


FACTS = ("user", "item", "whole", "fraction")


def _key(item: str, whole: int, fraction: int) -> str:
    """Return the key of an event that was given without one."""
    return hashlib.sha256(f"{whole}.{fraction} {item}".encode()).hexdigest()[:32]
