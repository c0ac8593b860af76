import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from user_llm.common import mesh as meshes
from user_llm.common.checkpoint import Checkpointer
from user_llm.common.metrics import read_metrics
from user_llm.data.streams import Streams
from user_llm.training import loop
from user_llm.training.loop import Preempted

sys.path.insert(0, str(Path(__file__).parent))

import tiny


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run: its directory and what it returned."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, tiny.run(directory)


def _checkpoints(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


def _metrics(directory):
    """All that was logged, but for how fast it went."""
    rows = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "events_per_s"} for row in rows]


def _assert_same(directory, found, uninterrupted):
    """Parameters, results and every logged number are those of the whole run, bit for bit."""
    expected_directory, (params, rows) = uninterrupted
    jax.tree.map(np.testing.assert_array_equal, found[0], params)
    assert found[1] == rows == json.loads((directory / "results.json").read_text())
    assert _metrics(directory) == _metrics(expected_directory)


def _scripted(values, log=None):
    """A task whose validation follows a script; `log` records evaluations and steps in order."""
    values, log = iter(values), [] if log is None else log

    def evaluate(params):
        log.append("evaluate")
        return {"accuracy": next(values), "head": float(params["head"][0, 0])}

    def count_events(batch):
        log.append("step")
        return 1

    results = lambda params: [tiny.row("head", float(params["head"][0, 0]))]  # noqa: E731
    return tiny.make_task(evaluate=evaluate, count_events=count_events, results=results)


def test_it_learns_and_leaves_what_later_phases_need(uninterrupted):
    directory, (params, _) = uninterrupted
    losses = [row["loss"] for row in _metrics(directory) if row["kind"] == "train"]
    assert len(losses) == 12 and max(losses[-3:]) < 0.7 * losses[0]
    assert [row["step"] for row in _metrics(directory) if row["kind"] == "eval"] == [0, 4, 8, 12]
    np.testing.assert_array_equal(params["frozen"], tiny.make_task().init(lambda shapes: jax.devices()[0])["frozen"])


def test_half_precision_keeps_frozen_parameters_in_it_and_trained_ones_in_float32(tmp_path):
    """Whatever computes, evaluation included, reads halves; only what trains is kept whole, also where a finished run is read again."""
    seen = []

    def evaluate(params):
        seen.append({name: str(leaf.dtype) for name, leaf in params.items()})
        return {"accuracy": 0.0}

    results = lambda params: [tiny.row("accuracy", evaluate(params)["accuracy"])]  # noqa: E731
    task = tiny.make_task(evaluate=evaluate, results=results)
    params, rows = tiny.run(tmp_path, task, total_steps=3, eval_steps=3, dtype="bfloat16")
    assert len(seen) == 3 and all(set(dtypes.values()) == {"bfloat16"} for dtypes in seen)
    assert rows == [
        tiny.row("accuracy", 0.0) | {"targets_seen": 48}
    ]  # of the step that is no better than the start, but trained

    config = dataclasses.replace(tiny.LOOP, dtype="bfloat16")
    mesh = meshes.make_mesh(devices=jax.devices("cpu")[:1])
    with jax.set_mesh(mesh):
        state, _ = loop.initial_state(task, config, tiny.OPTIMIZER, mesh, 0)
        abstract, _ = loop.abstract_state(task, config, tiny.OPTIMIZER, mesh, 0)
    sizes = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]  # noqa: E731
    assert sizes(state) == sizes(abstract)
    assert state.frozen["frozen"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype("float32")}
    again, _ = tiny.run(tmp_path, task, total_steps=3, eval_steps=3, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_rows_say_how_many_targets_the_best_parameters_saw_with_those_of_the_phase_that_taught_them(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "results.json").write_text(json.dumps([tiny.row("accuracy", 1.0) | {"targets_seen": 100}] * 2))
    for name, taught_by, before in (("alone", (), 0), ("taught", ("teacher",), 100)):
        task = dataclasses.replace(_scripted([0.1, 0.9, 0.5, 0.3]), taught_by=taught_by)
        _, rows = tiny.run(tmp_path / name, task)
        assert [row["targets_seen"] for row in rows] == [before + 4]  # one in each step, and the second evaluation is the best
        seen = [row["targets_seen"] for row in _metrics(tmp_path / name) if row["kind"] == "eval"]
        assert seen == [before, before + 4, before + 8, before + 12]


def test_how_many_targets_were_seen_is_left_out_where_an_older_phase_or_checkpoint_does_not_say_it(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "results.json").write_text(json.dumps([tiny.row("accuracy", 1.0)]))
    _, rows = tiny.run(tmp_path / "taught", dataclasses.replace(_scripted([0.1, 0.9]), taught_by=("teacher",)), total_steps=4)
    assert rows and not any("targets_seen" in row for row in [*rows, *_metrics(tmp_path / "taught")])

    older = loop.Progress(**{"best_step": 4, "best_value": 0.9})  # as the record of an older checkpoint is read
    older.count(8)
    assert older.targets is None


def test_a_phase_that_trains_nothing_takes_no_step_and_measures_what_it_started_from(tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(tiny, "OPTIMIZER", dataclasses.replace(tiny.OPTIMIZER, trainable=((r".*", False),)))
    params, rows = tiny.run(tmp_path, _scripted([7], log))
    start = tiny.make_task().init(lambda shapes: jax.devices()[0])
    assert log == ["evaluate"] and rows == [tiny.row("head", float(start["head"][0, 0])) | {"targets_seen": 0}]
    jax.tree.map(np.testing.assert_array_equal, params, start)


def test_evaluations_come_before_saves_and_both_before_the_step(tmp_path, monkeypatch):
    log = []
    save = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda self, step, *rest: (log.append(step), save(self, step, *rest)))
    tiny.run(tmp_path, _scripted(range(9), log), total_steps=5, eval_steps=2, save_steps=3)
    expected = ["evaluate", "step", "step", "evaluate", 2, "step", 3, "step", "evaluate", 4, "step", "evaluate", 5]
    assert log == expected


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", [1, 5, 4, 5], 2),
        ("min", [1, 4, 2, 3], 4),
        pytest.param("min", [5, 4, 2, 3], 4, marks=pytest.mark.slow),
        pytest.param("max", [1, 2, 3, 4], 6, marks=pytest.mark.slow),
    ],
)
def test_the_best_on_validation_is_returned(tmp_path, mode, values, best):
    """The first of equals; the untrained parameters are none of them, though nothing was better."""
    task = _scripted(values)
    params, rows = tiny.run(tmp_path, task, total_steps=6, eval_steps=2, save_steps=1, mode=mode)
    measured = {row["step"]: row["head"] for row in _metrics(tmp_path) if row["kind"] == "eval"}
    assert len(set(measured.values())) == 4
    assert float(params["head"][0, 0]) == rows[0]["value"] == measured[best]
    assert _checkpoints(tmp_path) == sorted({best, 6})


def test_patience_ends_training_after_so_many_evaluations_without_a_best(tmp_path):
    log = []
    tiny.run(tmp_path, _scripted([1, 3, 2, 3, 9], log), eval_steps=1, patience_evals=2)
    assert log.count("evaluate") == 4 and log.count("step") == 3


@pytest.mark.parametrize(("patience", "last"), [(2, 3), (0, 4)])
def test_the_last_step_is_kept_if_the_config_says_so_whatever_was_best(tmp_path, patience, last):
    """Training ends by its length or by patience, which still watches the metric."""
    task = _scripted([0, 9, 5, 6, 7])
    params, rows = tiny.run(tmp_path, task, total_steps=4, eval_steps=1, patience_evals=patience, keep="last")
    measured = {row["step"]: row["head"] for row in _metrics(tmp_path) if row["kind"] == "eval"}
    assert max(measured) == last and len({measured[step] for step in range(1, last + 1)}) == last
    assert float(params["head"][0, 0]) == rows[0]["value"] == measured[last]
    assert rows[0]["targets_seen"] == last and _checkpoints(tmp_path) == [last]


def test_an_evaluation_that_is_no_number_is_not_the_best_and_hides_none(tmp_path):
    _, rows = tiny.run(tmp_path, _scripted([0, 3, float("nan"), 9, 5]), total_steps=4, eval_steps=1)
    assert rows[0]["targets_seen"] == 3 and _checkpoints(tmp_path) == [3, 4]


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_without_any_number_the_last_parameters_are_kept_and_counted(tmp_path, keep):
    task = _scripted([float("nan")] * 5)
    params, rows = tiny.run(tmp_path, task, total_steps=4, eval_steps=1, keep=keep)
    measured = {row["step"]: row["head"] for row in _metrics(tmp_path) if row["kind"] == "eval"}
    assert float(params["head"][0, 0]) == rows[0]["value"] == measured[4] != measured[3]
    assert rows[0]["targets_seen"] == 4


def test_a_length_in_epochs_is_turned_into_steps(tmp_path):
    """The tiny task has 5 steps an epoch."""
    log = []
    tiny.run(tmp_path, _scripted(range(9), log), total_steps=0, total_epochs=1.4)
    assert log.count("step") == 7


@pytest.mark.parametrize("lengths", [(0, 0), (3, 1.0)])
def test_no_length_or_two_are_refused(tmp_path, lengths):
    with pytest.raises(ValueError, match=r"^tiny: set one of loop.total_steps .* and loop.total_epochs"):
        tiny.run(tmp_path, total_steps=lengths[0], total_epochs=lengths[1])


def test_a_metric_that_the_task_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tiny cannot monitor 'ndcg': it reports accuracy"):
        tiny.run(tmp_path, monitor="ndcg")


@pytest.mark.parametrize("log_steps", [1, 4])
def test_a_nan_loss_stops_the_run_and_no_nan_is_kept(tmp_path, log_steps):
    """NaN in step 6, noticed when it is logged or ahead of the next save."""
    batches = grain.MapDataset.range(20).map(
        lambda i: {"tokens": np.ones((2, 3), np.int32), "poison": np.full(2, np.nan if i == 5 else 0, np.float32)}
    )
    task = tiny.make_task(
        loss=lambda params, batch, key, whole: (jnp.sum(params["head"] ** 2) + batch["poison"].sum(), {}),
        train_data=Streams({0: batches.to_iter_dataset()}),
        count_events=lambda batch: 1,
        evaluate=lambda params: {"accuracy": 0.0},
    )
    steps = "step 6" if log_steps == 1 else "steps 5 to [68]"
    with pytest.raises(FloatingPointError, match=rf"^tiny: loss became nan in {steps}; lower the learning rate"):
        tiny.run(tmp_path, task, total_steps=8, eval_steps=20, save_steps=2, log_steps=log_steps)
    assert _checkpoints(tmp_path)[-1] == 4
    with pytest.raises(FloatingPointError):  # The same again: it resumed from before the NaN.
        tiny.run(tmp_path, task, total_steps=8, eval_steps=20, save_steps=2, log_steps=log_steps)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, uninterrupted, caplog, number, code):
    """At step 5, where nothing is due."""
    before = signal.getsignal(number)
    with caplog.at_level("INFO", logger="absl"), pytest.raises(Preempted) as stopped:
        tiny.run(tmp_path, tiny.make_task(count_events=tiny.signal_at(5, number)))
    assert stopped.value.code == code and signal.getsignal(number) is before
    said = [record.getMessage() for record in caplog.records if number.name in record.getMessage()]
    assert said == [f"tiny: {number.name}, saved at step 5; the same command goes on from there."]
    assert _checkpoints(tmp_path)[-1] == 5
    _assert_same(tmp_path, tiny.run(tmp_path), uninterrupted)


def test_a_checkpoint_whose_best_were_untrained_parameters_goes_on_to_trained_ones(tmp_path, monkeypatch):
    """An older run could say so; what it said was best is not there, and does not stand in the way of what is."""
    with pytest.raises(Preempted):
        tiny.run(tmp_path, tiny.make_task(count_events=tiny.signal_at(5, signal.SIGTERM)))
    restore = Checkpointer.restore

    def older(self, step, state):
        state, record = restore(self, step, state)
        return state, record | {"best_step": 0, "best_value": 1e9}

    monkeypatch.setattr(Checkpointer, "restore", older)
    _, rows = tiny.run(tmp_path)
    measured = {row["step"]: row["accuracy"] for row in _metrics(tmp_path) if row["kind"] == "eval" and row["step"] > 5}
    assert rows[0]["value"] == max(measured.values())


def test_an_ended_run_whose_best_were_untrained_parameters_is_measured_with_its_last_and_their_targets(tmp_path, monkeypatch):
    params, _ = tiny.run(tmp_path, total_steps=4, eval_steps=4)
    (tmp_path / "results.json").unlink()
    restore = Checkpointer.restore

    def older(self, step, state):
        state, record = restore(self, step, state)
        return state, record | {"best_step": 0, "best_value": 1e9, "best_targets": 0}

    monkeypatch.setattr(Checkpointer, "restore", older)
    again, rows = tiny.run(tmp_path, total_steps=4, eval_steps=4)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert rows[0]["targets_seen"] == [row["targets_seen"] for row in _metrics(tmp_path) if row["kind"] == "eval"][-1] > 0


def test_a_run_with_muon_goes_on_after_a_signal(tmp_path, monkeypatch):
    """Muon moves one matrix, Adam the other."""
    muon = dataclasses.replace(tiny.OPTIMIZER, muon=True, matrices=((r"head", (1, 1)), (r".*", ())))
    monkeypatch.setattr(tiny, "OPTIMIZER", muon)
    whole = tiny.run(tmp_path / "whole")
    halves = tmp_path / "halves"
    with pytest.raises(Preempted):
        tiny.run(halves, tiny.make_task(count_events=tiny.signal_at(5, signal.SIGTERM)))
    _assert_same(halves, tiny.run(halves), (tmp_path / "whole", whole))


def test_a_directory_that_is_removed_meanwhile_ends_the_run_and_is_not_made_again(tmp_path):
    """During step 3, which is logged; step 4 would be saved."""
    directory, steps = tmp_path / "run" / "tiny", []

    def count_events(batch):
        steps.append(1)
        if len(steps) == 3:
            shutil.rmtree(tmp_path / "run")
        return 1

    with pytest.raises(FileNotFoundError, match=rf"^{directory} was removed or moved while the run was writing to it"):
        tiny.run(directory, tiny.make_task(count_events=count_events), save_steps=4)
    assert len(steps) == 3 and not directory.exists()


def test_a_directory_that_is_removed_while_results_are_measured_is_not_made_again(tmp_path):
    directory = tmp_path / "run" / "tiny"
    task = tiny.make_task(results=lambda params: shutil.rmtree(tmp_path / "run") or [])
    with pytest.raises(FileNotFoundError, match="was removed or moved"):
        tiny.run(directory, task, total_steps=4)
    assert not directory.exists()


@pytest.mark.parametrize("damage", ["deleted", "flipped", "results"])
def test_what_a_finished_phase_left_is_refused_if_it_is_damaged_and_measured_again_from_its_checkpoint(
    tmp_path, uninterrupted, damage
):
    directory = tmp_path / "tiny"
    shutil.copytree(uninterrupted[0], directory)
    if damage == "deleted":
        shutil.rmtree(directory / "params")
    elif damage == "flipped":
        [path, *_] = [path for path in (directory / "params").rglob("*") if path.is_file() and path.stat().st_size > 500]
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    else:
        (directory / "results.json").write_text("[{")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{directory}/.*[Dd]elete"):
        tiny.run(directory)
    (directory / "results.json").unlink()
    _assert_same(directory, tiny.run(directory), uninterrupted)


@pytest.mark.slow
def test_a_logged_mean_is_of_all_its_steps_wherever_the_run_was_stopped(tmp_path):
    """Stopped at step 5, logged at step 6."""
    tiny.run(tmp_path / "whole", log_steps=6)
    with pytest.raises(Preempted):
        tiny.run(tmp_path / "halves", tiny.make_task(count_events=tiny.signal_at(5, signal.SIGTERM)), log_steps=6)
    tiny.run(tmp_path / "halves", log_steps=6)
    assert _metrics(tmp_path / "halves") == _metrics(tmp_path / "whole")
    assert [row["step"] for row in _metrics(tmp_path / "halves") if row["kind"] == "train"] == [6, 12]


@pytest.mark.slow
def test_a_run_killed_anywhere_and_started_again_equals_one_left_alone(tmp_path, uninterrupted):
    """kill -9 at a random step, with dropout, shuffling and packing; while a checkpoint may be half written."""
    step = random.randint(1, tiny.LOOP.total_steps)
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, tiny.__file__, str(tmp_path), f"--at={step}"],
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "results.json").exists()
    assert step - 4 <= max(_checkpoints(tmp_path) or [0]) < step, f"killed at step {step}"
    _assert_same(tmp_path, tiny.run(tmp_path), uninterrupted)


def test_a_finished_phase_is_not_trained_again(uninterrupted):
    directory, (params, rows) = uninterrupted
    nothing = lambda *_: pytest.fail("trained again")  # noqa: E731
    task = tiny.make_task(loss=nothing, evaluate=nothing, results=nothing, count_events=nothing)
    again, rows_again = tiny.run(directory, task)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert rows_again == rows


def test_a_run_that_died_while_measuring_measures_only(tmp_path, uninterrupted):
    """After training, before results.json."""
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, tiny.make_task(results=lambda params: (_ for _ in ()).throw(KeyboardInterrupt)))
    steps = []
    task = tiny.make_task(count_events=steps.append)
    _assert_same(tmp_path, tiny.run(tmp_path, task), uninterrupted)
    assert not steps


def test_nothing_is_traced_after_the_first_step(tmp_path):
    """Nor after a restart, which traces once."""
    traces, task = [], tiny.make_task()

    def loss(*given):
        traces.append(len(traces))
        return task.loss(*given)

    tiny.run(tmp_path, tiny.make_task(loss=loss), total_steps=8)
    assert len(traces) == 1


@pytest.mark.slow
def test_a_batch_that_memory_cannot_hold_is_refused_and_what_was_saved_stays(tmp_path, monkeypatch, uninterrupted):
    count = tiny.make_task().count_events
    with pytest.raises(SystemExit):
        tiny.run(tmp_path, tiny.make_task(count_events=lambda batch: os.kill(os.getpid(), signal.SIGTERM) or count(batch)))
    before = _checkpoints(tmp_path)
    assert before
    with monkeypatch.context() as small:
        small.setattr(meshes, "free_bytes", lambda mesh: 1)
        with pytest.raises(ValueError, match=r"A step needs 0\.00 GB on each device and 0\.00 GB are free: lower the batch"):
            tiny.run(tmp_path)
    assert _checkpoints(tmp_path) == before
    _assert_same(tmp_path, tiny.run(tmp_path), uninterrupted)
