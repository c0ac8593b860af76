"""What one process does; `tests/test_processes.py` runs several."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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


def test_sigint_is_heard_like_sigterm_and_handled_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with distributed.preemption() as ask:
        assert ask(0) is None
        os.kill(os.getpid(), signal.SIGINT)
        assert ask(1) is signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigint_ends_the_process_at_once():
    code = (
        "import os, signal\nfrom user_llm.common import distributed\n"
        "with distributed.preemption():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "first\n"), done.stderr
    assert done.stderr.endswith("Interrupted again: ended at once; the same command goes on from what was saved.\n")


def test_in_another_thread_no_signal_is_taken():
    def run():
        with distributed.preemption() as ask:
            return ask(0)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() is None


def test_what_the_first_process_computes_is_agreed_or_refused(monkeypatch):
    assert distributed.agreed(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="^no$"):
        distributed.agreed(lambda: (_ for _ in ()).throw(ValueError("no")))
    # As the second of two, to which the first hands what it has.
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    for value, refusal in ((5, None), (None, "no")):
        monkeypatch.setattr(distributed, "gather", lambda mine, theirs=[value, refusal]: [theirs, mine])  # noqa: B006
        if refusal is None:
            assert distributed.agreed(lambda: pytest.fail("computed again")) == 5
        else:
            with pytest.raises(ValueError, match="^no$"):
                distributed.agreed(lambda: pytest.fail("computed again"))


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, as in a command; workers of pytest ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_after_the_last_question_is_not_lost(interruptible):
    with pytest.raises(KeyboardInterrupt), distributed.preemption() as ask:
        assert ask(1) is None
        signal.raise_signal(signal.SIGINT)
    with distributed.preemption() as ask:
        signal.raise_signal(signal.SIGINT)
        assert ask(1) == signal.SIGINT
