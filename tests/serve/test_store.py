"""What every store does, whatever keeps it."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from user_llm.serve.sqlite import SQLiteStore
from user_llm.serve.store import NOBODY, Added, Counts, Event, History, Version, open_store

MODEL = "model-1"


def events(*keys: str) -> list[Event]:
    return [Event(key, {"movie": key, "rating": 3.5}) for key in keys]


def rows(*keys: str) -> list[dict]:
    return [dict(event.row) for event in events(*keys)]


def version(store, user: str = "ann") -> Version:
    return store.versions([user]).get(user, NOBODY)


def at_once(calls: Sequence[Callable]) -> list:
    """Return the results of calls that start at the same time, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def start(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(start, calls))


def test_events_come_back_in_the_order_in_which_they_were_stored(store):
    first = store.add({"ann": events("b", "a"), "bob": events("x")})
    second = store.add({"ann": events("c", "0")})
    assert first["ann"][:2] == (2, 0) and second["ann"][:2] == (2, 0)
    assert second["ann"].version == (first["ann"].version.epoch, 4)
    assert first["ann"].version.epoch != first["bob"].version.epoch
    found = store.histories(["bob", "nobody", "ann"])
    assert found == {
        "ann": History(second["ann"].version, rows("b", "a", "c", "0")),
        "bob": History(first["bob"].version, rows("x")),
    }
    assert store.versions(["ann", "nobody"]) == {"ann": second["ann"].version}
    assert store.counts() == Counts(2, 5, 0)


def test_an_event_that_is_sent_again_is_not_stored_again(store):
    store.add({"ann": events("a", "b")})
    other = Event("a", {"movie": "other"})
    assert store.add({"ann": [other, *events("c", "c")]})["ann"] == Added(1, 2, [], version(store))
    assert store.histories(["ann"])["ann"].rows == rows("a", "b", "c")
    assert store.add({"ann": events("a", "b", "c")})["ann"] == Added(0, 3, [], version(store))
    assert store.add({"bob": events("a")})["bob"].stored == 1  # keys are of a user
    assert store.counts() == Counts(2, 4, 0)


@pytest.mark.parametrize("chunk", [2, 100])
def test_a_user_gets_no_more_than_the_most_events(store, chunk, monkeypatch):
    if not isinstance(store, SQLiteStore):
        monkeypatch.setattr("user_llm.serve.redis.CHUNK", chunk)
    added = store.add({"ann": events("a", "b", "a", "c", "b", "d"), "bob": events("x")}, 2)
    assert added["ann"] == Added(2, 2, [3, 5], version(store)) and added["bob"][:3] == (1, 0, [])
    store.keep(MODEL, {"ann": (version(store), b"state")})
    assert store.add({"ann": events("e", "a")}, 2)["ann"] == Added(0, 1, [0], version(store))
    assert store.states(["ann"], MODEL) == {"ann": b"state"}  # nothing has changed
    assert store.add({"ann": events("e")}, 1)["ann"].beyond == [0]  # a limit that was lowered
    assert store.histories(["ann"])["ann"].rows == rows("a", "b") and store.counts() == Counts(2, 3, 1)
    assert store.add({"ann": events("c", "b")}, 3)["ann"][:3] == (1, 1, [])


def test_without_events_there_is_no_user(store):
    assert store.add({"ann": []}) == {"ann": Added(0, 0, [], NOBODY)} and store.add({}) == {}
    assert store.versions(["ann"]) == store.histories(["ann"]) == store.states(["ann"], MODEL) == store.histories([]) == {}
    assert store.keep(MODEL, {"ann": (NOBODY, b"state")}) == 0 == store.keep(MODEL, {})
    assert not store.delete("ann")
    assert store.counts() == Counts(0, 0, 0)


def test_what_was_stored_is_there_when_the_store_is_opened_again(url, opened):
    store = opened(url)
    added = store.add({"ann": events("a")})["ann"]
    store.keep(MODEL, {"ann": (added.version, b"state")})
    store.add_items([{"id": "1", "title": "One"}])
    store.close()
    again = opened(url)
    assert again.histories(["ann"]) == {"ann": History(added.version, rows("a"))}
    assert again.states(["ann"], MODEL) == {"ann": b"state"}
    assert again.items() == [{"id": "1", "title": "One"}]
    assert again.counts() == Counts(1, 1, 1)


def test_a_state_meets_neither_a_later_event_nor_another_model(store):
    first = store.add({"ann": events("a"), "bob": events("a")})
    kept = {user: (added.version, user.encode() + b"\0\xff") for user, added in first.items()}
    assert store.keep(MODEL, kept) == 2
    assert store.states(["ann", "bob", "nobody"], MODEL) == {"ann": b"ann\0\xff", "bob": b"bob\0\xff"}
    assert store.states(["ann", "bob"], "model-2") == {}
    assert store.keep("model-2", {"ann": (first["ann"].version, b"2")}) == 1
    assert store.states(["ann", "bob"], MODEL) == {"bob": b"bob\0\xff"}  # a user has one state
    assert store.counts().states == 2
    store.add({"ann": events("a")})  # is there already
    assert store.states(["ann"], "model-2") == {"ann": b"2"}
    later = store.add({"ann": events("b")})["ann"].version
    assert store.states(["ann", "bob"], MODEL) == {"bob": b"bob\0\xff"} and store.states(["ann"], "model-2") == {}
    assert store.keep(MODEL, {"ann": (first["ann"].version, b"late"), "bob": (first["bob"].version, b"again")}) == 1
    assert store.states(["ann", "bob"], MODEL) == {"bob": b"again"}
    assert store.keep(MODEL, {"ann": (later, b"")}) == 1
    assert store.states(["ann"], MODEL) == {"ann": b""}
    assert store.counts() == Counts(2, 3, 2)


def test_a_user_who_was_deleted_and_comes_back_is_another_one(store):
    before = store.add({"ann": events("a"), "bob": events("b")})
    for user in before:
        store.keep(MODEL, {user: (before[user].version, b"state")})
    assert store.delete("ann") and not store.delete("ann")
    assert store.versions(["ann", "bob"]) == {"bob": before["bob"].version}
    assert store.states(["ann", "bob"], MODEL) == {"bob": b"state"}
    assert store.counts() == Counts(1, 1, 1)
    after = store.add({"ann": events("a")})["ann"]
    assert after.stored == after.version.events == 1 and after.version.epoch != before["ann"].version.epoch
    assert store.keep(MODEL, {"ann": (before["ann"].version, b"old")}) == 0
    assert store.states(["ann"], MODEL) == {}


def test_items_keep_their_order_and_the_first_row_of_an_id_counts(store):
    assert store.items() == store.items(3) == []
    store.add_items([{"id": "b", "title": "Bé"}, {"id": "a", "title": "A"}, {"id": "b", "title": "B", "categories": ["x"]}])
    store.add_items([{"id": "a", "title": "A2"}, {"id": "0"}])
    store.add_items([])
    assert store.items() == [{"id": "b", "title": "Bé"}, {"id": "a", "title": "A"}, {"id": "0"}]
    assert store.items(2) == [{"id": "0"}] and store.items(3) == []
    for row in ({"title": "A"}, {"id": 3}, {"id": "c", "title": float("nan")}):
        with pytest.raises(ValueError):
            store.add_items([{"id": "d"}, row])
    assert [row["id"] for row in store.items()] == ["b", "a", "0"]


HOSTILE = [
    "", "'", "';DROP TABLE users;--", '"', "a\0b", "a", "a\0", "__proto__", "a:b", "*", "[a]", "é", "e\u0301", "日本", "👩\u200d👩",
    "\ud800", "\udcff", " ", "a b", "\n", "%s", "{}", "x" * 10_000, "x" * 10_000 + "y",
]  # fmt: skip


def test_any_text_names_a_user_or_an_event(store):
    store.add({user: [Event(key, {"of": user, "key": key}) for key in HOSTILE] for user in HOSTILE})
    store.keep(MODEL, {user: (version, repr(user).encode()) for user, version in store.versions(HOSTILE).items()})
    assert store.counts() == Counts(len(HOSTILE), len(HOSTILE) ** 2, len(HOSTILE))
    gone = HOSTILE[::2]
    for user in gone:
        assert store.delete(user)
    kept = HOSTILE[1::2]
    found = store.histories(HOSTILE)
    assert {user: history.rows for user, history in found.items()} == {
        user: [{"of": user, "key": key} for key in HOSTILE] for user in kept
    }
    assert store.states(HOSTILE, MODEL) == {user: repr(user).encode() for user in kept}
    assert all(added.stored == 0 for added in store.add({user: [Event(HOSTILE[0], {})] for user in kept}).values())


def test_a_row_comes_back_as_it_was(store):
    row = {
        "title": "Amélie \0 \ud800 👩 'x' \"y\"", "big": "long " * 400_000, "number": 0.1, "whole": 2**70, "none": None,
        "list": [1, [True, {}]], "": {"a": {"b": "c"}},
    }  # fmt: skip
    store.add({"ann": [Event("a", row), *events("b")]})
    assert store.histories(["ann"])["ann"].rows == [row, *rows("b")]
    state = random.Random(0).randbytes(3_000_000)
    store.keep(MODEL, {"ann": (version(store), state)})
    assert store.states(["ann"], MODEL) == {"ann": state}


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, b"bytes"], ids=["nan", "set", "bytes"])
def test_a_row_that_is_no_json_is_refused_with_all_that_came_with_it(store, bad):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        store.add({"bob": events("b"), "ann": [*events("a"), Event("x", {"rating": bad})]})
    assert store.counts() == Counts(0, 0, 0)


def test_the_same_events_from_many_threads_are_stored_once(url, opened):
    """Four threads share each of two stores, as threads of two server processes do."""
    stores = [opened(url), opened(url)]
    keys = [str(number) for number in range(40)]

    def add(thread):
        order = random.Random(thread).sample(keys, len(keys))
        store, stored = stores[thread % 2], 0
        for start in range(0, len(keys), 8):
            added = store.add({user: events(*order[start : start + 8]) for user in ("ann", "bob")})
            stored += sum(one.stored for one in added.values())
        return stored

    assert sum(at_once([lambda thread=thread: add(thread) for thread in range(8)])) == 2 * len(keys)
    for user, history in stores[0].histories(["ann", "bob"]).items():
        assert sorted(row["movie"] for row in history.rows) == sorted(keys), user
        assert history.version.events == len(keys)
    assert stores[0].counts() == Counts(2, 2 * len(keys), 0)


def test_a_transaction_is_seen_whole_or_not_at_all(store):
    """Events that are always added together, here of many users and in 200 kB, are never seen apart."""
    users = [f"user {number}" for number in range(50)]
    done = threading.Event()

    def write():
        try:
            for number in range(20):
                store.add({user: [Event(str(number), {"title": "long " * 800})] for user in users})
        finally:
            done.set()

    def read():
        seen = 0
        while not done.is_set():
            found = store.versions(users)
            assert len(found) in (0, len(users)) and len({version.events for version in found.values()}) <= 1
            seen += 1
        return seen

    assert at_once([write, read, read])[1]


@pytest.mark.parametrize("seed", range(4))
def test_no_state_meets_another_history(store, seed):
    """Threads add, delete, read and keep at random; a state spells the history that it was computed from.

    Another thread may write between two reads. So a state is compared where the version was the same before and after.
    """
    users = ["ann", "bob"]
    compared = [0] * 8

    def act(thread):
        rng = random.Random(100 * seed + thread)
        for step in range(60):
            user = rng.choice(users)
            (action,) = rng.choices(["add", "keep", "check", "delete"], weights=[4, 6, 6, 1])
            if action == "add":
                store.add({user: events(f"{thread}-{step}")})
            elif action == "delete":
                store.delete(user)
            elif action == "keep":
                found = store.histories(users)
                store.keep(MODEL, {one: (history.version, repr(history).encode()) for one, history in found.items()})
            else:
                before = store.histories([user])
                state = store.states([user], MODEL)
                if state and user in before and store.versions([user]).get(user) == before[user].version:
                    assert state[user] == repr(before[user]).encode()
                    compared[thread] += 1

    at_once([lambda thread=thread: act(thread) for thread in range(8)])
    found = store.histories(users)
    store.keep(MODEL, {user: (history.version, repr(history).encode()) for user, history in found.items()})
    assert store.states(users, MODEL) == {user: repr(history).encode() for user, history in found.items()}
    assert store.counts() == Counts(len(found), sum(len(history.rows) for history in found.values()), len(found))
    assert sum(compared)


@pytest.mark.parametrize(
    "url", ["", "users.db", "sqlite", "sqlite:", "sqlite::memory:", "sqlite://users.db", "mysql://a:secret@b/c"]
)
def test_a_url_of_no_known_form_is_refused_in_one_sentence(url):
    with pytest.raises(ValueError, match=r"sqlite:(FILE|users.db)") as refused:
        open_store(url)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
