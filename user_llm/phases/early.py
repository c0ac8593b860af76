"""All phases of a run, built and checked before the first of them trains: what would fail after hours fails in seconds.

A phase is built of shapes alone. Nothing is computed, and no parameters are read. What the config tells by itself has been checked
before (`config/check.py`). This file checks what only the data, the tokenizer, the devices, the checkpoint or the other phases can tell.
"""

from collections.abc import Mapping

from absl import logging
from etils import epath

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.checkpoint import saved_shapes
from user_llm.common.errors import naming
from user_llm.common.trees import Params
from user_llm.data.dataset import Dataset
from user_llm.models import pretrained
from user_llm.models.export import tokenizer_files
from user_llm.phases import general_text, starting
from user_llm.phases.builders import BUILDERS
from user_llm.phases.llm import decoder_config, tokenizer
from user_llm.phases.run import Run
from user_llm.training.loop import LoopConfig, abstract_state, settle_steps
from user_llm.training.phases import has_trained
from user_llm.training.task import Task


def build_tasks(run: Run, data: Dataset) -> dict[str, Task]:
    """Build the tasks of all phases of a run, and see that each can run to its end.

    Returns:
      By phase, in the order in which they run; without `pretrain_lm` where an open LLM stands in for it.

    Raises:
      ValueError: the first phase that cannot, and why.
    """
    config, tasks = run.config, dict[str, Task]()
    if config.llm.checkpoint:
        pretrained.check_weights(run.checkpoint, run.kinds.families)
        tokenizer_files(run.checkpoint)  # which the model's directory will hold
        words = tokenizer(run, data)
        general_text.read_windows(words, **vars(config.general_text))
        general_text.check_window(decoder_config(run, 0), words, config.general_text.window)
    for name in config.phases:
        if config.sections[name].task == "pretrain_lm" and config.llm.checkpoint:
            logging.info("%s: left out, the LLM is %s", name, config.llm.checkpoint)
            continue
        with naming(name):
            task = BUILDERS[config.sections[name].task](name, run, data)
            check_task(task, run, tasks)
        tasks[name] = task
    return tasks


def check_task(task: Task, run: Run, earlier: Mapping[str, Task]) -> None:
    """See that a phase can start, step, be monitored and be measured.

    Args:
      earlier: the phases that run before it.

    Raises:
      ValueError: what it cannot do.
    """
    phase = run.config.sections[task.name]
    loop = settle_steps(LoopConfig(**vars(phase.loop)), task)
    if not task.steps_per_epoch:
        raise ValueError("no user has two events to train on: lower data.withhold, or take more data.")
    if loop.monitor not in task.metrics:
        raise ValueError(f"loop.monitor={loop.monitor!r}: choose one of {', '.join(task.metrics)}.")
    key, rows = phase.rows
    shards = meshes.row_shards(run.mesh)
    if rows % (loop.accumulation_steps * shards):
        raise ValueError(
            f"{key}={rows}: it must be a multiple of {loop.accumulation_steps * shards}, for {loop.accumulation_steps} "
            f"parts (loop.accumulation_steps) on {shards} devices (mesh.data x mesh.fsdp)."
        )
    check_sources(task, run, earlier)
    abstract_state(task, loop, run.optimizer_config(task.name), run.mesh, run.seed)
    task.check()


def check_sources(task: Task, run: Run, earlier: Mapping[str, Task]) -> None:
    """See that every parameter that starts from another phase exists there in the same shape.

    Raises:
      ValueError: a phase that neither runs before nor is finished, or whose parameters are others.
    """
    shapes = trees.flatten(task.shapes)
    sources = trees.flatten(starting.sources(run, task.load, task.shapes))
    for source in sorted(set(sources.values()) - {"fresh", "checkpoint"}):
        there = earlier[source].shapes if source in earlier else _finished_shapes(run.workdir / source)
        if there is None:
            instead = (
                f", or set {task.name}.encoder_init=scratch"
                if source == getattr(run.config.sections[task.name], "encoder", "")
                else ""
            )
            raise ValueError(
                f"it starts from {source}, which does not run before it: put {source} before {task.name} in phases{instead}."
            )
        wanted = {path.partition("/")[2]: shapes[path].shape for path, name in sources.items() if name == source}
        given = {path: leaf.shape for path, leaf in trees.flatten(there).items()}
        if differing := sorted(path for path in wanted.keys() | given.keys() if wanted.get(path) != given.get(path)):
            path = differing[0]
            raise ValueError(
                f"it cannot start from {source}: {path} is {given.get(path, 'missing')} there and {wanted.get(path, 'missing')} here; "
                f"change {task.name}.load or the sizes, or run {source} anew."
            )


def _finished_shapes(directory: epath.Path) -> Params | None:
    """Return the shapes of the parameters that a finished phase left, or None."""
    return saved_shapes(directory / "params") if has_trained(directory) else None
