"""Items that are added to a running server: known at once and after a restart, to all processes of a store, beside other requests."""

import asyncio
import dataclasses
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx2
import pytest

from user_llm.serve import items
from user_llm.serve.engine import Engine
from user_llm.serve.items import Items, with_items
from user_llm.serve.limits import Limits
from user_llm.serve.store import open_store

NEW = {"id": "new", "title": "A new film", "genres": ["Drama"]}


def client(served) -> httpx2.Client:
    return httpx2.Client(base_url=served.url, timeout=60)


def event(item: str, time: int) -> dict:
    return {"item": item, "rating": 3, "timestamp": time}


def ids(http, user: str, **params) -> list[str]:
    answer = http.get(f"/v1/users/{user}/recommendations", params={"k": 20} | params)
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["items"]]


def test_an_added_item_is_encoded_and_recommended_at_once(serve, model, tmp_path):
    """A user's events of an item that was unknown count from then on; other users' states are not computed again."""
    store = f"sqlite:{tmp_path}/users.db"
    with serve(model, store=store) as served, client(served) as http:
        http.post("/v1/users/ann/events", json=[event("10", 1), event("new", 2)])
        http.post("/v1/users/bob/events", json=[event("10", 1)])
        assert "new" not in ids(http, "ann") + ids(http, "bob") and http.get("/v1/users/ann").json()["unknown"] == 1
        encoded = served.state.metrics.encodings._value.get()
        answer = http.post("/v1/items", json=[NEW, NEW, {"id": "10"}])
        assert (answer.status_code, answer.json()) == (200, {"added": 1, "known": 2, "items": 10})
        assert "new" in ids(http, "bob") and served.state.metrics.encodings._value.get() == encoded
        assert (look := http.get("/v1/users/ann").json())["unknown"] == 0 and look["counted"] == 2
        assert "new" in ids(http, "ann") and "new" not in ids(http, "ann", seen=False)
        assert http.get("/v1/items", params={"q": "a NEW"}).json()["items"] == [{"id": "new", "title": "A new film"}]
        wanted, grown = {user: ids(http, user) for user in ("ann", "bob")}, served.state.engine.model
    with closing(open_store(store)) as opened:
        restarted = with_items(model, opened.items())
    assert restarted.mark == grown.mark
    with serve(restarted, store=store) as served, client(served) as http:
        assert {user: ids(http, user) for user in wanted} == wanted
        assert served.state.metrics.encodings._value.get() == 0  # the states that were kept are those of this model


def test_two_processes_of_a_store_number_items_alike(serve, model, tmp_path, monkeypatch):
    monkeypatch.setattr(items, "SECONDS", 0.0)
    store = f"sqlite:{tmp_path}/users.db"
    with serve(model, store=store) as one, serve(model, store=store) as other, client(one) as first, client(other) as second:
        assert first.post("/v1/items", json=[NEW]).json()["added"] == 1
        assert second.post("/v1/items", json={"items": [{"id": "next"}, NEW]}).json() == {"added": 1, "known": 1, "items": 11}
        first.post("/v1/users/ann/events", json=[event("next", 1), event("new", 2)])
        assert ids(first, "ann") == ids(second, "ann") and len(ids(first, "ann")) == 11
        assert one.state.engine.model.mark == other.state.engine.model.mark
        answer = second.post("/v1/items", json=[NEW | {"title": "Another"}])
        assert answer.status_code == 400 and "'new' is there already" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_items_come_beside_other_requests(serve, model):
    """More than there are rows for: programs are compiled anew while others ask."""
    with serve(model, queue=1000) as served, client(served) as http:
        http.post("/v1/users/ann/events", json=[event("10", 1)])

        def add(number: int) -> int:
            return http.post("/v1/items", json=[{"id": f"{number}-{n}", "genres": ["War"]} for n in range(30)]).json()["added"]

        with ThreadPoolExecutor(8) as pool:
            added = [pool.submit(add, number % 5) for number in range(10)]
            rankings = [pool.submit(ids, http, "ann", k=500) for _ in range(20)]
            assert sum(one.result() for one in added) == 150
            assert all(len(set(one.result())) == len(one.result()) >= 9 for one in rankings)
        assert len(ids(http, "ann", k=500)) == 159
        assert [row["id"] for row in served.state.store.items()] == served.state.engine.model.vocabulary.catalogue.keys[10:]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "not empty"),
        ({"items": []}, "not empty"),
        ({"id": "a"}, "a list of items"),
        ("text", "a list of items"),
        ([{"id": "a", "title": " "}], "row 1: a title is a text that is not blank"),
        ([{"id": "a"}, {"title": "b"}], "row 2: an item's id"),
        ([{"id": "a", "genres": {"War": 1}}], "genres are a list of texts"),
        ([{"id": "10", "title": "Another"}], "'10' is there already"),
        ([{"id": "a" * 257}], "An item's id is a text of 1 to 256 printable characters"),
        ([{"id": "a", "title": "A", "genres": ["War" * 30_000]}], "The item 'a' takes more than 65536 bytes"),
        ([{"id": str(n)} for n in range(8)], "8 items: a request has at most 7"),
        ([{"id": str(n)} for n in range(100, 107)], "7 added items, and at most 6"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_and_not_stored(few, body, words):
    answer = few.post("/v1/items", json=body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert few.get("/v1/items", params={"id": ["a", "0", "100"]}).json() == {"items": []}
    assert few.post("/v1/items", content=b"[{]").status_code == 400


@pytest.fixture(scope="module")
def few(serve, model):
    """A server that takes few items."""
    with serve(model, events=7, items=6) as served, client(served) as http:
        yield http
        assert served.state.store.items() == []


def test_rows_that_do_not_fit_a_model_leave_it_as_it_is(model):
    assert with_items(model, [{"id": "10", "title": "Else"}]) is model
    assert with_items(model, [NEW, {"id": "a", "title": " "}]) is model


def test_bags_of_another_model_are_left_out(model):
    """A row that was stored while a model with a further bag was served keeps no other row from this model."""
    found = with_items(model, [NEW, {"id": "a", "colours": ["red"]}])
    assert found.mark == model.add_items([NEW, {"id": "a"}]).mark


def test_the_store_keeps_what_a_model_reads_and_no_more(serve, model):
    with serve(model) as served, client(served) as http:
        assert http.post("/v1/items", json=[NEW | {"id": 7, "events": "x" * 1000}]).json()["added"] == 1
        assert served.state.store.items() == [NEW | {"id": "7"}]


class Growing:
    """An engine, as far as items see it, whose model takes its time to grow, or cannot."""

    def __init__(self, model, error: Exception | None = None):
        self.model, self.error, self.begun, self.go = model, error, threading.Event(), threading.Event()

    def compile(self, model) -> None:
        if self.error:
            raise self.error
        self.begun.set()
        assert self.go.wait(60)

    def grow(self, model) -> None:
        self.compile(model)
        self.model = model


def test_requests_do_not_wait_while_items_are_added(model, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(items, "SECONDS", 0.0)
    engine = Growing(model)
    found = Items(opened(f"sqlite:{tmp_path}/users.db"), lambda: engine, Limits())

    async def both() -> int:
        adding = asyncio.create_task(found.add([NEW]))
        await asyncio.to_thread(engine.begun.wait, 60)
        await found.current()
        assert not adding.done() and engine.model is model
        engine.go.set()
        return await adding

    assert asyncio.run(both()) == 1 and engine.model.vocabulary.knows("new")


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED"), ValueError("the same title")])
def test_what_cannot_be_served_is_not_stored_and_stops_nobody(model, opened, tmp_path, error):
    store = opened(f"sqlite:{tmp_path}/users.db")
    engine = Growing(model, error)
    found = Items(store, lambda: engine, Limits())
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(found.add([NEW]))
    assert store.items() == []
    store.add_items([NEW])  # by another process
    asyncio.run(Items(store, lambda: engine, Limits()).current())
    assert engine.model is model


def test_a_store_of_before_gets_its_table(tmp_path):
    """A file that an earlier version wrote has no table of added items."""
    path = tmp_path / "users.db"
    open_store(f"sqlite:{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE added_items")
    connection.close()
    store = open_store(f"sqlite:{path}")
    store.add_items([NEW])
    assert store.items() == [NEW]
    store.close()


def test_a_model_without_an_item_head_compiles_before_it_takes_the_place(model, monkeypatch):
    """Its programs hold the titles of all items, so that one more item needs other programs even where there are rows for it."""
    asked = []
    monkeypatch.setattr("user_llm.serve.engine.ask", lambda model, limits: asked.append(model))
    for ranks in (True, False):
        engine = Engine(dataclasses.replace(model, predictor=dataclasses.replace(model.predictor, ranks=ranks)), Limits())
        grown = engine.model.add_items([NEW])
        one_more = grown.add_items([{"id": "b"}])  # there is a row for it
        engine.grow(grown)
        engine.grow(one_more)
        assert engine.model is one_more and asked == ([grown] if ranks else [grown, one_more])
        asked.clear()
