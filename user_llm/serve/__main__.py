"""Serve a model: `python -m user_llm.serve --model=RUN/user_llm/model --store=sqlite:users.db`.

Other programs then use it by OpenAI's API at http://127.0.0.1:8000/v1, where the field `user` names the user, and people by the page at
http://127.0.0.1:8000. SIGTERM ends the server when it has finished what it had begun. SIGHUP makes it read the model and the keys again.
"""

import asyncio
import ipaddress
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from absl import app, flags, logging

from user_llm.common.printable import printable
from user_llm.common.terminal import set_up_log
from user_llm.serve.app import make_app
from user_llm.serve.engine import Engine
from user_llm.serve.keys import Keys, add_key, read_keys
from user_llm.serve.limits import Limits
from user_llm.serve.metrics import Metrics
from user_llm.serve.state import State
from user_llm.serve.store import open_store
from user_llm.serving.front import load

_MODEL = flags.DEFINE_string("model", None, "Model directory, such as RUN/user_llm/model, or a model's name on the hub.")
_LLM = flags.DEFINE_string("llm", "", "Directory or hub name of the LLM, if the model only names its LLM; empty for that name.")
_NAME = flags.DEFINE_string("name", "user-llm", "The model's name in OpenAI's API.")
_STORE = flags.DEFINE_string("store", "sqlite:users.db", "Where events are kept: sqlite:FILE or redis://HOST:PORT/DB.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen at. Another than this machine's own needs --api_keys.")
_PORT = flags.DEFINE_integer("port", 8000, "The port to listen at; 0 for any that is free.", lower_bound=0, upper_bound=65535)
_KEYS = flags.DEFINE_string("api_keys", None, "File of the hashes of API keys. Without it, only this machine is answered.")
_NEW_KEY = flags.DEFINE_string(
    "new_key", None, "Make a key, such as app:read,write; print it, add its hash to --api_keys, and end."
)
_ROWS = flags.DEFINE_integer("rows", Limits.rows, "Texts that are written at the same time.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", Limits.context, "The most tokens of a prompt and its answer.", lower_bound=2)
_QUEUE = flags.DEFINE_integer("queue", Limits.queue, "Requests that wait; more are refused.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", Limits.seconds, "The time after which a request is given up.", lower_bound=1)


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


def main(argv: list[str]) -> None:
    """Serve, as the flags say."""
    set_up_log()
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    try:
        if _NEW_KEY.value:
            if not _KEYS.value:
                raise ValueError("--new_key needs --api_keys=FILE, to which the hash of the key is added.")
            print(add_key(_KEYS.value, _NEW_KEY.value))
            return
        _serve()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")


def _serve() -> None:
    if not _MODEL.value:
        raise ValueError("--model is missing: name a model directory, such as RUN/user_llm/model.")
    keys: list[Keys | None] = [read_keys(_KEYS.value) if _KEYS.value else None]
    if keys[0] is None and not _loopback(_HOST.value):
        raise ValueError(
            f"--host={_HOST.value} can be reached from other machines: start it with --api_keys=FILE, whose keys --new_key makes."
        )
    limits = Limits(rows=_ROWS.value, context=_CONTEXT.value, queue=_QUEUE.value, seconds=_SECONDS.value)
    metrics, store = Metrics(), open_store(_STORE.value)
    engine = lambda: Engine(load(str(_MODEL.value), llm=_LLM.value), limits, metrics.observe)  # noqa: E731
    state = State(_NAME.value, engine(), store, limits, metrics)

    one_at_a_time = threading.Lock()

    def reload() -> None:
        if not one_at_a_time.acquire(blocking=False):
            logging.error("A model is being loaded already: nothing else is loaded.")
            return
        threading.Thread(target=exchange, daemon=True).start()

    def exchange() -> None:
        try:
            if _KEYS.value:
                keys[0] = read_keys(_KEYS.value)
            exchange_engine(state, engine)
        except Exception as error:
            logging.error("The model was not loaded again: %s", printable(error))
        finally:
            one_at_a_time.release()

    config = uvicorn.Config(
        make_app(state, lambda: keys[0]), host=_HOST.value, port=_PORT.value, log_level="warning", access_log=False,
        server_header=False, limit_concurrency=1000, timeout_graceful_shutdown=int(limits.seconds) + 5, h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    Server(config, state, reload).run()


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


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    app.run(main)
