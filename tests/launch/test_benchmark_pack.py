"""The benchmark of packed prompts, on real data: nine tenths of the tokens are real, and a step trains as many targets as before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.slow
def test_most_tokens_of_packed_rows_are_real(data_dir):
    data = data_dir / "movielens" / "ml-latest-union"
    command = [sys.executable, LAUNCH / "benchmark_pack.py", f"--data={data}", "--steps=0", "--rounds=1"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["packed"]["real"] > 0.9 > 0.7 > found["alone"]["real"]
    assert found["packed"]["targets"] == pytest.approx(found["alone"]["targets"], rel=0.02)
    assert found["packed"]["targets_sd"] < 0.04 * found["packed"]["targets"]
