"""Run an experiment: `python -m user_llm.main --config=configs/quickstart.py --workdir=runs/quickstart`.

    raw files -> timelines -> split, audit -> phases (each: task -> loop -> result rows) -> results.json, report.md

Finished phases are skipped and interrupted ones resumed, so the same command goes on where it was stopped. With `--compile_only
--topology=v5e:2x4` nothing runs: the train step of each phase, and what its evaluation computes, are compiled for those TPU chips, on any
machine.
"""

import hashlib
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from user_llm.ahead import apart
from user_llm.ahead.check import check, describe
from user_llm.common.distributed import initialize, is_first
from user_llm.common.files import write_json
from user_llm.common.printable import printable
from user_llm.common.terminal import set_up_log, show_results
from user_llm.common.workdir import hold
from user_llm.config.check import check as check_config
from user_llm.data import audits
from user_llm.report.build import write_report
from user_llm.tasks import depends, general_text
from user_llm.tasks.asking import baseline_rows
from user_llm.tasks.context import Context, open_context
from user_llm.tasks.early import build_tasks
from user_llm.training import loop
from user_llm.training.loop import LoopConfig, settle_steps
from user_llm.training.pace import Pace

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment to run.", lock_config=True)
_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only",
    False,
    "Run nothing: compile all that training and evaluation run for --topology, on any machine, and say whether it fits.",
)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "TPU chips and their form, such as v5e:2x4, v6e:16x16, v5p:4x4x8.")
_KERNELS = flags.DEFINE_bool(
    "kernels", True, "Of --compile_only: wait for the code of kernels too; --nokernels takes a fraction of the time."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; runs/<config name> by default.")


def run(config: ConfigDict, workdir: epath.Path) -> list[dict]:
    """Run all phases of `config` in `workdir` and return the result rows."""
    check_config(config)
    with hold(workdir):
        depends.check_settings(config, workdir)
        context = open_context(config, workdir, hash_config(config))
        identities = depends.settle_run(config, context)
        save_config(config, workdir)
        return run_phases(config, context, identities)


def run_phases(config: ConfigDict, context: Context, identities: Mapping[str, str]) -> list[dict]:
    """Run the phases; the rows of each say its identity as their `config_hash`."""
    workdir = context.workdir
    audit = audits.audit(context.timelines, context.split)
    with jax.set_mesh(context.mesh):
        tasks = build_tasks(context, lambda name: context.of(identities[name]))
        write_json(workdir / "audit.json", audit)
        rows = baseline_rows(context.of(identities["baselines"]))
        if config.llm.checkpoint:
            rows += general_text.untouched(context.of(identities["llm"]))
        settings = {name: settle_steps(LoopConfig(**config[name].loop), task) for name, task in tasks.items()}
        pace = Pace({name: task.work * settings[name].total_steps for name, task in tasks.items()})
        for number, (name, task) in enumerate(tasks.items(), 1):
            logging.info("Phase %d of %d: %s", number, len(tasks), name)
            optimizer = context.optimizer_config(name)
            rows += loop.run(task, settings[name], optimizer, context.mesh, workdir / name, config.seed, pace)[1]
            write_json(workdir / "results.json", rows)  # so that what is finished can be reported whatever happens next
    if is_first():
        write_report(workdir)
        show_results(rows, workdir / "report.html")
    return rows


def hash_config(config: ConfigDict) -> str:
    """Return the hash of a config; which of its phases run, and from where they are taken, is no part of it."""
    resolved = json.loads(config.to_json_best_effort())
    kept = {key: value for key, value in resolved.items() if key not in ("phases", "reuse")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def save_config(config: ConfigDict, workdir: epath.Path) -> None:
    """Write the run's config.json with versions and git hash."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    resolved = json.loads(config.to_json_best_effort())
    facts = {"config_hash": hash_config(config), "command": sys.argv, "git": git, "versions": versions, "config": resolved}
    write_json(workdir / "config.json", facts)


def compile_only(config: ConfigDict, topology: str, kernels: bool) -> bool:
    """Print what each program of each phase takes of each chip of `topology`, and return whether all fit."""
    check_config(config)
    with tempfile.TemporaryDirectory() as workdir:
        found = apart.run(check, config, topology, epath.Path(workdir), kernels=kernels)
    print(describe(found))
    return all(step.fits for step in found)


def follow(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Let phases that are `like` another follow what the command line says of that one, where they are not set apart from it."""
    for name, section in config.items():
        if isinstance(section, ConfigDict) and "like" in section:
            for path, value in overrides.items():
                phase, _, key = path.partition(".")
                if phase == section.like.phase and key not in section.like.changed and f"{name}.{key}" not in overrides:
                    section.update_from_flattened_dict({key: value})


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a typo in it ends in one sentence, where ml_collections would end in a traceback."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:  # of a config file that fails, the last line is what it says
        sys.exit(f"Error: {str(error).strip().splitlines()[-1].strip().removeprefix('ValueError: ')}")
    except (LookupError, AttributeError, TypeError) as error:
        sys.exit(f"Error: the config has no key {missing_key(error)}")


def missing_key(error: Exception) -> str:
    """Return the key that ml_collections did not find, and its proposal of another if it has one."""
    cause: object = error
    while isinstance(cause, Exception) and cause.args:
        cause = cause.args[0]
    where = re.search(r"(?:Attempting to lookup: |\(in: )([\w.\[\]]+)", str(cause))
    return f"{where[1]}." if where else ". ".join(str(cause).splitlines())


def main(argv: list[str]) -> None:
    """Run the config, and end a user's mistake in one sentence."""
    set_up_log()
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    flag = flags.FLAGS["config"]
    name = epath.Path(config_flags.get_config_filename(flag)).stem
    config = _CONFIG.value
    follow(config, config_flags.get_override_values(flag))
    try:
        if _COMPILE_ONLY.value:
            sys.exit(0 if compile_only(config, _TOPOLOGY.value, _KERNELS.value) else "Error: not every step fits its chip.")
        initialize()
        run(config, epath.Path(_WORKDIR.value or f"runs/{name}"))
    except KeyboardInterrupt:  # outside of training, whose loop saves first
        print("Interrupted: the same command goes on from what was saved.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ArithmeticError) as error:
        # What the user can mend is said in one sentence; --verbosity=1 shows where it was raised.
        logging.debug("", exc_info=True)
        sys.exit(f"Error: {printable(error)}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"Error: out of memory: lower the batch or share it among more devices. {str(error).splitlines()[0]}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
