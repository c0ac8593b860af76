"""Stores to test, one in a SQLite file and one in a real Redis that the test starts; and servers of a tiny model, in threads."""

import dataclasses
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import uvicorn
from tiny_models import Made, make_dataset, make_models

import user_llm
from user_llm.serve.app import make_app
from user_llm.serve.engine import Engine
from user_llm.serve.keys import Keys
from user_llm.serve.limits import Limits
from user_llm.serve.metrics import Metrics
from user_llm.serve.state import State
from user_llm.serve.store import Store, StoreError, open_store
from user_llm.serving.personalizer import Personalizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclasses.dataclass
class Served:
    """A server that runs.

    Attributes:
      url: where.
      state: what its routes share.
      server: of uvicorn.
    """

    url: str
    state: State
    server: uvicorn.Server


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
    url = request.getfixturevalue("redis_url")  # which skips the test where Redis cannot be had
    import redis

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


@pytest.fixture(scope="session")
def make_model(make_timelines, drawn, tmp_path_factory) -> Callable[[str], Made]:
    """Return `make(variant)`: writes and returns the tiny model of that variant."""
    return make_models(make_dataset(make_timelines), drawn, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def made(make_model) -> Made:
    """A tiny model with cross-attention, and its dataset."""
    return make_model("cross")


@pytest.fixture(scope="session")
def model(made) -> Personalizer:
    """The model, loaded, with a chat template."""
    loaded = user_llm.load(made.directory)
    loaded.lines.tokenizer = dataclasses.replace(loaded.lines.tokenizer, chat_template=TEMPLATE)
    return loaded


@pytest.fixture(scope="session")
def serve(tmp_path_factory) -> Callable[..., AbstractContextManager[Served]]:
    """Return `serve(model, keys=..., store=..., **limits)`: a server of a model on a free port, in threads, while the context is open."""

    @contextmanager
    def served(model: Personalizer, keys: Keys | None = None, store: str = "", **limits: Any) -> Iterator[Served]:
        bounds = Limits(**{"rows": 3, "context": 64, "batch": 2} | limits)
        metrics = Metrics()
        opened = open_store(store or f"sqlite:{tmp_path_factory.mktemp('store')}/users.db")
        state = State("tiny", Engine(model, bounds, metrics.observe), opened, bounds, metrics)
        config = uvicorn.Config(make_app(state, lambda: keys), port=0, log_config=None, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            state.engine.wait()
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Served(f"http://127.0.0.1:{port}", state, server)
        finally:
            server.should_exit = True
            thread.join()

    return served


@pytest.fixture(scope="session")
def server(serve, model) -> Iterator[Served]:
    """A server that tests share; each uses users of its own."""
    with serve(model) as served:
        yield served
