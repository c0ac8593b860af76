"""Errors that say where in a config they come from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# A message that begins with a key, such as `optimizer.b2=0.999: ...` or `prompts.review: ...`.
KEYED = re.compile(r"[a-z_0-9.]+[:=]")


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put a key in front of the message of a ValueError; joined by a dot to a key that the message begins with.

    Raises:
      ValueError: the same with its longer message; unchanged if that begins with `key` already.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        if message.startswith((f"{key}.", f"{key}:", f"{key}=")):
            raise
        raise ValueError(f"{key}.{message}" if KEYED.match(message) else f"{key}: {message}") from error
