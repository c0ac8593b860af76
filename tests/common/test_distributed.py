"""What one process does; `tests/test_processes.py` runs several."""

import os
import signal

import pytest

from user_llm.common import distributed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"COORDINATOR_ADDRESS": "host:1234"}, "Set all of COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID, or none"),
        (
            {"COORDINATOR_ADDRESS": "host:1234", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
            "PROCESS_ID must be a number from 0 to NUM_PROCESSES - 1, not 2 of 2",
        ),
    ],
)
def test_half_a_cluster_is_refused(monkeypatch, given, message):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()


def test_alone_nothing_waits():
    distributed.initialize()
    assert distributed.is_first() and distributed.gather({"a": [1, None]}) == [{"a": [1, None]}]
    distributed.barrier("alone")


def test_sigterm_is_heard_while_asked_and_handled_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.preemption() as asked:
        assert not asked(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked(1)
    assert signal.getsignal(signal.SIGTERM) is before
