"""The benchmark of the server runs, and its overload loses nothing and ends in no error but 429."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from tiny_models import make_dataset, make_models


@pytest.mark.slow
def test_the_benchmark_and_its_overload(make_timelines, drawn, tmp_path):
    made = make_models(make_dataset(make_timelines), drawn, tmp_path)("cross")
    command = [sys.executable, "launch/benchmark_serve.py", f"--model={made.directory}", "--clients=4", "--tokens=8"]
    command += ["--requests=16", "--users=3", "--events=6", "--context=128", "--as_text=2", "--overload=15"]
    ran = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert found["many"]["tokens_per_s"] > 0 and found["users_for_text_of_2"] > 0
    over = found["overload"]
    assert set(over["statuses"]) <= {"200", "429"} and over["statuses"]["200"] > 10
    assert over["events_acknowledged"] == over["events_there"] > 10
    assert over["mib_after"] < 1.2 * over["mib_before"]
