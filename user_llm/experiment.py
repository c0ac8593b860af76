"""`user_llm.run`: run all phases of a config, which may name datasets, tasks, encoders and LLM families of your own.

    raw files -> timelines -> split, audit -> phases (each: task -> loop -> result rows) -> results.json, report.md

Finished phases are skipped and interrupted ones resumed, so the same call goes on where it was stopped.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from user_llm.common import mesh as meshes
from user_llm.common.distributed import is_first
from user_llm.common.files import write_json
from user_llm.common.memory import keep_freed
from user_llm.common.terminal import show_results
from user_llm.common.workdir import hold
from user_llm.config.phases import Contextualize
from user_llm.config.reader import Config
from user_llm.data import audits
from user_llm.data.dataset import Dataset, Source, open_dataset
from user_llm.models.families import Family
from user_llm.phases import depends, general_text
from user_llm.phases.early import build_tasks
from user_llm.phases.kinds import Kinds
from user_llm.phases.run import Run
from user_llm.report.build import write_report
from user_llm.tasks.task import PromptTask
from user_llm.training import loop
from user_llm.training.loop import LoopConfig, settle_steps
from user_llm.training.pace import Pace

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    datasets: Mapping[str, Source] | None = None,
    tasks: Mapping[str, PromptTask] | None = None,
    encoders: Mapping[str, Any] | None = None,
    families: Mapping[str, Family] | None = None,
    command: Sequence[str] = (),
) -> list[dict]:
    """Run all phases of a config, and return the result rows.

        from user_llm.configs import quickstart

        config = quickstart.get_config()
        config.data.source, config.encoder.features = "my_log", ()  # all that its events have
        user_llm.run(config, "runs/mine", datasets={"my_log": find})

    Args:
      config: what `get_config` of a config file returns, changed as you like.
      workdir: the directory of the run. Called again with the same config it goes on where it was stopped.
      datasets: readers of datasets, by what `data.source` calls them: (the config's section `data`, a folder for downloads) -> `Raw`.
      tasks: further tasks of the LLM, by what `prompts` calls them; see `PromptTask`.
      encoders: encoders of your own, by what `encoder.kind` calls them; see `EncoderConfig`.
      families: further families of open LLMs, by what config.json calls their `model_type`; see `Family`.
      command: the command line that began the run, which report and model card show.

    A finished phase stays finished when the code of a dataset, task or encoder of your own changes: only settings and files are
    compared. In a run of several processes call `jax.distributed.initialize()` first. On a Linux CPU the whole process keeps the memory that
    it frees until the run ends (`common/memory.py`).

    Raises:
      ValueError: a setting, data or a directory that does not fit, in one sentence.
    """
    with ExitStack() as ending:
        ending.callback(keep_freed())
        kinds = Kinds.of(datasets or {}, tasks or {}, encoders or {}, families or {})
        read, directory = kinds.read(config), epath.Path(workdir)
        ending.enter_context(hold(directory))
        depends.check_settings(read, directory)
        data = open_dataset(read, directory, kinds.datasets)
        begun = Run(read, directory, meshes.make_mesh(**vars(read.mesh)), kinds, command=tuple(command))
        settled = begun.of(depends.settle_run(begun, data))
        save_config(read, directory, command)
        return run_phases(settled, data)


def run_phases(run: Run, data: Dataset) -> list[dict]:
    """Run the phases; the rows of each say its identity as their `config_hash`."""
    config, workdir = run.config, run.workdir
    audit = audits.audit(data.timelines, data.split)
    with jax.set_mesh(run.mesh):
        tasks = build_tasks(run, data)
        write_json(workdir / "audit.json", audit)
        rows = baseline_rows(run, data)
        if config.llm.checkpoint:
            rows += general_text.untouched(run, data)
        settings = {name: settle_steps(LoopConfig(**vars(config.sections[name].loop)), task) for name, task in tasks.items()}
        pace = Pace({name: task.work * settings[name].total_steps for name, task in tasks.items()})
        for number, (name, task) in enumerate(tasks.items(), 1):
            logging.info("Phase %d of %d: %s", number, len(tasks), name)
            optimizer = run.optimizer_config(name)
            rows += loop.run(task, settings[name], optimizer, run.mesh, workdir / name, config.seed, pace)[1]
            write_json(workdir / "results.json", rows)  # so that what is finished can be reported whatever happens next
    if is_first():
        write_report(workdir)
        show_results(rows, workdir / "report.html")
    return rows


def baseline_rows(run: Run, data: Dataset) -> list[dict]:
    """Return the result rows of what needs no model: of the next item, and of each task that a phase of the run asks."""
    phases = [phase for name in run.config.phases if isinstance(phase := run.config.sections[name], Contextualize)]
    asked = {"next_item"}.union(*(phase.prompts.asked for phase in phases))
    rows = []
    for task in run.kinds.tasks:
        if task in asked:
            for method, measured in run.kinds.tasks[task].baselines(data, run.config).items():
                rows += run.record(depends.BASELINES, data, task, method, measured)
    return rows


def hash_config(config: Config) -> str:
    """Return the hash of a config; which of its phases and variants run, and from where they are taken, is no part of it."""
    kept = {key: value for key, value in config.said.items() if key not in ("phases", "reuse", *config.variants)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def git_hash() -> str:
    """Return the commit of the checkout that this package lies in; the empty string if it lies in none, or there is no git."""
    package = os.path.dirname(__file__)
    try:
        found = subprocess.run(["git", "-C", package, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


def save_config(config: Config, workdir: epath.Path, command: Sequence[str] = ()) -> None:
    """Write the run's config.json with versions and git hash.

    Args:
      command: the command line that began the run; empty for one that a program began.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    facts = {
        "config_hash": hash_config(config),
        "command": list(command),
        "git": git_hash(),
        "versions": versions,
        "config": config.said,
    }
    write_json(workdir / "config.json", facts)
