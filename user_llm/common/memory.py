"""Memory of the host that is free and that this process still holds, where JAX computes on CPU and malloc is glibc's.

XLA on CPU takes the temporary memory of a program from malloc at each call. Left to itself, malloc gives freed blocks of that size back
to the system, and each of their pages faults again at the next call. Compiling leaves more free memory behind than such a program takes.
Elsewhere the functions here change nothing.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

# Parameters of mallopt, of glibc's malloc.h, and glibc's own values.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TRIM_THRESHOLD, MMAP_MAX = 128 * 1024, 65536
ASYNC = "jax_cpu_enable_async_dispatch"


def keep_freed() -> Callable[[], None]:
    """Keep what is freed for what is allocated next, from now on and in the whole process.

    Programs run in the thread that calls them then, since only the main thread's heap can grow to the size of their temporary memory; the
    heap of another thread ends at 64 MB. JAX reads that setting when it makes its devices: where it has them already, programs run in
    threads of its own as before, and little is gained.

    Returns:
      What ends it, and gives back what is free.
    """
    libc, before = _glibc(), jax.config.read(ASYNC)
    if libc is not None:
        jax.config.update(ASYNC, False)
        if jax.default_backend() != "cpu":
            jax.config.update(ASYNC, before)
            libc = None
    if libc is None:
        return lambda: None
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)

    def end() -> None:
        jax.config.update(ASYNC, before)
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        return_freed()

    return end


def return_freed() -> None:
    """Give what is free back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def compiling() -> Iterator[None]:
    """Give what is free back to the system before compiling and after it. Else the compiler's memory would come on top of what is free."""
    return_freed()
    try:
        yield
    finally:
        return_freed()


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
