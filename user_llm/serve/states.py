"""Users' states: what a model computed from their events. This is the one place that computes, keeps and forgets them.

A state is used only with the events and the model that it was computed from. The store compares the user's version and the
model's identity; the cache in memory does the same with the version that the store has at that moment.

A user has one owner at a time, who fetches the state for all requests that want it. Requests of the same moment therefore compute
it once, and no request replaces a later state by an earlier one. A deletion takes the owner away: what is still being computed
then is not kept in memory, and the store does not keep it either.
"""

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from absl import logging

from user_llm.data.timelines import hash_key
from user_llm.serve.engine import Engine
from user_llm.serve.store import NOBODY, Store, Version
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.user import User


class States:
    """The states of a server's users.

    Args:
      store: where events are, and where states are kept.
      engine: returns the engine that computes states at this moment.
      cached: the number of users whose states are kept in memory.
      encoded: is called whenever a state was computed.
      current: is awaited before a user is looked for: it lets the model have the items of the store.
    """

    def __init__(
        self,
        store: Store,
        engine: Callable[[], Engine],
        cached: int,
        encoded: Callable[[], None] = lambda: None,
        current: Callable[[], Awaitable[None]] | None = None,
    ):
        self._current = current
        self._store, self._engine, self._most, self._encoded = store, engine, cached, encoded
        self._cache: OrderedDict[str, tuple[str, Version, User]] = OrderedDict()
        self._owners: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def of(self, user: str) -> tuple[User, Engine]:
        """Return a user by id, and the engine whose model encoded that user.

        A user without events is nobody in particular, and gets what the model has for nobody.

        Raises:
          StoreError: the store failed.
          Busy, Closing: see `Engine`.
        """
        if self._current is not None:
            await self._current()
        engine = self._engine()
        version = await self._version(user)
        found = self._cached(user, engine, version)
        if found is None:
            owner = self._owners.setdefault(user, asyncio.Lock())
            async with owner:
                version = await self._version(
                    user
                )  # another request may have computed the state meanwhile, or events have come
                found = self._cached(user, engine, version)
                if found is None:
                    version, found = await self._fetch(user, engine, version)
                    if version != NOBODY and self._owners.get(user) is owner:
                        self._remember(user, (engine.model.identity, version, found))
        return found, engine

    def forget(self, user: str) -> None:
        """Drop a user's state from memory, and let what is being computed of the user not come there.

        This is called before and after the user is deleted from the store.
        """
        self._owners.pop(user, None)
        self._cache.pop(user, None)

    async def _version(self, user: str) -> Version:
        return (await asyncio.to_thread(self._store.versions, [user])).get(user, NOBODY)

    def _cached(self, user: str, engine: Engine, version: Version) -> User | None:
        """Return the state of a model and a version, if it is in memory."""
        if version == NOBODY:
            return engine.model.reader.nobody()
        there = self._cache.get(user)
        if there is None or there[:2] != (engine.model.identity, version) or not _fits(there[2], engine.model):
            return None
        self._cache.move_to_end(user)
        return there[2]

    async def _fetch(self, user: str, engine: Engine, version: Version) -> tuple[Version, User]:
        """Return a state from the store, or compute it and keep it there; and the version that it belongs to."""
        model = engine.model
        data = (await asyncio.to_thread(self._store.states, [user], model.identity)).get(user)
        found = None if data is None else _read(data, user)
        if found is None or not _fits(found, model):
            history = (await asyncio.to_thread(self._store.histories, [user])).get(user)
            if history is None:  # deleted meanwhile
                return NOBODY, model.reader.nobody()
            version = history.version
            read = await asyncio.to_thread(model.reader.unencoded, history.rows, model.keep)
            if user not in read:
                raise ValueError(f"The model does not read the id {user!r} as it is.")
            data = (await engine.encode(read[user])).to_bytes()
            self._encoded()
            await asyncio.to_thread(self._store.keep, model.identity, {user: (version, data)})
            # What is used is what the store keeps, rounded tokens included: an answer does not depend on where it came from.
            found = User.from_bytes(data)
        return version, found

    def _remember(self, user: str, state: tuple[str, Version, User]) -> None:
        self._cache[user] = state
        self._cache.move_to_end(user)
        while len(self._cache) > self._most:
            self._cache.popitem(last=False)


def _fits(user: User, model: Personalizer) -> bool:
    """Return whether a model would compute the same state.

    After items were added, it would unless the user has events with unknown items: some of them may be known now.
    """
    return user.added == model.mark or (user.added in model.marks and not user.unknown)


def _read(data: bytes, user: str) -> User | None:
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
