"""The file of a SQLite store: what is in it after a kill and after a deletion, who may read it, and which files are refused."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from user_llm.serve import sqlite, sqlite_tables
from user_llm.serve.store import Counts, Event, StoreError, open_store

WRITER = """
import sys
from user_llm.serve.store import Event, open_store

store, number = open_store(f"sqlite:{sys.argv[1]}"), int(sys.argv[2])
print("ready", flush=True)
while True:
    keys = [f"{number}-{i}" for i in range(1 + number % 3)]
    store.add({f"user {number % 7}": [Event(key, {"movie": key}) for key in keys]})
    print(*keys, sep="\\n", flush=True)
    number += 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.db"


def bytes_on_disk(path: Path) -> bytes:
    """Return the bytes of the file and of those that SQLite makes beside it."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()) if file.name.startswith(path.name))


def stored(path: Path) -> Counter[str]:
    """Return how often the file holds each event, as another program reads it."""
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        users, events, states = connection.execute("SELECT * FROM totals").fetchone()
        queries = [f"SELECT kind, key, place FROM users_{number}" for number in range(sqlite_tables.TABLES)]
        rows = [row for query in queries for row in connection.execute(query)]
    keys = Counter(key.decode() for kind, key, _ in rows if kind == sqlite_tables.EVENT)
    counted = [events for kind, _, events in rows if kind == sqlite_tables.HEAD]
    assert (users, events, states) == (len(counted), sum(counted), sum(kind == sqlite_tables.STATE for kind, *_ in rows))
    assert keys.total() == events
    return keys


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_what_was_acknowledged_is_there_once_after_kills(path, kills):
    rng, acknowledged = random.Random(kills), []
    for kill in range(kills):
        command = [sys.executable, "-c", WRITER, str(path), str(1000 * kill)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            timer = threading.Timer(rng.uniform(0.0, 0.3), writer.send_signal, [signal.SIGKILL])
            timer.start()
            acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
        timer.join()
        assert writer.returncode == -signal.SIGKILL
        keys = stored(path)
        assert set(acknowledged) <= set(keys) and set(keys.values()) <= {1}
    assert len(acknowledged) > 3 * kills
    open_store(f"sqlite:{path}").close()
    assert stored(path) == keys


def marked(user: str, number: int, size: int) -> Event:
    """Return an event whose key and row hold the user's id."""
    return Event(f"{user}{number}", {"title": user * (1 + size // len(user)), "number": number})


@pytest.mark.parametrize("seed", range(3))
def test_nothing_of_a_deleted_user_is_left_in_the_files(path, opened, seed, monkeypatch):
    """Users of one table grow at the same time, so that their rows share pages, which SQLite splits and joins."""
    monkeypatch.setattr(sqlite_tables, "TABLES", 1)
    rng = random.Random(seed)
    store = opened(f"sqlite:{path}")
    users = [f"<{rng.getrandbits(64):016x}>" for _ in range(24)]

    def grow(user):
        sizes = [rng.choice([5, 80, 900, 3000, 20_000]) for _ in range(rng.randrange(1, 12))]
        added = store.add({user: [marked(user, rng.getrandbits(40), size) for size in sizes]})[user]
        store.keep("model", {user: (added.version, user.encode() * rng.choice([10, 400, 3000]))})

    for _ in range(60):
        grow(rng.choice(users))
    live = list(store.versions(users))
    rng.shuffle(live)
    while live:
        user = live.pop()
        assert user.encode() in bytes_on_disk(path)
        assert store.delete(user)
        assert user.encode() not in bytes_on_disk(path)
        if live and rng.random() < 0.3:
            grow(rng.choice(live))
    assert store.counts() == Counts(0, 0, 0)


def test_nothing_is_left_though_other_threads_read_and_write(path, opened):
    store, done = opened(f"sqlite:{path}"), threading.Event()
    store.add({f"reader {number}": [marked("kept", number, 100)] * 50 for number in range(20)})
    failed = []

    def work(thread):
        step = 0
        while not done.is_set():
            try:
                store.histories([f"reader {number}" for number in range(20)])
                if thread % 2:
                    store.add({f"writer {thread}": [marked("kept", step, 200)]})
                step += 1
            except Exception as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        for number in range(10):
            user = f"gone{number:04}gone"
            store.add({user: [marked(user, event, 300) for event in range(50)]})
            assert store.delete(user)
            assert user.encode() not in bytes_on_disk(path)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_a_reader_who_holds_the_log_is_named_and_the_next_deletion_empties_it(path, opened, monkeypatch):
    monkeypatch.setattr(sqlite, "WAIT", 0.5)
    store = opened(f"sqlite:{path}")
    store.add({"<ann>": [marked("ann", number, 100) for number in range(9)]})
    with sqlite3.connect(path, isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM totals").fetchone()
        with pytest.raises(StoreError, match="The user is deleted, but .*users.db is being read"):
            store.delete("<ann>")
        assert store.counts() == Counts(0, 0, 0) and b"<ann>" in bytes_on_disk(path)
        reader.execute("COMMIT")
    reader.close()
    assert not store.delete("<ann>")
    assert b"<ann>" not in bytes_on_disk(path)


def test_what_a_kill_left_of_a_deleted_user_is_gone_after_the_next_start(path, tmp_path, opened, monkeypatch):
    store, killed = opened(f"sqlite:{path}"), tmp_path / "killed"
    store.add({"<ann>": [marked("<ann>", number, 100) for number in range(9)]})
    empty_log = store._empty_log

    def copy_first(wait):
        """Copy the files as they are between the deletion and the emptying of the log."""
        killed.mkdir()
        for file in (path, path.with_name("users.db-wal")):
            shutil.copy(file, killed)
        return empty_log(wait)

    monkeypatch.setattr(store, "_empty_log", copy_first)
    assert store.delete("<ann>")
    assert b"<ann>" in bytes_on_disk(killed / "users.db")
    assert opened(f"sqlite:{killed}/users.db").counts() == Counts(0, 0, 0)
    assert b"<ann>" not in bytes_on_disk(killed / "users.db")


def test_only_the_owner_may_read_the_files(path, opened):
    before = os.umask(0)
    try:
        store = opened(f"sqlite:{path}")
        store.add({"ann": [Event("a", {})]})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == {"users.db": 0o600, "users.db-shm": 0o600, "users.db-wal": 0o600}
    store.close()
    path.chmod(0o644)
    opened(f"sqlite:{path}")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_write_waits_for_the_disk(path, opened):
    """A kill of the process does not show this: the system still writes what the process had handed over."""
    with opened(f"sqlite:{path}")._writing() as connection:
        settings = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]  # FULL


def test_many_may_create_the_same_file_at_once(path, opened):
    barrier, failed = threading.Barrier(6), []

    def opens(number):
        barrier.wait()
        try:
            opened(f"sqlite:{path}").add({str(number): [Event("a", {})]})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=opens, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and opened(f"sqlite:{path}").counts() == Counts(6, 6, 0)


def no_database(path):
    path.write_text("movie,rating\n" * 1000)


def of_another_program(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()


def of_a_later_schema(path):
    open_store(f"sqlite:{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {sqlite_tables.SCHEMA_VERSION + 1}")
    connection.close()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (no_database, "users.db cannot be used as a store: file is not a database"),
        (of_another_program, "users.db is a database of another program"),
        (of_a_later_schema, "users.db has schema version 2, but this program reads version 1"),
        (lambda path: path.mkdir(), "users.db cannot be used as a store: unable to open database file"),
        (lambda path: path.parent.rmdir(), "users.db cannot be used as a store: No such file or directory"),
    ],
    ids=["no database", "another program", "later schema", "folder", "no folder"],
)
def test_a_file_that_is_no_store_is_refused_and_left_as_it_was(tmp_path, make, sentence):
    path = tmp_path / "folder" / "users.db"
    path.parent.mkdir()
    make(path)
    before = (path.read_bytes(), path.chmod(0o644)) if path.is_file() else None
    with pytest.raises(ValueError) as refused:
        open_store(f"sqlite:{path}")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert before is None or (path.read_bytes() == before[0] and path.stat().st_mode & 0o777 == 0o644)


def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="/proc/users.db cannot be used as a store: .*"):
        open_store("sqlite:/proc/users.db")


def test_a_closed_store_says_so(path, opened):
    store = opened(f"sqlite:{path}")
    store.add({"ann": [Event("a", {})]})
    store.close()
    for call in (store.ping, lambda: store.delete("ann"), lambda: store.histories(["ann"])):
        with pytest.raises(StoreError, match="users.db"):
            call()
