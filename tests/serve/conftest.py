"""Stores to test: one in a SQLite file, one in a real Redis that the test starts."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from user_llm.serve.store import Store, StoreError, open_store


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory) -> Iterator[str]:
    """The URL of a Redis that writes every command to disk before it answers; the test skips where there is none."""
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    if not (program := shutil.which("redis-server")):
        pytest.skip("there is no redis-server: apt-get install redis-server")
    folder = tmp_path_factory.mktemp("redis")
    settings = {"port": "0", "unixsocket": str(folder / "s"), "dir": str(folder), "appendonly": "yes", "appendfsync": "always"}
    command = [program, *(word for name, value in settings.items() for word in (f"--{name}", value))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        url = f"unix://{folder}/s"
        for left in reversed(range(200)):
            try:
                open_store(url).close()
                break
            except StoreError:
                if not left or server.poll() is not None:
                    raise
                time.sleep(0.05)
        yield url
        server.kill()


@pytest.fixture(params=["sqlite", "redis"])
def url(request, tmp_path: Path) -> str:
    """The URL of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path}/users.db"
    import redis

    url = request.getfixturevalue("redis_url")
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def opened() -> Iterator[Callable[[str], Store]]:
    """Return `open(url)`: the store, which is closed when the test ends."""
    stores: list[Store] = []

    def opens(url: str) -> Store:
        stores.append(open_store(url))
        return stores[-1]

    yield opens
    for store in stores:
        store.close()


@pytest.fixture
def store(url: str, opened) -> Store:
    """An empty store."""
    return opened(url)
