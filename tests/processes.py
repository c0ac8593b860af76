"""Programs that tests start as one process or as several, as on so many hosts."""

import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_quickstart import environment

ROOT = Path(__file__).parents[1]


def start(command, count=1, devices=8):
    """Start a program as `count` processes that know of each other, of `devices` devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        several = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)} if count > 1 else {}
        settings = environment(devices // count) | {"PYTHONFAULTHANDLER": "1"} | several
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=settings, text=True, **pipes))
    return started


def finish(processes):
    """Wait for all; return what each printed last, or fail with where each hangs."""
    try:
        with ThreadPoolExecutor(len(processes)) as threads:  # all pipes at once: a process whose pipe is full stops
            outputs = list(threads.map(lambda process: process.communicate(timeout=600), processes))
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
