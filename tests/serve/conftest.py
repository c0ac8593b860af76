"""Stores to test: one in a SQLite file, one in a real Redis that the test starts."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from user_llm.serve.store import Store, StoreError, open_store


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yield the URL of a Redis that writes every command to disk, below a folder, before it answers; at the end it is killed."""
    program = shutil.which("redis-server")
    settings = {"port": "0", "unixsocket": f"{folder}/s", "dir": str(folder), "appendonly": "yes", "appendfsync": "always"}
    command = [str(program), *(word for name, value in settings.items() for word in (f"--{name}", value))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for left in reversed(range(200)):
                try:
                    open_store(f"unix://{folder}/s").close()
                    break
                except StoreError:
                    if not left or server.poll() is not None:
                        raise
                    time.sleep(0.05)
            yield f"unix://{folder}/s"
        finally:
            server.kill()


@pytest.fixture(scope="session")
def redis_server() -> Callable[[Path], AbstractContextManager[str]]:
    """Return `served`; the test skips where there is no Redis."""
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    if not shutil.which("redis-server"):
        pytest.skip("there is no redis-server: apt-get install redis-server")
    return served


@pytest.fixture(scope="session")
def redis_url(redis_server, tmp_path_factory) -> Iterator[str]:
    """The URL of a Redis that all tests share."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


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
