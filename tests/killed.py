"""Processes that kill themselves while they write the results of many users, which a test starts."""

import dataclasses
import importlib
import os
import signal
from pathlib import Path

import pyarrow as pa

from user_llm.data.vocabulary import Read, Vocabulary
from user_llm.serving import bulk


@dataclasses.dataclass
class Count:
    """Stands in for `Recommend`, and for its model: one row for each event of a user, computed without jax."""

    vocabulary: Vocabulary
    identity, mark = "count", ""
    settings = {}
    schema = pa.schema({"user": pa.string(), "rank": pa.int64()})

    @property
    def model(self) -> "Count":
        return self

    def encode_read(self, read: Read, numbers: range) -> dict[str, int]:
        return {read.timelines.user_keys[n]: int(read.timelines.lengths[n]) for n in numbers}

    def of_users(self, those: dict[str, int]) -> pa.Table:
        rows = [{"user": user, "rank": n} for user, count in those.items() for n in range(1, count + 1)]
        return pa.Table.from_pylist(rows, self.schema)


def count(vocabulary: Vocabulary, events: Path, out: Path, place: str = "", calls: int = 0) -> None:
    """Count the events of all users; get SIGKILL where the function `place` (module:name) is called for the `calls`-th time."""
    bulk.BYTES, bulk.EVENTS, bulk.USERS, left = 200, 3, 1, calls
    if place:
        module, _, names = place.partition(":")
        owner, (*path, name) = importlib.import_module(module), names.split(".")
        for one in path:
            owner = getattr(owner, one)
        real = getattr(owner, name)

        def replaced(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, replaced)
    bulk.run(Count(vocabulary), str(events), out)
