"""The metrics log: files of resumed runs, refusal of NaN, progress with and without a terminal."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import logging
from tensorboardX.proto.event_pb2 import Event

from user_llm.common import metrics
from user_llm.common.metrics import MetricsLog, read_metrics


def train(log, steps):
    for step in steps:
        log.train(step, {"loss": np.float32(1 / step), "grad_norm": 2.0}, events_per_s=1000.0)


def steps(directory):
    return [(row["step"], row["kind"]) for row in read_metrics(directory / "metrics.jsonl")]


def events(directory):
    """Read all TensorBoard events: records of 8 bytes of length, 4 of checksum, data, 4 more."""
    found = []
    for path in sorted((directory / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_rows_and_tensorboard_events(tmp_path):
    with MetricsLog(tmp_path, "phase", total_steps=10) as log:
        log.eval(0, {"recall@10": 0.25})
        train(log, [5])
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 0, "kind": "eval", "recall@10": 0.25}
    expected = {"step": 5, "kind": "train", "loss": 0.2, "grad_norm": 2.0, "events_per_s": 1000.0}
    assert second == pytest.approx(expected)
    scalars = {(v.tag, e.step): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert scalars[("train/loss", 5)] == pytest.approx(0.2)
    assert scalars[("eval/recall_10", 0)] == pytest.approx(0.25)


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def run(directory, start, stop):
        with MetricsLog(directory, "phase", step=start, total_steps=40) as log:
            for step in range(start, stop + 1, 10):
                if step != start or step == 0:
                    if step:
                        train(log, [step])
                    log.eval(step, {"recall@10": step / 100})

    run(whole, 0, 40)
    run(resumed, 0, 30)  # Saved at 20, killed after 30 in the middle of a line.
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "kind": "tr')
    run(resumed, 20, 40)
    assert (resumed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    sessions = [e for e in events(resumed) if e.HasField("session_log")]
    assert [e.step for e in sessions] == [0, 21]  # TensorBoard drops what is at or beyond.


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, "phase", total_steps=40) as log:
            log.eval(0, {"recall@10": 0.0})
            train(log, [10])
    assert steps(tmp_path) == [(0, "eval"), (10, "train")]


def test_rows_are_on_disk_at_once(tmp_path):
    with MetricsLog(tmp_path, "phase", total_steps=40) as log:
        train(log, [10])
        assert steps(tmp_path) == [(10, "train")]


def test_damage_before_the_last_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ki\n{"step": 2, "kind": "eval"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        MetricsLog(tmp_path, "phase", step=2, total_steps=40)


@pytest.mark.parametrize("name", ["loss", "item_loss", "grad_norm"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, name):
    with (
        pytest.raises(FloatingPointError, match=f"pretrain: {name} became nan in steps 11 to 20;"),
        MetricsLog(tmp_path, "pretrain", total_steps=40) as log,
    ):
        train(log, [10])
        log.train(20, {"loss": 1.0, name: float("nan")}, events_per_s=1.0)
    assert steps(tmp_path) == [(10, "train")]


def test_infinity_stops_too_and_one_step_is_named_alone(tmp_path):
    with MetricsLog(tmp_path, "pretrain", step=6, total_steps=40) as log:
        with pytest.raises(FloatingPointError, match="loss became inf in step 7;"):
            log.check_finite(7, {"loss": float("inf")})
        # A diagnostic may overflow, a validation metric may be undefined.
        log.train(8, {"loss": 1.0, "perplexity": float("inf")}, events_per_s=1.0)
        log.eval(8, {"recall@10": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert rows[0]["perplexity"] is None
    assert rows[1]["recall@10"] is None


def test_only_process_zero_writes_but_all_check(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(tmp_path / "phase", "phase", total_steps=40) as log:
        train(log, [10])
        log.eval(10, {"recall@10": 0.0})
        with pytest.raises(FloatingPointError):
            log.train(20, {"loss": float("nan")}, events_per_s=1.0)
    assert not (tmp_path / "phase").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda message, *args: lines.append(message % args))
    for kind, stream in (("bar", Terminal()), ("lines", io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        with MetricsLog(tmp_path / kind, "phase", step=10, total_steps=40) as log:
            train(log, [20] if kind == "bar" else [20, 30])
        bar = stream.getvalue()
        if kind == "bar":
            assert not lines
            assert "20/40" in bar and "1,000 events/s" in bar and "run ETA" not in bar
        else:
            assert not bar
            assert lines[0] == "phase: step 20/40, loss 0.05, 1,000 events/s"
            assert lines[1].startswith("phase: step 30/40, loss 0.03333, 1,000 events/s, phase ETA 00:") and len(lines) == 2


def test_the_time_left_is_that_of_steps_without_what_came_before_the_first_line(tmp_path, monkeypatch):
    """An hour of compiling before step 10, then 2 s a step: at step 15 of 40 the phase has 50 s to go."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda message, *args: lines.append(message % args))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with MetricsLog(tmp_path, "phase", total_steps=40) as log:
        for step, second in ((10, 3600.0), (15, 3610.0)):
            monkeypatch.setattr(metrics.time, "monotonic", lambda second=second: second)
            log.train(step, {"loss": 1.0}, events_per_s=1.0, run_left=3725.0)
    assert [line.partition("events/s, ")[2] for line in lines] == ["run ETA 1:02:05", "run ETA 1:02:05, phase ETA 00:50"]


def test_a_line_shows_one_metric_of_the_last_evaluation(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda message, *args: lines.append(message % args))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with MetricsLog(tmp_path, "phase", total_steps=40) as log:
        log.eval(0, {"mrr": 0.5, "recall@10": 0.25})
        train(log, [20])
    assert lines[-1] == "phase: step 20/40, loss 0.05, validation recall@10 0.25, 1,000 events/s"


def test_close_may_be_repeated(tmp_path):
    log = MetricsLog(tmp_path, "phase", total_steps=0)
    log.close()
    log.close()


def test_a_remote_workdir_gets_copies_and_a_resumed_run_goes_on_from_them(tmp_path, monkeypatch):
    """A store stood in for by a folder: nothing is appended to there, and this machine's own copy may be gone."""
    remote = tmp_path / "remote"
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    for machine, step in (("first", 0), ("second", 2)):
        monkeypatch.setattr(metrics, "local_folder", lambda workdir, machine=machine: tmp_path / machine)
        with MetricsLog(remote, "tiny", step=step, total_steps=4) as log:
            log.train(step + 1, {"loss": 1.0}, events_per_s=1.0)
            log.train(step + 2, {"loss": 1.0}, events_per_s=1.0)
            log.eval(step + 2, {"recall": 0.5})
            seen = [row["step"] for row in read_metrics(remote / "metrics.jsonl")]
            log.train(step + 3, {"loss": 1.0}, events_per_s=1.0)
            assert [
                row["step"] for row in read_metrics(remote / "metrics.jsonl")
            ] == seen  # until the next evaluation, save or end
    assert [row["step"] for row in read_metrics(remote / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4, 5]
    assert len(list((remote / "tensorboard").iterdir())) >= 1


def test_importing_the_log_imports_no_torch_and_torch_can_be_imported_after_it(tmp_path):
    """The module of that name stands in for an installed torch, which takes seconds to import."""
    (tmp_path / "torch.py").write_text("KNOWN = True\n")
    code = "import sys, user_llm.common.metrics; assert 'torch' not in sys.modules; import torch; assert torch.KNOWN"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
