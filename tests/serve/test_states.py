"""Users' states: each is computed once for all who want it, and nothing of a user who is deleted meanwhile is kept."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest


@pytest.fixture
def http(server) -> httpx2.Client:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def held(server, monkeypatch):
    """A gate that encodings of the server wait at, and a list of the number of events of each user who came there."""
    engine, gate, came = server.state.engine, threading.Event(), []
    real = engine._answers

    def answers(question, about):
        came.extend(user.count for user in about)
        gate.wait(30)
        return real(question, about)

    monkeypatch.setattr(engine, "_answers", answers)
    yield gate, came
    gate.set()


def add(http, user: str, *times: int) -> None:
    rows = [{"item": "10", "rating": 3, "timestamp": time} for time in times]
    assert http.post(f"/v1/users/{user}/events", json=rows).json()["stored"] == len(rows)


def wait_for(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def test_requests_of_one_moment_compute_a_state_once(server, http, held):
    gate, came = held
    add(http, "s1", 1, 2)
    with ThreadPoolExecutor(6) as threads:
        early = [threads.submit(http.get, "/v1/users/s1") for _ in range(4)]
        wait_for(lambda: came)
        add(http, "s1", 3)
        late = [threads.submit(http.get, "/v1/users/s1") for _ in range(2)]
        gate.set()
        early, late = ([one.result().json()["counted"] for one in some] for some in (early, late))
    assert set(early) <= {2, 3} and late == [3, 3]
    assert http.get("/v1/users/s1").json()["counted"] == 3 and came == [2, 3]
    assert not server.state.states._owners


def test_what_is_computed_while_the_user_is_deleted_is_kept_nowhere(server, http, held):
    gate, came = held
    add(http, "s2", 1)
    states = server.state.store.counts().states
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(http.get, "/v1/users/s2")
        wait_for(lambda: came)
        assert http.delete("/v1/users/s2").json()["deleted"]
        gate.set()
        asked.result()
    assert "s2" not in server.state.states._cache and server.state.store.counts().states == states


def test_a_state_that_fails_is_computed_again_by_the_next_request(server, http, monkeypatch):
    add(http, "s3", 1)
    with monkeypatch.context() as patch:
        patch.setattr(server.state.engine, "_answers", lambda question, about: 1 / 0)
        with ThreadPoolExecutor(3) as threads:
            assert {one.status_code for one in threads.map(http.get, ["/v1/users/s3"] * 3)} == {500}
    assert http.get("/v1/users/s3").json()["counted"] == 1
