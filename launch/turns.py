"""What the benchmarks here share: sides in processes of their own, turn by turn, and medians over the rounds."""

import ctypes
import json
import os
import resource
import statistics
import subprocess
from collections.abc import Mapping, Sequence

# PyTorch's threads wait for each other by spinning, which costs them many times over where other programs want the cores, too.
OPENMP = {"OMP_WAIT_POLICY": "passive"}


def run(command: Sequence[str]) -> dict:
    """Run one side and return the JSON on its last line; a failure ends the benchmark with what the side said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=OPENMP | os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict]:
    """Run every side once a round, one at a time, and return each side's medians; what is no number is that of the last round."""
    runs: dict[str, list[dict]] = {side: [] for side in commands}
    for _ in range(rounds):
        for side, command in commands.items():
            runs[side].append(run(command))
    return {side: {key: _median([found[key] for found in of_side]) for key in of_side[-1]} for side, of_side in runs.items()}


def _median(values: list):
    return statistics.median(values) if isinstance(values[-1], int | float) else values[-1]


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held since it began, or since the last `forget_peak` (Linux alone)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def resident_bytes() -> int:
    """Return the memory that this process holds now, by Linux' count of its pages, once glibc has given back what is free."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    """Let `peak_resident_bytes` count from what this process holds now (Linux alone)."""
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
