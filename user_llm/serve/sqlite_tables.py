"""The tables of a SQLite store, and the rows of one user in them."""

import secrets
import sqlite3
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from user_llm.serve.store import NOBODY, Added, Version, text_bytes

APPLICATION = int.from_bytes(b"ULLM", "big")  # tells our files from those of other programs
SCHEMA_VERSION = 1
# SQLite overwrites a deleted row by zeros, but not the copies of it that splitting and joining pages left in unused parts of pages.
# So users are spread over tables, and a deletion writes the table of its user anew: SQLite clears all of its pages.
TABLES = 256
HEAD, EVENT, STATE = range(3)  # the kinds of rows
# Ids, keys and the identities of models are the UTF-8 bytes of texts. The rows of a user lie side by side:
#   kind HEAD, one row: its `place` is the number of the user's events, its `value` the epoch;
#   kind EVENT, one row for each event: its `place` is the number of events before it, its `value` the JSON object;
#   kind STATE, at most one row, with the identity of its model as `key`: its `value` is the state, which belongs to the present
#     version, because the transaction that adds events of a user deletes the user's state. Files that earlier versions wrote may hold one
#     state for each model.
SCHEMA = (
    *(
        f"CREATE TABLE users_{number} (user BLOB, kind INTEGER, key BLOB, place INTEGER, value BLOB NOT NULL,"
        " PRIMARY KEY (user, kind, key)) WITHOUT ROWID"
        for number in range(TABLES)
    ),
    "CREATE TABLE totals (users INTEGER NOT NULL, events INTEGER NOT NULL, states INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0, 0, 0)",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
# Items have the places 1, 2, ... without gaps, since none is ever deleted. Files that earlier versions wrote do not have the table.
ITEMS = "CREATE TABLE IF NOT EXISTS added_items (place INTEGER PRIMARY KEY, id BLOB UNIQUE NOT NULL, row BLOB NOT NULL)"


def prepare(connection: sqlite3.Connection, path: Path, wait: float) -> None:
    """Create the tables in an empty file; check the schema version of any other.

    Raises:
      ValueError: the file belongs to another program or is of another schema version.
    """
    deadline = time.monotonic() + wait
    while True:  # SQLite does not wait here for another process that does the same
        try:
            connection.execute("BEGIN IMMEDIATE")
            application, version, tables = (
                connection.execute(query).fetchone()[0]
                for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
            )
            if tables == application == version == 0:
                for statement in SCHEMA:
                    connection.execute(statement)
            elif application != APPLICATION:
                raise ValueError(f"{path} is a database of another program: name another file.")
            elif version != SCHEMA_VERSION:
                raise ValueError(f"{path} has schema version {version}, but this program reads version {SCHEMA_VERSION}.")
            connection.execute(ITEMS)
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class UserRows:
    """The rows of one user, in the transaction of a connection."""

    def __init__(self, connection: sqlite3.Connection, user: str):
        self._connection, self._user = connection, text_bytes(user)
        self._table = f"users_{zlib.crc32(self._user) % TABLES}"

    def version(self) -> Version:
        """Return the user's version; NOBODY if the user does not exist."""
        query = f"SELECT value, place FROM {self._table} WHERE user = ? AND kind = {HEAD}"
        row = self._connection.execute(query, (self._user,)).fetchone()
        return Version(*row) if row else NOBODY

    def rows(self) -> list[bytes]:
        """Return the packed rows of the events in their order."""
        query = f"SELECT value FROM {self._table} WHERE user = ? AND kind = {EVENT} ORDER BY place"
        return [row for (row,) in self._connection.execute(query, (self._user,))]

    def state(self, model: str) -> bytes | None:
        """Return the state that a model computed, if it is kept."""
        query = f"SELECT value FROM {self._table} WHERE user = ? AND kind = {STATE} AND key = ?"
        row = self._connection.execute(query, (self._user, text_bytes(model))).fetchone()
        return row[0] if row else None

    def add(self, events: Sequence[tuple[bytes, bytes]], most: int) -> Added:
        """Insert events, given as keys and packed rows, up to the most; delete the states if an event was inserted."""
        before, beyond = self.version(), []
        count, query = before.events, f"INSERT INTO {self._table} VALUES (?, {EVENT}, ?, ?, ?) ON CONFLICT DO NOTHING"
        for place, (key, row) in enumerate(events):
            if count < most:
                count += self._connection.execute(query, (self._user, key, count, row)).rowcount
            elif not self._has(key):
                beyond.append(place)
        stored = count - before.events
        after = Version(secrets.randbits(63) if before == NOBODY else before.epoch, count) if stored else before
        if stored:
            head = f"INSERT OR REPLACE INTO {self._table} VALUES (?, {HEAD}, x'', ?, ?)"
            self._connection.execute(head, (self._user, after.events, after.epoch))
            self._count(int(before == NOBODY), stored, -self._forget_states())
        return Added(stored, len(events) - stored - len(beyond), beyond, after)

    def _has(self, key: bytes) -> bool:
        """Return whether the user has an event of this key."""
        query = f"SELECT 1 FROM {self._table} WHERE user = ? AND kind = {EVENT} AND key = ?"
        return self._connection.execute(query, (self._user, key)).fetchone() is not None

    def keep(self, model: str, state: bytes) -> None:
        """Insert a state in the place of an earlier one, of whatever model that was."""
        replaced = self._forget_states()
        row = self._user, text_bytes(model), state
        self._connection.execute(f"INSERT INTO {self._table} VALUES (?, {STATE}, ?, NULL, ?)", row)
        self._count(0, 0, 1 - replaced)

    def delete(self) -> bool:
        """Write the table anew without the user; return whether the user existed."""
        version = self.version()
        if version == NOBODY:
            return False
        query = f"SELECT count(*) FROM {self._table} WHERE user = ? AND kind = {STATE}"
        (states,) = self._connection.execute(query, (self._user,)).fetchone()
        self._connection.execute(f"CREATE TEMP TABLE others AS SELECT * FROM {self._table} WHERE user != ?", (self._user,))
        self._connection.execute(f"DELETE FROM {self._table}")
        self._connection.execute(f"INSERT INTO {self._table} SELECT * FROM others")
        self._connection.execute("DROP TABLE others")
        self._count(-1, -version.events, -states)
        return True

    def _forget_states(self) -> int:
        """Delete the states, and return how many there were."""
        return self._connection.execute(f"DELETE FROM {self._table} WHERE user = ? AND kind = {STATE}", (self._user,)).rowcount

    def _count(self, users: int, events: int, states: int) -> None:
        """Add to the totals of the file."""
        query = "UPDATE totals SET users = users + ?, events = events + ?, states = states + ?"
        self._connection.execute(query, (users, events, states))
