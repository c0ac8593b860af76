"""Memory of the host that is free and that this process still holds. Only glibc's malloc is told what to do; under another one nothing changes.

XLA on CPU takes the temporary memory of a program from malloc at each call. Left to itself, malloc gives freed blocks of that size back
to the system, and each of their pages faults again at the next call. Compiling leaves more free memory behind than such a program takes.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import jax

# Parameters of mallopt, of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed() -> None:
    """Keep what is freed for what is allocated next, if JAX computes on CPU. Call this before JAX has devices.

    A program then runs in the thread that calls it. Only the main thread's heap can grow to the size of its temporary memory; the heap
    of another thread ends at 64 MB.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc = _glibc()
    if libc is not None and jax.default_backend() == "cpu":
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """Give what is free back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def compiling() -> Iterator[None]:
    """Give what is free back to the system before and after compiling, whose peak it would raise and which leaves much."""
    return_freed()
    yield
    return_freed()


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
