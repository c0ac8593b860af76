"""The store in one SQLite file, for one machine: nothing else needs to run.

The file is in write-ahead-log mode, so that reads do not wait for writes. SQLite makes two more files beside it, FILE-wal and
FILE-shm. Every write is one transaction that is synced to disk before the call returns.
"""

import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from absl import logging

from user_llm.serve.sqlite_tables import UserRows, prepare
from user_llm.serve.store import (
    NOBODY,
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

WAIT = 10.0  # seconds that a call waits for other processes, or for readers


class SQLiteStore:
    """A `Store` in a SQLite file that only its owner may read and write (mode 0600).

    An acknowledged write survives the kill of the process and the loss of power.

    When `delete` returns, nothing of the user is left in the file, in FILE-wal or in FILE-shm. The table that held the user is
    written anew without the user, its former pages are overwritten by zeros, and the log is copied into the file and cut to length
    0. A copy that the file system or the disk makes of a block on its own is beyond the reach of the store.

    Args:
      path: the file; it is created if it is missing, its folder is not.

    Raises:
      ValueError: the file is no database, belongs to another program, is of another schema version, or cannot be written.
    """

    def __init__(self, path: str):
        if not path or path == ":memory:" or path.startswith("//"):
            raise ValueError("A SQLite store needs a file: sqlite:users.db or sqlite:/folder/users.db.")
        self._path = Path(path).absolute()
        self._lock = threading.Lock()  # held by the thread that writes
        self._idle: deque[sqlite3.Connection] = deque()  # for reading
        self._closed = False
        try:
            _create(self._path)
            with closing(self._connect()) as connection:
                prepare(connection, self._path, WAIT)
            if self._path.stat().st_mode & 0o077:  # a file of ours, as `prepare` found
                self._path.chmod(0o600)
            self._writer = self._connect()
            # A process may have been killed between a deletion and this.
            if not self._empty_log(wait=1.0):
                logging.warning("%s is being read: its log keeps what was deleted until the next deletion.", self._path)
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"{self._path} cannot be used as a store: {_reason(error)}.") from None

    def add(self, events: Mapping[str, Sequence[Event]], most: int = UNLIMITED) -> dict[str, Added]:
        """Store events; see `Store.add`."""
        packed = {user: [(text_bytes(event.key), pack(event.row)) for event in given] for user, given in events.items()}
        with self._writing() as connection:
            return {user: UserRows(connection, user).add(rows, most) for user, rows in packed.items()}

    def histories(self, users: Sequence[str]) -> dict[str, History]:
        """Return histories; see `Store.histories`."""
        found = {}
        with self._reading() as connection:
            for user in users:
                mine = UserRows(connection, user)
                if (version := mine.version()) != NOBODY:
                    found[user] = version, mine.rows()
        return {user: History(version, unpack(rows)) for user, (version, rows) in found.items()}

    def versions(self, users: Sequence[str]) -> dict[str, Version]:
        """Return versions; see `Store.versions`."""
        with self._reading() as connection:
            found = {user: UserRows(connection, user).version() for user in users}
        return {user: version for user, version in found.items() if version != NOBODY}

    def states(self, users: Sequence[str], model: str) -> dict[str, bytes]:
        """Return states; see `Store.states`."""
        with self._reading() as connection:
            found = {user: UserRows(connection, user).state(model) for user in users}
        return {user: state for user, state in found.items() if state is not None}

    def keep(self, model: str, states: Mapping[str, tuple[Version, bytes]]) -> int:
        """Keep states; see `Store.keep`."""
        kept = 0
        with self._writing() as connection:
            for user, (version, state) in states.items():
                mine = UserRows(connection, user)
                if mine.version() == version != NOBODY:
                    mine.keep(model, state)
                    kept += 1
        return kept

    def delete(self, user: str) -> bool:
        """Delete a user; see `Store.delete` and, for what is left, `SQLiteStore`.

        The call takes time in proportion to the size of one of the tables, of which sqlite_tables.TABLES share the users.

        Raises:
          StoreError: the user is deleted, but a reader of another process holds the log for longer than WAIT seconds. The next
            deletion of any user, or the next start, empties the log.
        """
        with self._writing() as connection:
            deleted = UserRows(connection, user).delete()
        with self._translated():
            if not self._empty_log(WAIT):
                raise StoreError(
                    f"The user is deleted, but {self._path} is being read: its log keeps the events for the moment."
                )
        return deleted

    def add_items(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store items; see `Store.add_items`."""
        packed = pack_items(rows)
        with self._writing() as connection:
            query = "INSERT INTO added_items (id, row) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
            connection.executemany(query, packed.items())

    def items(self, first: int = 0) -> list[dict[str, Any]]:
        """Return items; see `Store.items`."""
        with self._reading() as connection:
            found = connection.execute("SELECT row FROM added_items WHERE place > ? ORDER BY place", (first,)).fetchall()
        return unpack(row for (row,) in found)

    def counts(self) -> Counts:
        """Return the totals; see `Store.counts`."""
        with self._reading() as connection:
            return Counts(*connection.execute("SELECT users, events, states FROM totals").fetchone())

    def ping(self) -> None:
        """Read the totals; see `Store.ping`."""
        self.counts()

    def close(self) -> None:
        """Close all connections; see `Store.close`."""
        with self._lock:
            self._closed = True
            self._writer.close()
        while self._idle:
            self._idle.pop().close()

    def _connect(self, wait: float = WAIT) -> sqlite3.Connection:
        """Return another connection, which waits as many seconds for locks."""
        connection = sqlite3.connect(self._path, timeout=wait, isolation_level=None, check_same_thread=False)
        for setting in ("synchronous = FULL", "secure_delete = ON", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {setting}")
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of SQLite as `StoreError`."""
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"The store {self._path} failed: {_reason(error)}.") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction that no other writer can enter; it is on disk when the block ends."""
        with self._translated(), self._lock:
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that sees one state of the file until the block ends. No two threads get the same at a time."""
        with self._translated():
            if self._closed:
                raise StoreError(f"The store {self._path} is closed.")
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            try:
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)
            if self._closed:
                self.close()

    def _empty_log(self, wait: float) -> bool:
        """Copy the log into the file and cut it to length 0; return whether that was possible.

        Readers that see an earlier state of the file are waited for, for as many seconds.
        """
        deadline = time.monotonic() + wait
        with closing(self._connect(wait=0.2)) as connection:
            while True:
                with self._lock:  # otherwise writers of this process might always be first
                    busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if not busy or time.monotonic() > deadline:
                    return not busy
                time.sleep(0.01)


def _create(path: Path) -> None:
    """Create a file that only its owner may read and write, if there is none. SQLite gives its other files the same mode.

    A file that is there is not opened: to close it would end the locks that SQLite may hold on it in this process.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _reason(error: Exception) -> str:
    """Return what went wrong, without a stop at its end."""
    return (error.strerror or str(error) if isinstance(error, OSError) else str(error)).rstrip(".")
