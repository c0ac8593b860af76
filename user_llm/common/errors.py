"""Errors that name the key or the argument that they come from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

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


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check that an argument is a whole number of at least `least`. True and False are none.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")
