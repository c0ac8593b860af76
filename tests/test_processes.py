"""Two processes of four devices, as on two hosts, against one process of eight devices, and one device.

A whole run of two processes: `test_main.py`, against the one process that other tests there read, too.
"""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from user_llm.training.loop import Preempted

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "training")]

import tiny
from processes import finish, start

MESH = "2,2,2"  # each axis by itself: training/test_step.py
pytestmark = pytest.mark.slow


def test_one_device_eight_and_two_processes_of_four_have_the_same_losses(tmp_path):
    """Steps of the encoder and of contextualization, over data, fsdp and tensor at once."""
    [alone] = finish(start(["tests/steps.py", str(tmp_path / "alone"), "1,1,1", MESH]))
    first, second = finish(start(["tests/steps.py", str(tmp_path / "two"), MESH], count=2))
    alone, two = json.loads(alone), json.loads(first)
    assert json.loads(second) == two
    expected = alone.pop("1,1,1")
    assert len(expected["user_llm"]) == 5 and expected["user_llm"][4] < expected["user_llm"][0]
    for found in (alone, two):
        assert list(found) == [MESH]
        for name, losses in found[MESH].items():
            np.testing.assert_allclose(losses, expected[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_processes_that_write_much_wait_for_no_reader(tmp_path):
    """The first waits for the second, which writes more than a pipe holds before it goes on."""
    program = (
        "import os, pathlib, sys, time\nthere = pathlib.Path(sys.argv[1])\n"
        "if os.environ['PROCESS_ID'] == '1':\n    sys.stderr.write('x' * 1_000_000)\n    there.touch()\n"
        "while not there.exists():\n    time.sleep(0.01)\nprint('done')"
    )
    assert finish(start(["-c", program, str(tmp_path / "there")], count=2)) == ["done"] * 2


def _tiny(workdir, *flags, **how):
    return start(["tests/training/tiny.py", str(workdir), *flags], **how)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, mesh_of):
    """The result of an undisturbed run on eight devices."""
    return json.dumps(tiny.run_split(tmp_path_factory.mktemp("alone"), mesh_of(fsdp=8)))


def test_two_processes_go_on_after_a_kill_and_stop_together_on_sigterm(tmp_path, expected):
    """What is left of two when one is killed cannot go on alone: it is ended, as a launcher would, and both start again."""
    both = _tiny(tmp_path / "two", "--fsdp=8", "--at=3", "--who=1", count=2)
    both[1].wait(timeout=300)
    both[0].kill()
    for process in both:
        process.communicate()
    assert both[1].returncode == -signal.SIGKILL
    stopped = _tiny(tmp_path / "two", "--fsdp=8", "--signal=SIGTERM", "--at=4", "--who=1", count=2)
    finish(stopped)  # both end by themselves with code 0
    step = max(int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir() if path.name.isdigit())
    assert 4 <= step < 12 and not (tmp_path / "two" / "results.json").exists()
    assert finish(_tiny(tmp_path / "two", "--fsdp=8", count=2)) == [expected] * 2
    log = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["kind"] == "train"] == list(range(1, 13))


def test_a_run_moves_from_eight_devices_to_four_to_one_and_to_two_processes(tmp_path, expected, mesh_of):
    workdir = tmp_path / "moving"
    for fsdp in (8, 4, 1):
        with pytest.raises(Preempted):
            tiny.run_split(workdir, mesh_of(fsdp=fsdp), count_events=tiny.signal_at(3, signal.SIGTERM))
        assert not (workdir / "results.json").exists()
    assert finish(_tiny(workdir, "--fsdp=8", count=2)) == [expected] * 2
