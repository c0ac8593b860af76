"""Serve a model: `python -m user_llm.serve --model=RUN/user_llm/model --store=sqlite:users.db`.

Other programs then use it by OpenAI's API at http://127.0.0.1:8000/v1, where the field `user` names the user, and people by the page at
http://127.0.0.1:8000. SIGTERM ends the server when it has finished what it had begun. SIGHUP makes it read the model and the keys again.
"""

import sys

from absl import app, flags

from user_llm.common.printable import printable
from user_llm.common.terminal import set_up_log
from user_llm.serve.keys import add_key
from user_llm.serve.limits import Limits
from user_llm.serve.server import Options, serve

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
_USER_EVENTS = flags.DEFINE_integer("user_events", Limits.user_events, "The most events of one user.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", Limits.seconds, "The time after which a request is given up.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Serve, as the flags say."""
    set_up_log()
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    keys = _KEYS.value or ""
    limits = Limits(
        rows=_ROWS.value, context=_CONTEXT.value, queue=_QUEUE.value, seconds=_SECONDS.value, user_events=_USER_EVENTS.value
    )
    try:
        if _NEW_KEY.value:
            print(add_key(keys, _NEW_KEY.value))
            return
        serve(Options(_MODEL.value or "", _LLM.value, _NAME.value, _STORE.value, _HOST.value, _PORT.value, keys, limits))
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")


if __name__ == "__main__":
    app.run(main)
