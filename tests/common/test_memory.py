"""Each test runs a program of its own: what malloc is told holds for a whole process."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from configs import quickstart
from user_llm import experiment

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# A program with a temporary array of 64 MB. `faults` counts the pages of 4 KiB that its median call faults, since the array of the call
# before may be freed by another thread a little late, and then memory grows once by one more array.
PROGRAM = """
import resource, statistics
import jax, jax.numpy as jnp, psutil
from user_llm.common import memory

{first}
step = jax.jit(lambda x: jnp.exp(jnp.outer(x, x)) @ x)
x = jnp.ones(4096)
faults = []
for _ in range(51):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = psutil.Process().memory_info().rss
{last}
print(statistics.median(faults), held - psutil.Process().memory_info().rss)
"""


def _run(first: str, last: str) -> tuple[int, int]:
    """Return the faults of the median call, and the bytes that `last` gave back."""
    program = PROGRAM.format(first=first, last=last)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    faults, returned = done.stdout.split()
    return int(faults), int(returned)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another malloc than glibc's")
def test_the_memory_of_a_program_is_kept_for_its_next_call_and_returned_in_the_end():
    faults, returned = _run("end = memory.keep_freed()", "end()")
    assert faults < 200 and returned > 64e6
    if not (
        HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()
    ):  # where all pages are huge, 64 MB anew at each call are a few faults
        assert 10 * faults < _run("", "")[0]


def test_a_run_keeps_what_is_freed_before_it_computes(monkeypatch, tmp_path):
    class Told(Exception):
        pass

    def tell():
        raise Told

    monkeypatch.setattr(experiment, "keep_freed", tell)
    with pytest.raises(Told):
        experiment.run(quickstart.get_config(), tmp_path)
    assert not list(tmp_path.iterdir())
