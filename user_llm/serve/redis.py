"""The store in Redis, which several machines can share. It needs Redis 4 or later, and no cluster.

Users are deleted in Redis's memory at once. Redis's own files forget them when Redis writes them anew: the append-only file at its
next rewrite (`BGREWRITEAOF`), a snapshot at the next one. How much a loss of power may take is Redis's setting `appendfsync`.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
from absl import logging

from user_llm.serve.store import (
    FORMS,
    UNLIMITED,
    Added,
    Counts,
    Event,
    History,
    StoreError,
    Version,
    pack,
    pack_items,
    text_bytes,
    unpack,
)

PREFIX = b"user_llm:"
EPOCHS, EVENTS, STATES, ITEM_IDS, ITEMS = (
    PREFIX + name for name in (b"epochs", b"events", b"states", b"added_items:ids", b"added_items:rows")
)
WAIT = 10.0  # seconds that a call waits for Redis
CHUNK = 10_000  # the most events that one command carries
# Redis runs a script, like a transaction, without any other command in between. What only reads or deletes is no transaction but a
# script, because a Redis whose memory is full refuses transactions. The keys of the next three scripts are those of `_keys`: 1 epochs
# by user, 2 the number of all events, 3 the number of all states, 4 the user's rows in their order, 5 the keys of the user's events,
# 6 the user's states by model.
ADD = """
local stored, beyond = 0, {}
local room = tonumber(ARGV[3]) - redis.call('LLEN', KEYS[4])
for i = 4, #ARGV, 2 do
  if stored >= room then
    if redis.call('SISMEMBER', KEYS[5], ARGV[i]) == 0 then beyond[#beyond + 1] = (i - 4) / 2 end
  elseif redis.call('SADD', KEYS[5], ARGV[i]) == 1 then
    redis.call('RPUSH', KEYS[4], ARGV[i + 1])
    stored = stored + 1
  end
end
if stored > 0 then
  redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
  redis.call('INCRBY', KEYS[2], stored)
  redis.call('DECRBY', KEYS[3], redis.call('HLEN', KEYS[6]))
  redis.call('DEL', KEYS[6])
end
return {stored, beyond, redis.call('HGET', KEYS[1], ARGV[1]), redis.call('LLEN', KEYS[4])}
"""
KEEP = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] or redis.call('LLEN', KEYS[4]) ~= tonumber(ARGV[3]) then return 0 end
redis.call('DECRBY', KEYS[3], redis.call('HLEN', KEYS[6]))
redis.call('DEL', KEYS[6])
redis.call('INCRBY', KEYS[3], redis.call('HSET', KEYS[6], ARGV[4], ARGV[5]))
return 1
"""
DELETE = """
local events, states = redis.call('LLEN', KEYS[4]), redis.call('HLEN', KEYS[6])
local deleted = redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('UNLINK', KEYS[4], KEYS[5], KEYS[6])
redis.call('DECRBY', KEYS[2], events)
redis.call('DECRBY', KEYS[3], states)
return deleted
"""
# KEYS[1] is the set of the ids of all items; KEYS[2] is the list of their rows, in the order in which they were added.
ADD_ITEMS = """
for i = 1, #ARGV, 2 do
  if redis.call('SADD', KEYS[1], ARGV[i]) == 1 then redis.call('RPUSH', KEYS[2], ARGV[i + 1]) end
end
"""
# The keys of these are the epochs by user, and the rows of each of the users that the arguments name.
HISTORIES = """
local found = {}
for i, user in ipairs(ARGV) do found[i] = {redis.call('HGET', KEYS[1], user), redis.call('LRANGE', KEYS[i + 1], 0, -1)} end
return found
"""
VERSIONS = """
local found = {}
for i, user in ipairs(ARGV) do found[i] = {redis.call('HGET', KEYS[1], user), redis.call('LLEN', KEYS[i + 1])} end
return found
"""


class RedisStore:
    """A `Store` in Redis, under keys that begin with `user_llm:`.

    A warning is logged if Redis is not set to keep every acknowledged event. If Redis runs out of memory within `add`, the events
    of some users may be stored and those of others not; the call raises, and may be repeated.

    Args:
      url: such as `redis://localhost:6379/0`, `rediss://user:password@host` or `unix:///run/redis.sock?db=0`.

    Raises:
      ValueError: the URL is not of this form.
      StoreError: Redis cannot be reached.
    """

    def __init__(self, url: str):
        try:
            parts = urlsplit(url)
            socket = parts.scheme == "unix"
            if not (parts.path if socket else re.fullmatch(r"(/\d*)?", parts.path)):
                raise ValueError
            self._name = parts.path if socket else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
            self._redis = redis.Redis.from_url(url, socket_timeout=WAIT)
            self.ping()
        except (ValueError, TypeError):  # the latter for a setting behind ? that does not exist
            raise ValueError(f"The store is not of a known form: name it as {FORMS}; write / in a password as %2F.") from None
        self._warn()

    def add(self, events: Mapping[str, Sequence[Event]], most: int = UNLIMITED) -> dict[str, Added]:
        """Store events; see `Store.add`."""
        packed = {user: [(text_bytes(event.key), pack(event.row)) for event in given] for user, given in events.items()}
        with self._pipeline(transaction=True) as pipeline:
            for user, rows in packed.items():
                epoch = secrets.randbits(63)
                for chunk in _chunks(rows):
                    _eval(pipeline, ADD, user, epoch, most, *(word for row in chunk for word in row))
            answers = iter(pipeline.execute())
        added = {}
        for user, rows in packed.items():
            stored, beyond = 0, []
            for number, _ in enumerate(_chunks(rows)):
                count, left_out, epoch, length = next(answers)
                stored += count
                beyond += [number * CHUNK + place for place in left_out]
            added[user] = Added(stored, len(rows) - stored - len(beyond), beyond, Version(int(epoch or 0), length))
        return added

    def histories(self, users: Sequence[str]) -> dict[str, History]:
        """Return histories; see `Store.histories`."""
        found = self._read(HISTORIES, users)
        return {user: History(Version(epoch, len(rows)), unpack(rows)) for user, (epoch, rows) in found.items()}

    def versions(self, users: Sequence[str]) -> dict[str, Version]:
        """Return versions; see `Store.versions`."""
        return {user: Version(*version) for user, version in self._read(VERSIONS, users).items()}

    def states(self, users: Sequence[str], model: str) -> dict[str, bytes]:
        """Return states; see `Store.states`."""
        with self._pipeline() as pipeline:
            for user in users:
                pipeline.hget(_keys(user)[5], text_bytes(model))
            answers = pipeline.execute()
        return {user: state for user, state in zip(users, answers, strict=True) if state is not None}

    def keep(self, model: str, states: Mapping[str, tuple[Version, bytes]]) -> int:
        """Keep states; see `Store.keep`."""
        with self._pipeline() as pipeline:
            for user, (version, state) in states.items():
                _eval(pipeline, KEEP, user, *version, text_bytes(model), state)
            return sum(pipeline.execute())

    def delete(self, user: str) -> bool:
        """Delete a user from Redis's memory; see `Store.delete` and, for what is left, this module."""
        with self._translated():
            return bool(_eval(self._redis, DELETE, user))

    def add_items(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store items; see `Store.add_items`."""
        with self._pipeline(transaction=True) as pipeline:
            for chunk in _chunks(list(pack_items(rows).items())):
                pipeline.eval(ADD_ITEMS, 2, ITEM_IDS, ITEMS, *(word for item in chunk for word in item))
            pipeline.execute()

    def items(self, first: int = 0) -> list[dict[str, Any]]:
        """Return items; see `Store.items`."""
        with self._translated():
            found: Any = self._redis.lrange(ITEMS, first, -1)
        return unpack(found)

    def counts(self) -> Counts:
        """Return the totals; see `Store.counts`."""
        with self._pipeline() as pipeline:
            pipeline.hlen(EPOCHS)
            pipeline.mget(EVENTS, STATES)
            users, totals = pipeline.execute()
        return Counts(users, *(int(total or 0) for total in totals))

    def ping(self) -> None:
        """Ask Redis for an answer; see `Store.ping`."""
        with self._translated():
            self._redis.ping()

    def close(self) -> None:
        """Close all connections; see `Store.close`."""
        self._redis.close()

    def _read(self, script: str, users: Sequence[str]) -> dict[str, tuple[int, Any]]:
        """Return the epoch of each user who exists, and what else a script returns of them."""
        with self._translated():
            keys = [EPOCHS, *(_keys(user)[3] for user in users)]
            found: Any = self._redis.eval(script, len(keys), *keys, *map(text_bytes, users))
        return {user: (int(epoch), rest) for user, (epoch, rest) in zip(users, found, strict=True) if epoch is not None}

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of Redis as `StoreError`, without the commands that they quote: those hold events."""
        try:
            yield
        except redis.RedisError as error:
            reason = str(error).rpartition("caused error: ")[2].rstrip(".")
            raise StoreError(f"The store in Redis at {self._name} failed: {reason}.") from None

    @contextmanager
    def _pipeline(self, transaction: bool = False) -> Iterator[redis.client.Pipeline]:
        """Yield what collects commands, to be sent at once."""
        with self._translated(), self._redis.pipeline(transaction) as pipeline:
            yield pipeline

    def _warn(self) -> None:
        """Log what Redis's settings mean for acknowledged events."""
        try:
            settings: dict[Any, Any] = {}
            for name in ("appendonly", "appendfsync", "maxmemory-policy"):  # older ones answer one at a time
                settings |= self._redis.config_get(name)
        except redis.RedisError:
            logging.warning("Redis at %s does not tell its settings: whether it keeps events on disk is unknown.", self._name)
            return
        if settings.get("appendonly") != "yes":
            logging.warning("Redis at %s may lose events when it stops: set `appendonly yes`.", self._name)
        elif settings.get("appendfsync") != "always":
            logging.warning(
                "Redis at %s may lose the last second's events when its machine stops: set `appendfsync always`.", self._name
            )
        if not settings.get("maxmemory-policy", "noeviction").startswith(("noeviction", "volatile")):
            logging.warning(
                "Redis at %s may drop events when its memory is full: set `maxmemory-policy noeviction`.", self._name
            )


def _keys(user: str) -> list[bytes]:
    """Return the keys of the scripts for a user."""
    own = (PREFIX + kind + b":" + text_bytes(user) for kind in (b"rows", b"keys", b"states"))
    return [EPOCHS, EVENTS, STATES, *own]


def _eval(to: redis.Redis, script: str, user: str, *arguments: bytes | int) -> Any:
    """Run a script for a user, or put it into a pipeline."""
    keys = _keys(user)
    return to.eval(script, len(keys), *keys, text_bytes(user), *arguments)


def _chunks(rows: list[tuple[bytes, bytes]]) -> list[list[tuple[bytes, bytes]]]:
    """Return lists of at most CHUNK rows; one empty list if there are no rows."""
    return [rows[start : start + CHUNK] for start in range(0, max(len(rows), 1), CHUNK)]
