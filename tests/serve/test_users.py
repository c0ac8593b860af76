"""Users over HTTP: what is stored, refused and repeated; and answers that belong to the user's events at that moment."""

import asyncio
import csv
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import quote

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from user_llm.serve.limits import Limits
from user_llm.serve.users import Users
from user_llm.serving.user import User


@pytest.fixture
def http(server) -> httpx2.Client:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def event(item: str = "10", time: int = 0, **more) -> dict:
    return {"item": item, "rating": 3, "timestamp": time, **more}


def kept(model, rows: list[dict], name: str) -> User:
    """Return a user as the store keeps it."""
    return User.from_bytes(model.encode([{**row, "user": name} for row in rows]).to_bytes())


def ranked(model, rows: list[dict], name: str, **choice) -> list[tuple]:
    user = kept(model, rows, name) if rows else model.reader.nobody()
    return [(item.id, item.title) for item in model.recommend(user, **{"k": 10} | choice)]


def got(http, name: str, **params) -> list[tuple]:
    answer = http.get(f"/v1/users/{quote(name, safe='')}/recommendations", params=params)
    assert answer.status_code == 200, answer.text
    items = answer.json()["items"]
    assert [item["rank"] for item in items] == list(range(1, len(items) + 1))
    return [(item["id"], item["title"]) for item in items]


def test_events_are_stored_once_and_refused_one_by_one(http, model):
    rows = [
        event("10", 1),
        event("20", 2),
        event("no such", 3),
        event("20", "soon"),
        event("30", 4, rating=77),
        "text",
        event("40", 5, user="other"),
    ]
    answer = http.post("/v1/users/a1/events", json={"events": rows}).json()
    reasons = {one["place"]: one["reason"] for one in answer.pop("reasons")}
    assert answer == {"stored": 3, "repeated": 0, "refused": 4, "unknown_items": 1, "id": "a1", "events": 3}
    assert sorted(reasons) == [3, 4, 5, 6] and "'soon'" in reasons[3] and "another user" in reasons[6]
    assert all(reason.endswith(".") and "\n" not in reason for reason in reasons.values())
    again = http.post("/v1/users/a1/events", json=[event("20", 2, rating=5), event("50", 6)]).json()
    assert (again["stored"], again["repeated"], again["events"]) == (1, 1, 4)
    look = http.get("/v1/users/a1").json()
    assert (look["events"], look["counted"], look["unknown"], look["last_time"]) == (4, 3, 1, 6.0)
    rows = http.get("/v1/users/a1/events").json()["events"]
    assert [row["item"] for row in rows] == ["10", "20", "no such", "50"] and rows[0] == {**event("10", 1), "user": "a1"}
    odd = [event(user=7.5), event(user=["a1"]), event(user=None, time=8), {**event(time=9), "more": "\ud800"}]
    answer = http.post("/v1/users/a1/events", content=json.dumps(odd)).json()
    assert (answer["stored"], answer["refused"]) == (2, 2)
    assert http.get("/v1/users/a1/events").json()["events"][-1]["more"] == "\ud800"
    many = http.post("/v1/users/a1/events", json=[event("20", "soon")] * 500).json()
    assert many["refused"] == 500 and len(many["reasons"]) == 100
    nothing = http.post("/v1/users/a1/events", json=[event("20", "soon")])
    assert nothing.status_code == 422 and nothing.json()["refused"] == 1


def test_a_user_has_at_most_so_many_events_of_at_most_so_many_bytes(serve, model):
    with serve(model, user_events=3, event_bytes=200) as served, httpx2.Client(base_url=served.url, timeout=60) as http:
        long = event("10", 7, more="x" * 200)
        answer = http.post("/v1/users/m1/events", json=[event("10", 1), long, event("no", 2), event("20", 3), event("30", 4)])
        assert answer.status_code == 200
        reasons = {one["place"]: one["reason"] for one in answer.json()["reasons"]}
        assert sorted(reasons) == [1, 4] and "more than 200" in reasons[1] and "at most 3 events" in reasons[4]
        assert (answer.json()["stored"], answer.json()["refused"], answer.json()["events"]) == (3, 2, 3)
        rows = [event("20", 3), event("40", 5), event("10", 1, user="m2")]
        answer = http.post(
            "/v1/events", content=json.dumps({**rows[0], "user": "m1"}) + "\n" + json.dumps({**rows[1], "user": "m1"}) + "\n" + json.dumps(rows[2]),
            headers={"content-type": "application/x-ndjson"},
        ).json()  # fmt: skip
        assert (answer["stored"], answer["repeated"], answer["refused"]) == (1, 1, 1) and answer["reasons"][0]["place"] == 1
        full = http.post("/v1/users/m1/events", json=event("40", 5))
        assert full.status_code == 422 and full.json()["events"] == 3
        assert http.post("/v1/users/m1/events", json=event("10", 1)).json()["repeated"] == 1
        assert [row["item"] for row in http.get("/v1/users/m1/events").json()["events"]] == ["10", "no", "20"]


def test_keys_tell_events_apart(http):
    rows, keys = [event("10", 1), event("10", 1)], ["first", "second"]
    assert http.post("/v1/users/k1/events", json={"events": rows, "keys": keys}).json()["stored"] == 2
    assert http.post("/v1/users/k1/events", json={"events": [event("20", 9)], "keys": ["first"]}).json()["repeated"] == 1
    for wrong, words in (
        ({"keys": ["one"]}, "1 keys for 2"),
        ({"keys": "x"}, "list"),
        ({"kyes": keys}, "'kyes'"),
        ({"keys": ["", "b"]}, "A key is"),
    ):
        answer = http.post("/v1/users/k1/events", json={"events": rows, **wrong})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_recommendations_and_explanations_are_the_models(http, model, made):
    name = "r1"
    rows = [{**row, "user": name} for row in made.rows(2)]
    assert got(http, name) == ranked(model, [], name)  # a user without events
    http.post(f"/v1/users/{name}/events", json=rows[:4])
    assert got(http, name) == ranked(model, rows[:4], name)
    assert got(http, name) == ranked(model, rows[:4], name)  # from memory
    assert got(http, name, k=2, seen=False) == ranked(model, rows[:4], name, k=2, seen=False)
    assert got(http, name, allow=["10", "30"], deny=["30"]) == ranked(model, rows[:4], name, allow=["10", "30"], deny=["30"])
    http.post(f"/v1/users/{name}/events", json=rows[4:])
    assert got(http, name) == ranked(model, rows, name)
    seen = http.get(f"/v1/users/{name}/explain", params={"k": 3}).json()["events"]
    assert [(one["id"], one["events_ago"]) for one in seen] == [
        (one.id, one.events_ago) for one in model.explain(kept(model, rows, name), 3)
    ]
    for params, words in (({"k": 0}, "k: "), ({"k": 10**6}, "at most"), ({"allow": "no"}, "'no'")):
        answer = http.get(f"/v1/users/{name}/recommendations", params=params)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_a_deletion_that_nobody_waits_for_ends_as_any_other():
    """What a request computes between the cancellation and the end of the store's work is forgotten, too."""
    began, go, forgotten = threading.Event(), threading.Event(), []

    def delete(user: str) -> bool:
        began.set()
        go.wait(30)
        forgotten.append("the store")
        return True

    async def cancelled() -> None:
        store, states = SimpleNamespace(delete=delete), SimpleNamespace(forget=forgotten.append)
        deletion = asyncio.create_task(Users(store, states, lambda: None, Limits()).delete("u"))
        await asyncio.to_thread(began.wait, 30)
        deletion.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deletion
        assert forgotten == ["u"]
        go.set()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(cancelled())
    assert forgotten == ["u", "the store", "u"]


def test_a_deleted_user_is_gone_everywhere(http, model, made):
    rows = made.rows(1)
    http.post("/v1/users/d1/events", json=[{**row, "user": "d1"} for row in rows])
    assert got(http, "d1") == ranked(model, rows, "d1") != ranked(model, [], "d1")
    assert http.delete("/v1/users/d1").json() == {"id": "d1", "deleted": True}
    assert got(http, "d1") == ranked(model, [], "d1")
    assert http.get("/v1/users/d1").status_code == http.get("/v1/users/d1/events").status_code == 404
    assert http.delete("/v1/users/d1").status_code == 404
    http.post("/v1/users/d1/events", json=[{**row, "user": "d1"} for row in rows[1:] + rows[:1]])
    assert got(http, "d1") == ranked(model, rows, "d1")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_files_of_events_of_many_users(http, model, made, form):
    rows = [{**row, "user": f"{form}-{row['user']}"} for user in range(3) for row in made.rows(user)]
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        body, kind = text.getvalue().encode(), "text/csv"
    elif form == "jsonl":
        body, kind = "".join(json.dumps(row) + "\n" for row in rows).encode(), "application/x-ndjson"
    else:
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        body, kind = file.getvalue(), "application/vnd.apache.parquet"
    answer = http.post("/v1/events", content=body, headers={"content-type": kind}).json()
    assert (answer["stored"], answer["refused"], answer["users"]) == (len(rows), 0, 3)
    for user in range(3):
        name = f"{form}-u{user}"
        assert got(http, name) == ranked(model, made.rows(user), name)
    bad = http.post("/v1/events", content=b'"a', headers={"content-type": kind})
    assert bad.status_code in (400, 422) and "\n" not in bad.text


@pytest.mark.parametrize("name", ["Ünï côdé ✓", "a'b\"c", "__proto__", "%00x", "?k=1#x", "*", "007", "1e3", "a\\b"])
def test_any_printable_text_is_a_users_id(http, model, name):
    path = f"/v1/users/{quote(name, safe='')}"
    stored = http.post(f"{path}/events", json=[event("10", 1)])
    assert stored.json()["events"] == 1
    assert got(http, name) == ranked(model, [event("10", 1)], name)
    assert http.delete(path).json()["deleted"]


@pytest.mark.parametrize("name", ["a\nb", " a", "a ", "x" * 257, "null", "NaN", "\u202e"])
def test_other_ids_are_refused(http, name):
    answer = http.post(f"/v1/users/{quote(name, safe='')}/events", json=[event("10", 1)])
    assert answer.status_code in (400, 422) and "\n" not in answer.text, answer.text


@pytest.mark.parametrize("name", ["%ff", "%F0%9F", "a%80"])
def test_bytes_that_are_no_utf_8_name_nobody(http, name):
    answer = http.post(f"/v1/users/{name}/events", json=[event("10", 1)])
    assert answer.status_code in (400, 422) and "not UTF-8" in answer.text


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_file_with_two_columns_of_a_name_is_refused(http, form):
    body, kind = b"item,user,item\n10,c1,11\n", "text/csv"
    if form == "parquet":
        file, kind = io.BytesIO(), "application/vnd.apache.parquet"
        pq.write_table(pa.table([["10"], ["c1"], ["11"]], names=["item", "user", "item"]), file)
        body = file.getvalue()
    answer = http.post("/v1/events", content=body, headers={"content-type": kind})
    assert answer.status_code in (400, 422) and "2 columns 'item'" in answer.text


@pytest.mark.parametrize("name", ["a/b", ".", ".."])
def test_an_id_that_no_path_can_name_is_refused_wherever_it_comes(http, name):
    answer = http.post(
        "/v1/events", content=json.dumps(event("10", 1, user=name)), headers={"content-type": "application/x-ndjson"}
    )
    assert answer.status_code == 422 and "cannot be part of a path" in answer.text
    chat = http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "user": name})
    assert chat.status_code == 400 and "cannot be part of a path" in chat.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'[{"item": NaN}]', b"[" * 100_000, b"\xff", b'{"events": {}}', b"[1, [2]]"]
)
def test_bodies_that_hold_no_events_are_refused(http, body):
    answer = http.post("/v1/users/b1/events", content=body)
    assert answer.status_code in (400, 422) and len(answer.text) < 2000
    assert http.get("/v1/users/b1").status_code == 404


def test_no_user_is_ever_answered_with_another_state(server, model, made):
    """Threads add to, delete and ask about the same users; each answer is of events that this user had at some moment of the request."""
    pools = {f"c{number}": [{**row, "user": f"c{number}"} for row in made.rows(number)] for number in range(4)}
    expected = {
        name: {tuple(ranked(model, rows[:count], name)) for count in range(len(rows) + 1)} for name, rows in pools.items()
    }
    only = {
        name: found - set.union(*(other for key, other in expected.items() if key != name)) for name, found in expected.items()
    }
    assert all(only.values())  # the test can tell the users apart
    turns, wrong = {name: threading.Lock() for name in pools}, []

    def change(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with httpx2.Client(base_url=server.url, timeout=60) as http:
            for _ in range(12):
                name = f"c{rng.integers(4)}"
                with turns[name]:  # so that events are always the first ones
                    if rng.random() < 0.3:
                        http.delete(f"/v1/users/{name}")
                    else:
                        http.post(f"/v1/users/{name}/events", json=pools[name][: int(rng.integers(1, len(pools[name]) + 1))])

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with httpx2.Client(base_url=server.url, timeout=60) as http:
            for _ in range(15):
                name = f"c{rng.integers(4)}"
                if (found := tuple(got(http, name))) not in expected[name]:
                    wrong.append((name, found))

    with ThreadPoolExecutor(6) as threads:
        for one in [*(threads.submit(change, seed) for seed in range(2)), *(threads.submit(ask, seed) for seed in range(4))]:
            one.result()
    assert wrong == []
