"""A process of its own for what cannot be stopped otherwise."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")  # imports once; no fork of a process that has threads
_CONTEXT.set_forkserver_preload(["user_llm.ahead.check"])


def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns, run in a process that ends with it, whatever its threads still do.

    Raises:
      concurrent.futures.process.BrokenProcessPool: the process died.
      Exception: what the function raises.
    """
    with ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        return pool.submit(function, *args, **kwargs).result()
