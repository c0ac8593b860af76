"""From raw events to users: events are read by the model's rules, joined to those that a user has, and encoded."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from user_llm.common import mesh as meshes
from user_llm.data.pipeline import length_batches
from user_llm.data.timelines import hash_key
from user_llm.data.vocabulary import Read, Vocabulary
from user_llm.serving import batch
from user_llm.serving import user as users
from user_llm.serving.predictor import Predictor
from user_llm.serving.user import User


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """The part of a `Personalizer` that makes users of raw events.

    Attributes:
      model, added: the identity, and the mark of further items, that the users get.
      keep: how many of the latest events a user keeps; None for all.
    """

    model: str
    predictor: Predictor
    vocabulary: Vocabulary
    keep: int | None
    added: str = ""

    def nobody(self) -> User:
        """Return a user without events."""
        fields = self.vocabulary.fields
        return users.unknown_user(self.model, self.vocabulary.schema.width, hash_key(""), fields.ticks_per_second, self.added)

    def read(self, events: Any) -> Read:
        """Return the events as timelines, and log how many events were left out."""
        read = self.vocabulary.read(events)
        if left_out := int(np.sum(read.unknown)):
            logging.warning("%d events are left out: the model does not know their items.", left_out)
        return read

    def users(self, read: Read, numbers: Sequence[int], keep: int | None) -> dict[str, User]:
        """Return users by their ids, with events but without user tokens."""
        places, keys = np.array(numbers, np.int64), [read.timelines.user_keys[number] for number in numbers]
        found = users.from_timelines(
            read.timelines, places, keep=keep, model=self.model, keys=list(map(hash_key, keys)),
            unknown=[_unknown(read, number) for number in numbers], ticks_per_second=self.vocabulary.fields.ticks_per_second,
            added=self.added,
        )  # fmt: skip
        return dict(zip(keys, found, strict=True))

    def unencoded(self, events: Any, keep: int | None) -> dict[str, User]:
        """Return the users of raw events by their ids, with events but without user tokens."""
        read = self.read(events)
        return self.users(read, range(len(read.timelines)), keep)

    def updated(self, user: User, events: Any) -> User:
        """Return a user with further events, but without user tokens; see `Personalizer.update`."""
        read, fields = self.read(events), self.vocabulary.fields
        found = list(self.users(read, range(len(read.timelines)), None).values())
        if len(found) > 1:
            raise ValueError(f"These are events of {len(found)} users: update one user by events of that user alone.")
        for number, more in enumerate(found):
            user = _same(user, more)
            user = users.joined(
                user, more, self.vocabulary.schema, unknown=_unknown(read, number), keep=self.keep, ties=fields.ties,
                seed=fields.seed,
            )  # fmt: skip
        return user

    def encoded(self, those: Sequence[User]) -> list[User]:
        """Return the same users with their user tokens computed."""
        out = list(those)
        if not self.predictor.max_events:
            return out
        lengths = np.array([batch.read_events(self.predictor, user) for user in those], np.int64)
        size = batch.rows(self.predictor, len(those))
        for indices, rows, padded in length_batches(lengths, size, self.predictor.bucket):
            arrays = batch.histories(self.predictor, [those[row] for row in rows], padded)
            found, counts = meshes.fetch(tuple(self.predictor.encode(*arrays) or ()))
            for place, index in enumerate(indices):
                out[index] = dataclasses.replace(those[index], tokens=np.array(found[place, : counts[place]]))
        return out


def _unknown(read: Read, number: int) -> Int[np.ndarray, " X"]:
    """Return the ticks of a user's events that are left out, ascending."""
    return read.unknown_ticks[read.unknown_offsets[number] : read.unknown_offsets[number + 1]]


def _same(user: User, more: User) -> User:
    """Return the user to whom further events belong, as the column of user ids names them, if it is there.

    Raises:
      ValueError: the events are of another user.
    """
    nobody = hash_key("")
    if nobody in (user.key, more.key):
        return dataclasses.replace(user, key=more.key) if user.count == 0 else user
    if user.key != more.key:
        raise ValueError("These events are of another user, by their column of user ids: update each user by their own events.")
    return user
