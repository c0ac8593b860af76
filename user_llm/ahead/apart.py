"""A process of its own for what cannot be stopped otherwise."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns, run in a process that ends with it, whatever its threads still do.

    Raises:
      concurrent.futures.process.BrokenProcessPool: the process died.
      Exception: what the function raises.
    """
    context = multiprocessing.get_context("forkserver")  # no fork of a process that has threads
    context.set_forkserver_preload([function.__module__])  # imports once, before the first
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
