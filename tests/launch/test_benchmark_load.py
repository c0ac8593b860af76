"""Opening a dataset takes memory for its users and not for its events."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_events(tmp_path):
    """Two million events in memory are 170 MiB (features, items, times, ratings, and what sorting takes)."""
    command = [sys.executable, "launch/benchmark_load.py", "--events=2000000", "--seconds=1", f"--within={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, *rounds, sizes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["round"] for each in rounds] == ["first", "again", "audited"]
    assert all(each["events"] >= 2_000_000 for each in rounds), rounds
    first, again, audited = (each["peak_own_gib"] * 1024 for each in rounds)
    assert max(first, audited) < 110 and again < 60
    assert sizes["bytes"]["order-hashed-0-3"] < 5.3 * rounds[0]["events"]
    assert not list(tmp_path.iterdir())
