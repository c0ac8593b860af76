"""A server as a process: what starts it, what its signals do, and how a model takes the place of another."""

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from absl import logging

from user_llm.common.printable import printable
from user_llm.serve.app import make_app
from user_llm.serve.engine import Engine
from user_llm.serve.items import with_items
from user_llm.serve.keys import Keys, read_keys
from user_llm.serve.limits import Limits
from user_llm.serve.metrics import Metrics
from user_llm.serve.state import State
from user_llm.serve.store import open_store
from user_llm.serving.front import load

ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # names such as localhost have an IPv6 address even where a machine has none
# Clients and proxies keep idle connections for 5 to 60 s. A server that closes one sooner may do so just as it is used again.
IDLE_SECONDS = 75
FREE_PORTS = 5  # that are tried, where any port that is free will do


@dataclasses.dataclass(frozen=True)
class Options:
    """What a server is started with.

    Attributes:
      model: a model directory, or a model's name on the hub.
      llm: the directory or hub name of the LLM, if the model only names its LLM.
      name: the model's name in OpenAI's API.
      store: where events are kept; see `open_store`.
      host, port: the address to listen at. Port 0 stands for any that is free.
      api_keys: the file of keys; "" where this machine alone is answered, without keys.
    """

    model: str
    llm: str = ""
    name: str = "user-llm"
    store: str = "sqlite:users.db"
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: str = ""
    limits: Limits = Limits()


class Server(uvicorn.Server):
    """uvicorn's server, which lets the engine know of the signals that it gets.

    Args:
      state: what the routes share.
      reload: is called on SIGHUP.
    """

    def __init__(self, config: uvicorn.Config, state: State, reload: Callable[[], None]):
        super().__init__(config)
        self._state, self._reload = state, reload

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Refuse what waits, finish what has begun, and end."""
        self._state.engine.drain()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"Serving {self._state.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def serve(self, sockets: Any = None) -> None:
        """Serve until a signal ends it."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        await super().serve(sockets)


def serve(options: Options) -> None:
    """Serve until a signal ends it.

    Raises:
      ValueError: there is no such model, store or file of keys, or other machines could ask without a key.
      OSError: the store or the address cannot be used. The address is taken before the model is loaded; whoever connects
        meanwhile waits.
    """
    if not options.model:
        raise ValueError("--model is missing: name a model directory, such as RUN/user_llm/model.")
    keys: list[Keys | None] = [read_keys(options.api_keys) if options.api_keys else None]
    if keys[0] is None and not _loopback(options.host):
        raise ValueError(
            f"--host={options.host} can be reached from other machines: start it with --api_keys=FILE, whose keys --new_key makes."
        )
    with listening(options.host, options.port) as sockets:
        _serve(options, keys, sockets)


def _serve(options: Options, keys: list[Keys | None], sockets: list[socket.socket]) -> None:
    """Open the store, load the model, and answer what comes to some sockets. A new reading of the keys takes the place of `keys[0]`."""
    limits, metrics, store = options.limits, Metrics(), open_store(options.store)
    engine = lambda: Engine(  # noqa: E731
        with_items(load(options.model, llm=options.llm), store.items()), limits, metrics.observe
    )
    state = State(options.name, engine(), store, limits, metrics)

    one_at_a_time = threading.Lock()

    def reload() -> None:
        if not one_at_a_time.acquire(blocking=False):
            logging.error("A model is being loaded already: nothing else is loaded.")
            return
        threading.Thread(target=exchange, daemon=True).start()

    def exchange() -> None:
        try:
            if options.api_keys:
                keys[0] = read_keys(options.api_keys)
            exchange_engine(state, engine)
        except Exception as error:
            logging.error("The model was not loaded again: %s", printable(error))
        finally:
            one_at_a_time.release()

    config = uvicorn.Config(
        make_app(state, lambda: keys[0]), log_level="warning", access_log=False, server_header=False, limit_concurrency=1000,
        timeout_graceful_shutdown=int(limits.seconds) + 5, h11_max_incomplete_event_size=1 << 16, timeout_keep_alive=IDLE_SECONDS,
    )  # fmt: skip
    Server(config, state, reload).run(sockets)


def exchange_engine(state: State, make: Callable[[], Engine]) -> None:
    """Load a model, and let it take the place of the one that answers once it is ready; the other finishes what it has begun."""
    engine = make()
    engine.start()
    engine.wait()
    if state.engine.closing:  # the server ends
        engine.close()
        return
    before, state.engine = state.engine, engine
    time.sleep(state.limits.seconds)  # a request that began with the engine before has ended by then
    before.close()


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Yield sockets that listen at every address of a host (`localhost` may have two), all at the same port; close them at the end.

    Args:
      port: 0 for any that is free.

    Raises:
      OSError: the host is not known or is not this machine, or the port is taken.
    """
    # The number that is free at a host's first address may be taken at its second.
    for left in reversed(range(1 if port else FREE_PORTS)):
        with contextlib.ExitStack() as opened:
            try:
                sockets = _bound(host, port, opened)
            except OSError as error:
                if left and error.errno == errno.EADDRINUSE:
                    continue
                reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
                raise OSError(
                    f"The server cannot listen at {host}, port {port}: {reason}. Name another --host or --port."
                ) from None
            yield sockets
            return


def _bound(host: str, port: int, opened: contextlib.ExitStack) -> list[socket.socket]:
    """Return the sockets of `listening`, which `opened` closes."""
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for place, (family, _, _, _, address) in enumerate(found):
        same = sockets[0].getsockname()[1] if sockets else port
        try:
            one = socket.create_server((address[0], same, *address[2:]), family=family)
        except OSError as error:
            if error.errno not in ABSENT or (not sockets and place == len(found) - 1):
                raise
        else:
            sockets.append(opened.enter_context(one))
    return sockets


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
