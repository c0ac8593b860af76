"""Functions from Arrow table to Arrow table, which data engines call on their workers to encode many users or recommend to them.

Each call must be given all events of its users, in any order. `launch/ray_recommend.py` is an example for Ray, and launch/README.md
shows the lines for Spark and Beam. The model is loaded at the first call. An object that is made of a directory or
a hub name can therefore be sent to workers before anything is loaded.
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
    """A function of tables that has a model, which it loads at its first use.

    Args:
      model: a `Personalizer`, a model directory, or the name of a model on the hub.
      settings: further arguments of `user_llm.load`, such as `device`.
    """

    def __init__(self, model: Any, **settings: Any):
        self._given, self._settings = model, settings

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change the results, besides the model and the events."""
        return {}

    @functools.cached_property
    def model(self) -> Personalizer:
        """The model. It is loaded at the first access."""
        return self._given if isinstance(self._given, Personalizer) else load(self._given, **self._settings)

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._given, Personalizer):
            raise TypeError("A loaded model does not travel to workers: name its directory instead.")
        return {"_given": self._given, "_settings": self._settings}


class Encode(_Loads):
    """Encode the users of a table of events.

        states = Encode("runs/quickstart/user_llm/model")(events)

    The events have the columns of the training data. The result has one row a user, with the columns STATES: `user`, `state` (the
    bytes of a `User`), `events` (their number), `unknown` (the number of events left out because the model does not know their
    item) and `last_time` (seconds since 1970 of the latest event, or its order where the training data has no times).
    """

    schema = STATES

    def __call__(self, events: pa.Table) -> pa.Table:
        """Return a state for each user of a table of events.

        Raises:
          ValueError: a column is missing, or an event cannot be read.
        """
        return self.of_users(self.model.encode_many(events))

    def of_users(self, those: Mapping[str, User]) -> pa.Table:
        """Return the table of states for users that are given by their ids."""
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
    """Recommend items to the users of a table.

        rankings = Recommend("runs/quickstart/user_llm/model", k=20)(events)

    The table holds events with the columns of the training data, or states as `Encode` returns them. A table with a column `state`
    is taken for states. The result has one row for each recommended item, with the columns RANKINGS: `user`, `rank` (from 1),
    `item` (its id), `title` and `score` (higher is better).

    Args:
      model: as in `Encode`.
      k: the number of items for each user.
      seen: whether items that the user has had may be recommended.
      settings: further arguments of `user_llm.load`, such as `device`.
    """

    schema = RANKINGS

    def __init__(self, model: Any, k: int = 10, *, seen: bool = True, **settings: Any):
        super().__init__(model, **settings)
        self._k, self._seen = k, seen

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_k": self._k, "_seen": self._seen}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change the results, besides the model and the events."""
        return {"k": self._k, "seen": self._seen}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a ranking for each user of a table of events or states.

        Raises:
          ValueError: a column is missing, an event cannot be read, or a state is damaged or of another model.
        """
        if "state" in table.column_names and self.model.vocabulary.fields.item not in table.column_names:
            states = zip(table["user"].to_pylist(), table["state"].to_pylist(), strict=True)
            return self.of_users({user: User.from_bytes(state) for user, state in states})
        return self.of_users(self.model.encode_many(table))

    def of_users(self, those: Mapping[str, User]) -> pa.Table:
        """Return the table of rankings for users that are given by their ids."""
        ranked = self.model.recommend_many(list(those.values()), self._k, seen=self._seen)
        rows = [
            (user, rank, *item)
            for user, items in zip(those, ranked, strict=True)
            for rank, item in enumerate(items, 1)
        ]  # fmt: skip
        return pa.Table.from_pylist([dict(zip(RANKINGS.names, row, strict=True)) for row in rows], RANKINGS)
