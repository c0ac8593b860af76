"""Two processes of four devices, as on two hosts, against one process of eight devices, and one device."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_quickstart import PHASES, TINY

ROOT = Path(__file__).parents[1]
MESHES = ["8,1,1", "1,8,1", "1,1,8", "2,2,2"]
BETWEEN = ["8,1,1", "2,2,2"]
pytestmark = pytest.mark.slow


def _start(command, count=1, devices=8):
    """Start a program as `count` processes that know of each other, of `devices` devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        several = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)} if count > 1 else {}
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices // count}"  # the last one counts
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONFAULTHANDLER": "1", **several}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **pipes))
    return started


def _finish(processes):
    """Wait for all; return what each printed last, or fail with where each hangs."""
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of its threads
        pytest.fail("\n\n".join(process.communicate()[1][:6000] for process in processes))
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [(out.strip().splitlines() or [""])[-1] for out, _ in outputs]


def test_one_device_eight_and_two_processes_of_four_have_the_same_losses(tmp_path):
    """Five steps of the encoder and of contextualization, over data, fsdp, tensor and all three; between processes over the first and all."""
    [alone] = _finish(_start(["tests/steps.py", str(tmp_path / "alone"), "1,1,1", *MESHES]))
    first, second = _finish(_start(["tests/steps.py", str(tmp_path / "two"), *BETWEEN], count=2))
    alone, two = json.loads(alone), json.loads(first)
    assert json.loads(second) == two
    expected = alone.pop("1,1,1")
    assert len(expected["user_llm"]) == 5 and expected["user_llm"][4] < expected["user_llm"][0]
    for found, meshes in ((alone, MESHES), (two, BETWEEN)):
        assert list(found) == meshes
        for mesh, phases in found.items():
            for name, losses in phases.items():
                np.testing.assert_allclose(losses, expected[name], atol=1e-5, rtol=1e-5, err_msg=f"{mesh} {name}")


def test_a_whole_run_of_two_processes_has_the_rows_of_one(tmp_path):
    """Training, evaluation with a remainder, titles by beam search, samples and report, on two times four devices and on one."""
    settings = [f"--config.{key}={value}" for key, value in TINY.items()]
    command = ["-m", "user_llm.main", "--config=configs/quickstart.py", *settings, "--config.data.streams=2"]
    command += [f"--config.phases={PHASES[:3]}"]
    _finish(_start([*command, f"--workdir={tmp_path / 'one'}"], devices=1))
    _finish(_start([*command, f"--workdir={tmp_path / 'two'}"], count=2))
    one, two = (
        {tuple(row[k] for k in ("task", "method", "metric")): row["value"] for row in _rows(tmp_path / run)}
        for run in ("one", "two")
    )
    assert len(one) > 20 and two == pytest.approx(one, abs=1e-6)
    for name in ("report.md", "config.json", "audit.json", "user_llm/metrics.jsonl", "user_llm/samples.json"):
        assert (tmp_path / "two" / name).exists(), name


def _rows(run):
    return json.loads((run / "results.json").read_text())


def _tiny(workdir, *flags, **how):
    return _start(["tests/training/tiny.py", str(workdir), *flags], **how)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The result of an undisturbed run on eight devices."""
    return _finish(_tiny(tmp_path_factory.mktemp("alone"), "--fsdp=8"))[0]


def test_sigterm_on_one_of_two_stops_both_and_the_same_command_goes_on(tmp_path, expected):
    stopped = _tiny(tmp_path / "two", "--fsdp=8", "--signal=SIGTERM", "--at=5", "--who=1", count=2)
    _finish(stopped)  # both end by themselves with code 0
    [step] = [
        int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir() if path.name.isdigit() and int(path.name) > 4
    ]
    assert step < 12 and not (tmp_path / "two" / "results.json").exists()
    assert _finish(_tiny(tmp_path / "two", "--fsdp=8", count=2)) == [expected] * 2
    log = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["kind"] == "train"] == list(range(1, 13))


def test_a_run_moves_from_eight_devices_to_four_to_one_and_to_two_processes(tmp_path, expected):
    workdir = tmp_path / "moving"
    for at, (fsdp, devices) in zip((3, 3, 3), ((8, 8), (4, 4), (1, 1)), strict=True):
        _finish(_tiny(workdir, f"--fsdp={fsdp}", "--signal=SIGTERM", f"--at={at}", devices=devices))
        assert not (workdir / "results.json").exists()
    assert _finish(_tiny(workdir, "--fsdp=8", count=2)) == [expected] * 2


def test_a_process_that_is_killed_leaves_a_run_that_goes_on(tmp_path, expected):
    """The other one cannot go on alone: it is ended, as a launcher would; both start again."""
    both = _tiny(tmp_path / "two", "--fsdp=8", "--at=7", "--who=1", count=2)
    both[1].wait(timeout=300)
    both[0].kill()
    for process in both:
        process.communicate()
    assert both[1].returncode == -signal.SIGKILL
    assert _finish(_tiny(tmp_path / "two", "--fsdp=8", count=2)) == [expected] * 2
