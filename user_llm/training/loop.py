"""The one train loop of the house, for every phase of every config.

Order: resume -> {evaluate if due -> save if due -> next batch -> step -> log if due} -> final evaluation, save, results.
A checkpoint holds the state and the progress record, with the place in the data, so that a run killed at any step and started again
gives the same numbers, bit for bit, as one that was left alone. Several processes run the same loop side by side.
"""

import dataclasses
import signal
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.checkpoint import Checkpointer, load_params, save_params
from user_llm.common.distributed import barrier, gather, is_first, preemption
from user_llm.common.files import write_json
from user_llm.common.metrics import ROWS, MetricsLog
from user_llm.common.records import read_json
from user_llm.common.trees import Params, Rules
from user_llm.common.workdir import standing
from user_llm.training.optimizer import (
    OptimizerConfig,
    abstract_optimizer,
    init_optimizer,
    make_optimizer,
    partition_trainable,
)
from user_llm.training.pace import Pace
from user_llm.training.phases import RESULTS, drop_results, has_results
from user_llm.training.step import TrainState, cast, check_memory, make_train_step
from user_llm.training.task import Task


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to look.

    Attributes:
      total_steps, eval_steps, save_steps, log_steps: in optimizer steps. Saves also happen after each evaluation.
      total_epochs: how long in passes over the training data instead, with `total_steps` 0.
      monitor, mode: the validation metric that is watched, and whether `max` or `min` is best.
      patience_evals: stop after this many evaluations without a new best; 0 never stops early.
      keep: which trained parameters the phase leaves: the `best` by that metric, or the `last`.
      dtype: in which training and evaluation compute. Trained parameters are kept in float32 and cast at every step. Frozen ones are kept
        in `dtype`, or in the checkpoint's type if that takes fewer bytes (`nn/stored.py`).
      accumulation_steps: into how many parts, computed one after the other, each batch is split. The gradient is the whole batch's,
        but for dropout, masked events and negatives within the batch, which each part has of its own.
      sharding: rules to tuples of mesh axes.
    """

    total_steps: int
    total_epochs: float
    eval_steps: int
    save_steps: int
    log_steps: int
    monitor: str
    mode: str
    patience_evals: int
    keep: str
    dtype: str
    accumulation_steps: int
    sharding: Rules


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides arrays; saved with every checkpoint.

    Attributes:
      targets: so many training targets the parameters have seen, with those of the phases that taught them (`Task.taught_by`); None
        where nobody knows, as after a checkpoint or a phase that does not say it.
      best_step: of the steps that were evaluated, the one whose parameters are kept: the best or the last; -1 before there is one.
      best_targets: so many they had seen at that step.
      best_value: the best of the monitored metric, whatever step is kept.
    """

    targets: int | None = None
    best_targets: int | None = None
    best_step: int = -1
    best_value: float = float("-inf")
    stale_evals: int = 0
    evaluated_step: int = -1
    unlogged: list[dict[str, float]] = dataclasses.field(default_factory=list)  # scalars of the steps since the last log
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # where each stream is

    def count(self, targets: int) -> None:
        """Add targets that were seen; a number that is not known stays so."""
        if self.targets is not None:
            self.targets += targets


class Preempted(SystemExit):
    """SIGTERM (exit code 0) or SIGINT (130) arrived; everything is saved and the same command goes on from here."""


def run(
    task: Task,
    config: LoopConfig,
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
    directory: epath.Path,
    seed: int,
    pace: Pace | None = None,
) -> tuple[Params, list[dict]]:
    """Train `task` in `directory`, or return at once what a finished run left there.

    Args:
      pace: of the run that this phase is a part of; the phase's own alone if it is None.

    Returns:
      The trained parameters that the phase keeps, and the result rows measured with them.

    Raises:
      FloatingPointError: the loss became NaN or infinite.
      FileNotFoundError: the directory was removed meanwhile, or the parameters of a finished run were.
      ValueError: what a finished run left is damaged.
      Preempted: after SIGTERM or SIGINT, once everything is saved.
    """
    config = settle_steps(config, task)
    directory = epath.Path(directory)
    pace = pace or Pace({task.name: 1.0})
    if has_results(directory):
        pace.resume(task.name, 1.0)
        logging.info("%s: finished earlier, reusing %s", task.name, directory)
        return load_params(directory / "params", abstract_params(task, config, mesh)), read_rows(directory)
    if is_first():
        directory.mkdir(parents=True, exist_ok=True)
    barrier(f"{task.name} begins")
    with standing(directory) as check:
        params, targets = _train(task, config, optimizer_config, mesh, directory, seed, check, pace)
        pace.reach(task.name, 1.0)
        if is_first():
            drop_results(directory)
        seen = {} if targets is None else {"targets_seen": targets}
        rows = [{**row, **seen} for row in task.results(cast(params, jnp.dtype(config.dtype)))]
        check()
        save_params(directory / "params", params)
        write_json(directory / RESULTS, rows)  # last: its presence says that the phase is complete
    return params, rows


def read_rows(directory: epath.Path) -> list[dict]:
    """Return the result rows of a finished phase.

    Raises:
      ValueError: a damaged file.
    """
    return read_json(directory / RESULTS, ROWS, "delete it and run the same command: its phase is measured again")


def targets_before(task: Task, workdir: epath.Path) -> int | None:
    """Return how many training targets the phases have seen that taught a task's parameters before its own phase; None if one does not say."""
    rows = [row for name in task.taught_by for row in read_rows(workdir / name)[:1]]
    return sum(row["targets_seen"] for row in rows) if all("targets_seen" in row for row in rows) else None


def targets_of_all(own: int, shares: int) -> int:
    """Return how many targets the rows of all processes hold; those that several processes read count once.

    Args:
      own: the targets that this process read.
      shares: into how many shares the processes divide the rows.
    """
    counts = gather(own)
    return sum(counts) * shares // len(counts)


def _train(
    task: Task,
    config: LoopConfig,
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
    directory: epath.Path,
    seed: int,
    check: Callable[[], None],
    pace: Pace,
) -> tuple[Params, int | None]:
    """Train from the last checkpoint on; `check` refuses a directory that was removed.

    Returns:
      The parameters that the phase keeps, and how many training targets they have seen, None if nobody knows.
    """
    state, step_fn = initial_state(task, config, optimizer_config, mesh, seed)
    if not jax.tree.leaves(state.trainable):  # a phase that measures and trains nothing
        config = dataclasses.replace(config, total_steps=0)
    data = iter(task.train_data)
    before = targets_before(task, directory.parent)
    progress = Progress(before, before)
    checkpoints = Checkpointer(directory / "checkpoints")
    saved_step = step = checkpoints.latest_step() or 0
    if step:
        state, record = checkpoints.restore(step, state)
        progress = Progress(**record)
        if progress.best_step == 0 and config.total_steps:  # older runs could name the start; it no longer counts
            progress.best_step, progress.best_value, progress.best_targets = -1, float("-inf"), progress.targets
        data.set_state(progress.data)
        logging.info("%s: resuming at step %d", task.name, step)
        pace.resume(task.name, step / config.total_steps)

    log = MetricsLog(directory, task.name, step=step, total_steps=config.total_steps)
    with closing(checkpoints), log, preemption() as preempted:  # Whatever ends the loop, pending saves are finished.
        # Gloo, between processes on CPUs, can hang where one runs ahead of the others.
        together = jax.process_count() > 1 and jax.default_backend() == "cpu"
        shares = meshes.row_share(mesh).count
        pending: list[dict[str, jax.Array] | dict[str, float]] = [*progress.unlogged]
        # Targets read since the last log, and since `progress.targets` was last updated.
        events, uncounted, since = 0, 0, time.monotonic()
        checked: set[tuple] = set()  # shapes of batches: several tasks may take turns
        beside = meshes.put_whole(task.beside, mesh)
        while True:
            signalled = preempted(step)
            last = step >= config.total_steps
            if (step % config.eval_steps == 0 or last) and progress.evaluated_step != step:
                progress.count(targets_of_all(uncounted, shares))
                uncounted = 0
                _evaluate(task, config, state, step, progress, log)
            stalled = 0 < config.patience_evals <= progress.stale_evals
            due = step % config.save_steps == 0 or progress.evaluated_step == step or signalled is not None
            if due and saved_step != step:
                progress.count(targets_of_all(uncounted, shares))
                uncounted = 0
                progress.unlogged = [{k: float(v) for k, v in scalars.items()} for scalars in pending]
                if pending:
                    log.check_finite(step, {k: progress.unlogged[-1][k] for k in ("loss", "grad_norm")})
                check()
                metric = progress.best_value if progress.best_step == step else None
                # Streams that processes share are the same in each.
                progress.data = {number: place for found in gather(data.get_state()) for number, place in found.items()}
                checkpoints.save(step, state, dataclasses.asdict(progress), metric)
                log.publish()
                saved_step = step
            if signalled is not None:
                logging.info("%s: %s, saved at step %d; the same command goes on from there.", task.name, signalled.name, step)
                raise Preempted(130 if signalled == signal.SIGINT else 0)
            if last or stalled:
                break
            batch = next(data)
            arrays = meshes.put_batch(batch, mesh) | beside
            shapes = tuple(array.shape for array in jax.tree.leaves(arrays))
            if shapes not in checked:
                check_memory(step_fn, state, arrays, mesh)
                checked.add(shapes)
            state, scalars = step_fn(state, arrays)
            if together:
                jax.block_until_ready(scalars)
            step += 1
            pending.append(scalars)
            count = task.count_events(batch)
            events += shares * count
            uncounted += count
            if step % config.log_steps == 0 or step == config.total_steps:
                names = dict.fromkeys(name for scalars in pending for name in scalars)
                means = {k: float(jnp.mean(jnp.array([s[k] for s in pending if k in s]))) for k in names}
                now = time.monotonic()
                check()
                pace.reach(task.name, step / config.total_steps)
                log.train(step, means, events_per_s=events / (now - since), run_left=pace.seconds_left())
                pending, events, since = [], 0, now
        params = state.params
        if progress.best_step == -1:
            logging.warning(
                "%s: no evaluation gave a number to choose by; the parameters of step %d are kept.", task.name, step
            )
            return params, progress.targets
        if progress.best_step != step:
            params = checkpoints.restore_state(progress.best_step, state).params
    return params, progress.best_targets


def settle_steps(config: LoopConfig, task: Task) -> LoopConfig:
    """Return the config with its length in steps, however it was given.

    Raises:
      ValueError: no length, or two.
    """
    if (config.total_steps > 0) == (config.total_epochs > 0):
        raise ValueError(
            f"{task.name}: set one of loop.total_steps ({config.total_steps}) and loop.total_epochs ({config.total_epochs}), "
            "and the other to 0."
        )
    steps = config.total_steps or max(round(config.total_epochs * task.steps_per_epoch), 1)
    return dataclasses.replace(config, total_steps=steps, total_epochs=0.0)


def abstract_params(task: Task, config: LoopConfig, mesh: Mesh) -> Params:
    """Return the shapes and shardings of the parameters."""
    return meshes.placed(task.shapes, meshes.shardings(config.sharding, task.shapes, mesh))


def abstract_state(
    task: Task, config: LoopConfig, optimizer_config: OptimizerConfig, mesh: Mesh, seed: int
) -> tuple[TrainState, jax.stages.Wrapped]:
    """Return what `initial_state` does, but of the state its shapes and shardings alone."""
    params = abstract_params(task, config, mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    return _state_and_step(task, config, optimizer_config, mesh, seed, params, step, abstract_optimizer)


def initial_state(
    task: Task, config: LoopConfig, optimizer_config: OptimizerConfig, mesh: Mesh, seed: int
) -> tuple[TrainState, jax.stages.Wrapped]:
    """Return the state at step 0, sharded over the mesh, and the jitted train step."""
    params = task.init(lambda shapes: meshes.shardings(config.sharding, shapes, mesh))
    step = jax.device_put(jnp.zeros((), jnp.int32), meshes.replicated(mesh))
    state, step_fn = _state_and_step(task, config, optimizer_config, mesh, seed, params, step, init_optimizer)
    logging.info("%s: %s", task.name, train_summary(state))
    return state, step_fn


def _state_and_step(
    task: Task,
    config: LoopConfig,
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
    seed: int,
    params: Params,
    step: Any,
    moments: Callable[..., optax.OptState],
) -> tuple[TrainState, jax.stages.Wrapped]:
    """Put a state together of arrays, or of shapes alone; `moments` returns the optimizer's part."""
    trainable, frozen = partition_trainable(optimizer_config, params)
    frozen = cast(frozen, jnp.dtype(config.dtype))
    optimizer = make_optimizer(optimizer_config, trainable, config.total_steps)
    state = TrainState(step, trainable, frozen, moments(optimizer, trainable, mesh))
    step_fn = make_train_step(task, optimizer, state, seed=seed, dtype=jnp.dtype(config.dtype), parts=config.accumulation_steps)
    return state, step_fn


def _evaluate(task: Task, config: LoopConfig, state: TrainState, step: int, progress: Progress, log: MetricsLog) -> None:
    """Measure on validation and update `progress`, in which larger is always better.

    Parameters that no step has trained are measured too, but only a phase that trains nothing keeps them: an LLM that adds to
    the ranking of its encoder starts with that ranking, and knows nothing else of its users yet.
    """
    metrics = task.evaluate(cast(state.params, jnp.dtype(config.dtype)))
    log.eval(step, metrics, targets_seen=progress.targets)
    if config.monitor not in metrics:
        raise ValueError(f"{task.name} cannot monitor {config.monitor!r}: it reports {', '.join(metrics)}.")
    value = metrics[config.monitor] * (1 if config.mode == "max" else -1)
    progress.evaluated_step = step
    if step == 0 and config.total_steps:
        return
    better = value > progress.best_value
    if better:
        progress.best_value = value
    progress.stale_evals = 0 if better else progress.stale_evals + 1
    if better or config.keep == "last":
        progress.best_step, progress.best_targets = step, progress.targets


def train_summary(state: TrainState) -> str:
    """Say how much is trained, and what its optimizer keeps."""
    moving, fixed = trees.count(state.trainable), trees.count(state.frozen)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    return f"{moving:,} of {moving + fixed:,} parameters trainable, optimizer state {size / 1e6:,.1f} MB"
