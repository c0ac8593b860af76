"""Many users at a time, from Arrow table to Arrow table: what engines of data call on their workers.

    Ray      dataset.groupby("user").map_groups(Recommend, batch_format="pyarrow", fn_constructor_args=["DIR"], concurrency=2)
    Spark    frame.groupBy("user").applyInArrow(Recommend("DIR"), "user string, rank int, item string, title string, score float")
    Beam     grouped | beam.Map(Recommend("DIR"))

A call must be given all events of its users. The model is loaded at the first call, so that an object may be sent to workers.
"""

import functools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from user_llm.serving.front import load
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.user import User

STATES = pa.schema(
    {
        "user": pa.string(),
        "state": pa.binary(),
        "events": pa.int64(),
        "unknown": pa.int64(),
        "last_time": pa.float64(),
    }
)
RANKINGS = pa.schema(
    {"user": pa.string(), "rank": pa.int32(), "item": pa.string(), "title": pa.string(), "score": pa.float32()}
)


class _Loads:
    """A function of tables that has a model.

    Args:
      model: a model, its directory, or its name on the hub.
      settings: of `user_llm.load`.
    """

    def __init__(self, model: Any, **settings: Any):
        self._given, self._settings = model, settings

    @property
    def settings(self) -> dict[str, Any]:
        """What the results depend on besides the model and the events."""
        return {}

    @functools.cached_property
    def model(self) -> Personalizer:
        """The model, loaded when it is first asked for."""
        return self._given if isinstance(self._given, Personalizer) else load(self._given, **self._settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"_given": self._given, "_settings": self._settings}


class Encode(_Loads):
    """From events, in the columns that the model names, to a state for each user: STATES."""

    schema = STATES

    def __call__(self, events: pa.Table) -> pa.Table:
        """Return the states of the users of a table.

        Raises:
          ValueError: an event that cannot be read.
        """
        return self.of_users(self.model.encode_many(events))

    def of_users(self, those: Mapping[str, User]) -> pa.Table:
        """Return the states of users by their ids."""
        found = list(those.values())
        columns = [
            list(those),
            [user.to_bytes() for user in found],
            [user.count for user in found],
            [user.unknown for user in found],
            [user.last_time for user in found],
        ]
        return pa.table(columns, schema=STATES)


class Recommend(_Loads):
    """From events, or from STATES, to the likeliest next items of each user: RANKINGS.

    Args:
      k: items for each user.
      seen: whether items of the history may be among them.
    """

    schema = RANKINGS

    def __init__(self, model: Any, k: int = 10, *, seen: bool = True, **settings: Any):
        super().__init__(model, **settings)
        self._k, self._seen = k, seen

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_k": self._k, "_seen": self._seen}

    @property
    def settings(self) -> dict[str, Any]:
        """What the results depend on besides the model and the events."""
        return {"k": self._k, "seen": self._seen}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the rankings of the users of a table.

        Raises:
          ValueError: an event that cannot be read, or a state of another model.
        """
        if "state" in table.column_names:
            states = zip(table["user"].to_pylist(), table["state"].to_pylist(), strict=True)
            return self.of_users({user: User.from_bytes(state) for user, state in states})
        return self.of_users(self.model.encode_many(table))

    def of_users(self, those: Mapping[str, User]) -> pa.Table:
        """Return the rankings of users by their ids."""
        ranked = self.model.recommend_many(list(those.values()), self._k, seen=self._seen)
        rows = [
            (user, rank, *item)
            for user, items in zip(those, ranked, strict=True)
            for rank, item in enumerate(items, 1)
        ]  # fmt: skip
        return pa.Table.from_pylist([dict(zip(RANKINGS.names, row, strict=True)) for row in rows], RANKINGS)
