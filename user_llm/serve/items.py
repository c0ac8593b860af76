"""Items that are added while the server runs: in the store, which keeps their order, and in the model that answers.

The store decides which items there are, and in which order. Each process adds them to its model in that order, so that all server processes
of one store number them alike. A process that did not add an item itself looks into the store before it answers for a user, at most once
every SECONDS.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from user_llm.common.printable import printable
from user_llm.serve.engine import Engine
from user_llm.serve.limits import Limits
from user_llm.serve.store import Store, pack
from user_llm.serve.users import check_id
from user_llm.serving.personalizer import Personalizer

SECONDS = 1.0


class Items:
    """The added items of a server.

    Args:
      store: where they are kept.
      engine: returns the engine that answers at this moment.
      limits: of which `items` and `event_bytes` are used.
    """

    def __init__(self, store: Store, engine: Callable[[], Engine], limits: Limits):
        self._store, self._engine, self._limits = store, engine, limits
        self._turn = asyncio.Lock()
        self._read: tuple[Engine | None, int] = (None, 0)  # the engine, and how many of the store's rows its model has read
        self._looked = 0.0

    async def add(self, rows: Sequence[Any]) -> int:
        """Store items and add them to the model; return how many of them are new. They are on disk when this returns.

        Raises:
          ValueError: as in `Personalizer.add_items`, or an item is too large, or its id is not one that answers may hold. Nothing is stored
            then, unless another process stored one of these items at the same moment as another one.
          StoreError: the store failed.
        """
        async with self._turn:
            await self._catch_up()
            engine = self._engine()
            model = engine.model
            grown = await asyncio.to_thread(model.add_items, rows)
            first = len(model.vocabulary.catalogue.keys)
            fresh = grown.vocabulary.catalogue.keys[first:]
            if fresh:
                stored = self._stored(model, grown, rows, fresh)
                await asyncio.to_thread(engine.compile, grown)  # what no program can be made for is not stored
                await asyncio.to_thread(self._store.add_items, stored)
                await self._catch_up()
                now = self._engine().model
                await asyncio.to_thread(now.add_items, rows)  # another process may have stored others meanwhile
                if not all(map(now.vocabulary.knows, fresh)):
                    raise ValueError("The items are stored, but this model cannot read the items of the store: see the log.")
            return len(fresh)

    def _stored(
        self, model: Personalizer, grown: Personalizer, rows: Sequence[Mapping[str, Any]], fresh: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return what the store keeps of new items: what a model reads of them, and nothing else.

        Raises:
          ValueError: there are too many, one is too large, or its id is not one that answers may hold.
        """
        if len(grown.marks) - 1 > self._limits.items:
            raise ValueError(f"These would be {len(grown.marks) - 1} added items, and at most {self._limits.items} are taken.")
        by_id = {str(row["id"]): _read_by(model, row) for row in reversed(rows)}
        for key in fresh:
            check_id(key, "An item's id")
            if len(pack(by_id[key])) > self._limits.event_bytes:
                raise ValueError(f"The item {key!r} takes more than {self._limits.event_bytes} bytes as JSON: shorten it.")
        return [by_id[key] for key in fresh]

    async def current(self) -> None:
        """Let the model have the items that other processes have stored. While a request adds items, the others go on without them."""
        if self._turn.locked() or self._fresh():
            return
        async with self._turn:
            try:
                await self._catch_up()
            except (RuntimeError, ValueError) as error:  # such as a device without room, or titles of the same tokens
                logging.error("The store's items were not added to the model, which answers without them: %s", printable(error))
                self._read, self._looked = (self._engine(), self._count()), time.monotonic()

    def _fresh(self) -> bool:
        """Return whether the model has what was in the store less than SECONDS ago."""
        return time.monotonic() - self._looked < SECONDS and self._read[0] is self._engine()

    def _count(self) -> int:
        """Return how many of the store's rows the model of the present engine has read."""
        return self._read[1] if self._read[0] is self._engine() else 0

    async def _catch_up(self) -> None:
        engine, count = self._engine(), self._count()
        rows = await asyncio.to_thread(self._store.items, count)
        if rows:
            await asyncio.to_thread(lambda: engine.grow(with_items(engine.model, rows)))
        self._read, self._looked = (engine, count + len(rows)), time.monotonic()


def with_items(model: Personalizer, rows: Sequence[Mapping[str, Any]]) -> Personalizer:
    """Return a model with those items of a store that it does not know; what it knows stays as the model has it.

    Another model, with other bags, may have been served when a row was stored. Bags that this model does not have are left out.
    """
    fresh = [_read_by(model, row) for row in rows if not model.vocabulary.knows(row["id"])]
    try:
        return model.add_items(fresh)
    except ValueError as error:
        logging.error("The store's items do not fit the model, which answers without them: %s", printable(error))
        return model


def _read_by(model: Personalizer, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model reads of the row of an item."""
    names = ("title", *model.vocabulary.catalogue.multi)
    return {"id": str(row["id"])} | {name: row[name] for name in names if name in row}
