"""Several processes as one run: how they find each other, wait, agree to stop, and share what each knows.

All processes run the same program on the same batches' parts; arrays span them (`common/mesh.py`). Each function here must be called
by all of them alike, and does nothing special where there is but one.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

BY_HAND = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def initialize() -> None:
    """Join the other processes if the environment names them; must come before anything that asks for devices.

    `COORDINATOR_ADDRESS` (host:port of process 0), `NUM_PROCESSES` and `PROCESS_ID` say it by hand. `USER_LLM_DISTRIBUTED=1` leaves it
    to jax, which knows Cloud TPU pods, GKE, SLURM and Open MPI. With neither this is the only process.

    Raises:
      ValueError: some of the three variables without the others, or no whole numbers.
    """
    address, count, index = given = [os.environ.get(name, "") for name in BY_HAND]
    if any(given):
        if not all(given):
            raise ValueError(f"Set all of {', '.join(BY_HAND)}, or none.")
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise ValueError(f"PROCESS_ID must be a number from 0 to NUM_PROCESSES - 1, not {index} of {count}.")
        jax.distributed.initialize(address, int(count), int(index))
    elif os.environ.get("USER_LLM_DISTRIBUTED") == "1":
        jax.distributed.initialize()
    else:
        return
    logging.info("Process %d of %d, with %d devices.", jax.process_index(), jax.process_count(), jax.local_device_count())
    if not is_first():
        logging.set_verbosity(logging.WARNING)


def is_first() -> bool:
    """Return whether this is the process that writes what all have in common."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """Return the JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes.tolist(), strict=True)]


def agreed(compute: Callable[[], Any]) -> Any:
    """Return in all processes the JSON value that the first computes; what it refuses is refused in all.

    Raises:
      ValueError: raised by `compute`, as is an OSError.
    """
    value, refusal = None, None
    if is_first():
        try:
            value = compute()
        except (ValueError, OSError) as error:
            if jax.process_count() == 1:
                raise
            refusal = str(error)
    value, refusal = gather([value, refusal])[0]
    if refusal is not None:
        raise ValueError(refusal)
    return value


@contextmanager
def preemption() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Turn SIGTERM and SIGINT into a question: the function says which one a step must stop for, and is asked once before each.

    One process says so at the next step. Several agree on a step that none has passed, whichever of them had the signal. A second
    SIGINT ends the process at once, as a kill would.
    """
    arrived: list[signal.Signals] = []
    several, told = jax.process_count() > 1, False

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in arrived:
            _end_at_once()
        arrived.append(signal.Signals(number))
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # jax has a handler of its own for it, and tells the other processes

    def ask(step: int) -> signal.Signals | None:
        nonlocal told
        if not several:
            told = bool(arrived)
            return arrived[0] if arrived else None
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        numbers = [number for numbers in gather(arrived) for number in numbers]
        return signal.SIGINT if signal.SIGINT in numbers else signal.SIGTERM

    heard: tuple[signal.Signals, ...] = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        heard = ()  # Python hands signals to the main thread alone
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield ask
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived and not several and not told:  # it came after the loop asked for the last time
        signal.raise_signal(arrived[0])


def _end_at_once() -> NoReturn:
    os.write(2, b"Interrupted again: ended at once; the same command goes on from what was saved.\n")
    os._exit(128 + signal.SIGINT)
