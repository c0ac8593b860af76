"""The server as a process: killed while it stores, told to end, and given another model."""

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from user_llm.serve.store import open_store

KILLS = int(os.environ.get("USER_LLM_KILLS", "3"))


@contextmanager
def process(model: Path, folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start a server; yield its process and its address."""
    command = [sys.executable, "-m", "user_llm.serve", f"--model={model}", f"--store=sqlite:{folder}/users.db", "--port=0"]
    command += ["--rows=2", "--context=64", *flags]
    with (
        open(folder / "log.txt", "ab") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as started,
    ):
        try:
            line = started.stdout.readline()
            assert (found := re.search(r"http://\S+", line)), (line, (folder / "log.txt").read_text()[-2000:])
            yield started, found[0]
        finally:
            started.kill()


def ready(url: str) -> None:
    for _ in range(3000):
        if httpx2.get(f"{url}/ready").status_code == 200:
            return
        time.sleep(0.1)
    raise AssertionError("the server does not get ready")


@pytest.mark.slow
def test_kill_9_loses_and_doubles_no_acknowledged_event(made, tmp_path):
    """Four writers; the server is killed at another moment each time, and started again on the same file."""
    acknowledged: Counter[tuple[str, int]] = Counter()
    for round in range(KILLS):
        with process(made.directory, tmp_path) as (server, url):
            stop = threading.Event()

            def write(number: int, round: int = round, url: str = url, stop: threading.Event = stop) -> None:
                with httpx2.Client(base_url=url, timeout=30) as http:
                    for n in range(10_000):
                        first = 100_000 * round + 10 * n
                        rows = [{"item": "10", "rating": 3, "timestamp": first + k} for k in range(1 + n % 3)]
                        try:
                            answer = http.post(f"/v1/users/w{number}/events", json=rows)
                        except httpx2.HTTPError:
                            return
                        assert answer.json()["stored"] + answer.json()["repeated"] == len(rows)
                        acknowledged.update((f"w{number}", row["timestamp"]) for row in rows)
                        if stop.is_set():
                            return

            writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
            for writer in writers:
                writer.start()
            before = acknowledged.total()
            while acknowledged.total() < before + 20:
                time.sleep(0.005)
            time.sleep(0.01 * round)
            server.kill()
            stop.set()
            for writer in writers:
                writer.join()
    assert len(acknowledged) >= 20 * KILLS
    store = open_store(f"sqlite:{tmp_path}/users.db")
    there = Counter(
        (user, row["timestamp"])
        for user, history in store.histories([f"w{n}" for n in range(4)]).items()
        for row in history.rows
    )
    store.close()
    assert not set(acknowledged) - set(there) and max(there.values()) == 1


@pytest.mark.slow
def test_sigterm_finishes_what_has_begun_and_sighup_takes_another_model(make_model, tmp_path):
    shutil.copytree(make_model("cross").directory, tmp_path / "model")
    with process(tmp_path / "model", tmp_path, "--seconds=5") as (server, url):
        ready(url)
        events = [{"item": "10", "rating": 3, "timestamp": time} for time in range(3)]
        assert httpx2.post(f"{url}/v1/users/u/events", json=events).json()["stored"] == 3
        before = httpx2.get(f"{url}/v1/users/u").json()["model"]
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(make_model("lora").directory, tmp_path / "model")
        server.send_signal(signal.SIGHUP)
        for _ in range(3000):
            look = httpx2.get(f"{url}/v1/users/u", timeout=30)
            assert look.status_code == 200, look.text  # while the other model is made ready, this one answers
            if look.json()["model"] != before:
                break
            time.sleep(0.1)
        assert look.json()["model"] == httpx2.get(f"{url}/v1/models").json()["data"][0]["identity"] != before
        body = {"model": "user-llm", "prompt": "Next:", "max_tokens": 50, "temperature": 0, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert first.startswith("data: {") and rest[-1] == "data: [DONE]" and '"finish_reason": "' in rest[-2]
        assert server.wait(30) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was given, once all is done
    store = open_store(f"sqlite:{tmp_path}/users.db")
    assert store.versions(["u"])["u"].events == 3
    store.close()


@pytest.mark.slow
def test_a_connection_that_was_idle_can_be_used_again(made, tmp_path):
    with process(made.directory, tmp_path) as (_, url):
        kept = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        for pause in (0, 7):
            time.sleep(pause)
            kept.request("GET", "/health")
            answer = kept.getresponse()
            assert answer.status == 200 and answer.read() and kept.sock  # not closed, nor opened anew
