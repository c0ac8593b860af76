"""Who may ask, from where and how much; and what is logged of it."""

import errno
import json
import logging
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from absl import logging as absl_logging

from user_llm.serve import app
from user_llm.serve import server as process
from user_llm.serve.keys import add_key, read_keys
from user_llm.serve.limits import Limits
from user_llm.serve.store import StoreError

BODY = {"model": "tiny", "prompt": "Secret words", "user": "secret-user", "max_tokens": 3}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    made = {scopes: add_key(file, f"holder:{scopes}") for scopes in ("read", "write", "items", "read,write")}
    assert file.stat().st_mode & 0o077 == 0 and not any(key in file.read_text() for key in made.values())
    return read_keys(file), made


@pytest.fixture(scope="module")
def guarded(serve, model, keys):
    with serve(model, keys=keys[0], body_bytes=5000, events=5) as served:
        yield served


def test_keys_open_what_their_scopes_name(guarded, keys):
    for scopes, key in [*keys[1].items(), ("", "ul-wrong"), ("", "")]:
        with httpx2.Client(base_url=guarded.url, headers={"authorization": f"Bearer {key}"} if key else {}) as http:
            reads = [http.get(path) for path in ("/v1/models", "/v1/users/u", "/v1/users/u/recommendations", "/metrics")]
            reads.append(http.post("/v1/completions", json=BODY))
            event = {"item": "10", "rating": 3, "timestamp": 1}
            writes = [http.post("/v1/users/u/events", json=event), http.delete("/v1/users/u")]
            adds = [http.post("/v1/items", json=[{"id": "10"}])]
            for answers, scope in ((reads, "read"), (writes, "write"), (adds, "items")):
                for answer in answers:
                    if not scopes:
                        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                    elif scope in scopes.split(","):
                        assert answer.status_code in (200, 404), answer.text
                    else:
                        assert answer.status_code == 403 and repr(scope) in answer.text
            assert http.get("/health").status_code == http.get("/ready").status_code == http.get("/").status_code == 200


def test_without_keys_only_this_machine_and_this_page_are_answered(server):
    for headers, status in (
        ({"host": "localhost:1"}, 200), ({"host": "127.0.0.1"}, 200), ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403), ({"host": "127.0.0.1.evil.example"}, 403), ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403), ({"origin": server.url}, 200),
    ):  # fmt: skip
        assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == status, headers


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(guarded, keys):
    headers = {"authorization": f"Bearer {keys[1]['read,write']}"}
    large = b'{"item": "' + b"x" * 6000 + b'"}'
    parts = (large[place : place + 100] for place in range(0, len(large), 100))
    for content in (large, parts):
        answer = httpx2.post(f"{guarded.url}/v1/users/u/events", content=content, headers=headers)
        assert answer.status_code == 413 and "more than 5000 bytes" in answer.text
    many = [{"item": "10", "rating": 3, "timestamp": time} for time in range(6)]
    answer = httpx2.post(f"{guarded.url}/v1/users/u/events", json=many, headers=headers)
    assert answer.status_code == 400 and "at most 5" in answer.text


def test_bodies_in_progress_are_bounded_all_together(serve, model):
    """A client that announces much, and sends nothing of it, leaves room for small requests alone, until it goes."""
    with serve(model, body_bytes=5000, bodies_bytes=6000, small_body_bytes=100) as served:
        host, port = served.url.removeprefix("http://").split(":")
        path, event = f"{served.url}/v1/users/b/events", {"item": "10", "rating": 3, "timestamp": 1}
        head = f"POST /v1/users/a/events HTTP/1.1\r\nhost: {host}\r\ncontent-length: 5000\r\n\r\n".encode()
        large = json.dumps([event] * 30).encode()
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(head)
            answers = posted(path, large, until=503)
            assert answers[-1].headers["retry-after"] == "1" and "try again" in answers[-1].json()["error"]["message"]
            parts = (large[place : place + 100] for place in range(0, len(large), 100))
            assert httpx2.post(path, content=parts).status_code == 503  # a body that does not say how large it is
            assert httpx2.post(path, json=event).status_code == httpx2.get(f"{served.url}/health").status_code == 200
        posted(path, large, until=200)
        for _ in range(8):  # nothing stays set aside
            assert httpx2.post(path, content=large).status_code == 200
            assert httpx2.post(path, content=b"x" * 5001).status_code == 413
    with pytest.raises(ValueError, match="bodies_bytes=10 must be at least body_bytes=11"):
        Limits(body_bytes=11, bodies_bytes=10)


def test_bodies_that_do_not_come_give_their_room_back_and_leave_some_for_small_ones(serve, model):
    """The room is taken whole by a client that sends nothing: it is refused soon, and small requests are answered meanwhile."""
    with serve(model, body_bytes=5000, bodies_bytes=5000, small_body_bytes=100, body_seconds=1) as served:
        host, port = served.url.removeprefix("http://").split(":")
        path, event = f"{served.url}/v1/users/c/events", {"item": "10", "rating": 3, "timestamp": 1}
        large = json.dumps([event] * 30).encode()
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(f"POST /v1/users/a/events HTTP/1.1\r\nhost: {host}\r\ncontent-length: 5000\r\n\r\n".encode())
            posted(path, large, until=503)
            assert httpx2.post(path, json=event).status_code == 200
            answer = b"".join(iter(lambda: slow.recv(4096), b""))  # until the server closes the connection
            assert b" 408 " in answer and b"has not come within 1 s" in answer
            posted(path, large, until=200)


def posted(url: str, content: bytes, until: int) -> list[httpx2.Response]:
    """Post a body again and again until it is answered with a status."""
    answers = [httpx2.post(url, content=content)]
    while answers[-1].status_code != until:
        assert len(answers) < 500
        time.sleep(0.01)
        answers.append(httpx2.post(url, content=content))
    return answers


def test_the_log_has_a_line_without_contents(server, caplog):
    absl_logging.set_verbosity(absl_logging.INFO)
    with caplog.at_level(logging.INFO, logger="absl"):
        httpx2.post(f"{server.url}/v1/completions", json=BODY)
        httpx2.get(f"{server.url}/v1/users/secret-user")
        httpx2.get(f"{server.url}/secret-path")
        while sum(record.message.startswith("{") for record in caplog.records) < 3:  # a line comes after its answer
            time.sleep(0.01)
    lines = [json.loads(record.message) for record in caplog.records if record.message.startswith("{")]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/v1/completions", 200),
        ("/v1/users/{user}", 404),
        ("none", 404),
    ]
    assert lines[0]["completion_tokens"] == 3 and "ecret" not in caplog.text


def test_unknown_paths_and_methods_end_in_a_sentence(server):
    for answer in (httpx2.get(f"{server.url}/no"), httpx2.put(f"{server.url}/v1/models")):
        assert answer.status_code in (404, 405) and answer.json()["error"]["message"]


def test_metrics_count_what_happened(server):
    before = metrics(server)
    httpx2.post(f"{server.url}/v1/completions", json=BODY)
    after = metrics(server)
    assert after["user_llm_tokens_total"] - before["user_llm_tokens_total"] == 3
    count = 'user_llm_requests_total{route="/v1/completions",status="200"}'
    assert after[count] - before.get(count, 0) == 1
    assert after["user_llm_time_to_first_token_seconds_count"] - before["user_llm_time_to_first_token_seconds_count"] == 1
    assert after['user_llm_store{what="users"}'] >= 0 and after["user_llm_rows_in_use"] == 0 and after["user_llm_store_up"] == 1


@pytest.mark.parametrize("hangs", [False, True])
def test_metrics_are_answered_where_the_store_is_not(server, monkeypatch, hangs):
    metrics(server)
    go = threading.Event()

    def counts():
        go.wait(30 if hangs else 0)
        raise StoreError("The store failed.")

    monkeypatch.setattr(server.state.store, "counts", counts)
    monkeypatch.setattr(app, "STORE_SECONDS", 0.1)
    found = metrics(server)
    go.set()
    assert found["user_llm_store_up"] == 0 and 'user_llm_store{what="users"}' not in found
    monkeypatch.undo()
    assert metrics(server)['user_llm_store{what="users"}'] >= 0


def metrics(server) -> dict[str, float]:
    answer = httpx2.get(f"{server.url}/metrics")
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "--host=0.0.0.0 can be reached from other machines"),
        ({"host": "example.org"}, "can be reached from other machines"),
        ({"host": "0.0.0.0", "api_keys": "none.txt"}, "cannot be read from none.txt"),
        ({"model": ""}, "--model is missing"),
        ({"store": "sqlite:users.db"}, "There is no model at nowhere"),
        ({"store": "mongo:x"}, "not of a known form"),
    ],
)
def test_a_server_that_cannot_be_started_says_why_in_a_sentence(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        process.serve(process.Options(**{"model": "nowhere", "port": 0, **options}))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_address_that_cannot_be_had_is_refused_before_anything_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with process.listening("127.0.0.1", 0) as (taken,):
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at 127.0.0.1, port {port}: Address already in use\. Name another"):
            process.serve(process.Options("nowhere", port=port))
    with process.listening("127.0.0.1", port):  # it is free again
        pass
    with pytest.raises(OSError, match="cannot listen at no host, port 1: "), process.listening("no host", 1):
        pass
    assert not list(tmp_path.iterdir())


def test_another_free_port_is_tried_where_one_is_taken_at_an_address_of_the_host(monkeypatch):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    create, asked = socket.create_server, []

    def create_server(address, family):
        asked.append(address)
        if len(asked) == 2:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return create(address, family=family)

    monkeypatch.setattr(socket, "create_server", create_server)
    with process.listening("localhost", 0) as sockets:
        assert len({one.getsockname()[1] for one in sockets}) == 1 and len(sockets) == 2
    assert [address[0] for address in asked] == ["127.0.0.1", "127.0.0.2"] * 2


@pytest.mark.parametrize(
    ("file", "spelled", "words"), [("", "app:read", "--new_key needs"), ("k.txt", "app:all", "name a holder and scopes")]
)
def test_a_key_that_cannot_be_made_is_refused(file, spelled, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        add_key(file, spelled)
    assert not (tmp_path / "k.txt").exists()


def test_a_key_is_made_by_the_command(tmp_path):
    command = [sys.executable, "-m", "user_llm.serve", f"--api_keys={tmp_path}/keys.txt", "--new_key=app:read,write"]
    key = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    holder = read_keys(tmp_path / "keys.txt").holder(key)
    assert holder.name == "app" and holder.scopes == {"read", "write"}
    assert read_keys(tmp_path / "keys.txt").holder(key[:-1]) is None
