"""Items that are added while the server runs: in the store, which keeps their order, and in the model that answers.

The store is the truth. A model gets the store's items in their order, so that all server processes of one store number them alike. A process
that did not add an item itself looks into the store before it answers for a user, at most once every SECONDS.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from user_llm.common.printable import printable
from user_llm.serve.engine import Engine
from user_llm.serve.store import Store
from user_llm.serving.personalizer import Personalizer

SECONDS = 1.0


class Items:
    """The further items of a server.

    Args:
      store: where they are kept.
      engine: returns the engine that answers at this moment.
      most: the most items that may be added to the model's own.
    """

    def __init__(self, store: Store, engine: Callable[[], Engine], most: int):
        self._store, self._engine, self._most = store, engine, most
        self._turn = asyncio.Lock()
        self._read: tuple[Engine | None, int] = (None, 0)  # the engine whose model has so many rows of the store
        self._looked = 0.0

    async def add(self, rows: Sequence[Any]) -> int:
        """Store items and add them to the model; return how many of them are new. They are on disk when this returns.

        Raises:
          ValueError: as in `Personalizer.add_items`; nothing is stored then.
          StoreError: the store failed.
        """
        async with self._turn:
            await self._catch_up()
            model = self._engine().model
            grown = await asyncio.to_thread(model.add_items, rows)
            first = len(model.vocabulary.catalogue.keys)
            fresh = grown.vocabulary.catalogue.keys[first:]
            if fresh and len(grown.marks) - 1 > self._most:
                raise ValueError(f"These would be {len(grown.marks) - 1} added items, and at most {self._most} are taken.")
            if fresh:
                by_id = {str(row["id"]): {**row, "id": str(row["id"])} for row in reversed(rows)}
                await asyncio.to_thread(self._store.add_items, [by_id[key] for key in fresh])
                await self._catch_up()
                await asyncio.to_thread(
                    self._engine().model.add_items, rows
                )  # another process may have stored others meanwhile
            return len(fresh)

    async def current(self) -> None:
        """Let the model have the items that other processes have stored."""
        if time.monotonic() - self._looked < SECONDS and self._read[0] is self._engine():
            return
        async with self._turn:
            await self._catch_up()

    async def _catch_up(self) -> None:
        engine = self._engine()
        count = self._read[1] if self._read[0] is engine else 0
        rows = await asyncio.to_thread(self._store.items, count)
        if rows:
            await asyncio.to_thread(lambda: engine.grow(with_items(engine.model, rows)))
        self._read, self._looked = (engine, count + len(rows)), time.monotonic()


def with_items(model: Personalizer, rows: Sequence[Mapping[str, Any]]) -> Personalizer:
    """Return a model with those items of a store that it does not know; what it knows stays as the model has it."""
    fresh = [row for row in rows if not model.vocabulary.knows(row["id"])]
    try:
        return model.add_items(fresh)
    except ValueError as error:
        logging.error("The store's items do not fit the model, which answers without them: %s", printable(error))
        return model
