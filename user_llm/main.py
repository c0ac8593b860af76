"""Run an experiment: `python -m user_llm.main --config=configs/quickstart.py --workdir=runs/quickstart`.

    raw files -> timelines -> split, audit -> phases (each: task -> loop -> result rows) -> results.json, report.md

Finished phases are skipped and interrupted ones resumed, so the same command goes on where it was stopped. `experiment.py` is what
it runs. With `--compile_only --topology=v5e:2x4` nothing runs: the train step of each phase, and what its evaluation computes, are
compiled for those TPU chips, on any machine.
"""

import os
import pathlib
import re
import signal
import sys
import tempfile

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from user_llm.ahead import apart
from user_llm.ahead.check import check, describe
from user_llm.common.distributed import initialize
from user_llm.common.printable import printable
from user_llm.common.terminal import set_up_log
from user_llm.config.reader import near_miss
from user_llm.experiment import run

CONFIGS = pathlib.Path(__file__).parent / "configs"  # a link in a checkout, the files themselves in an installed package

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment to run: a file such as configs/amazon_xattn.py:small, or the name of one that comes along.",
    lock_config=True,
)
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


def compile_only(config: ConfigDict, topology: str, kernels: bool) -> bool:
    """Print what each program of each phase takes of each chip of `topology`, and return whether all fit."""
    with tempfile.TemporaryDirectory() as workdir:
        found = apart.run(check, config, topology, epath.Path(workdir), kernels=kernels)
    print(describe(found))
    return all(step.fits for step in found)


def config_file(name: str) -> str:
    """Return the file, and the variant behind a colon, that `--config` names: a path as it is, or a config of the package by its name.

    Raises:
      SystemExit: neither is there.
    """
    stem, colon, variant = name.partition(":")
    if os.path.isfile(stem) or os.sep in stem or stem.endswith(".py"):
        return name
    known = {file.stem: file for file in CONFIGS.glob("*.py")}
    if stem not in known:
        sys.exit(
            f"Error: --config={name} is neither a file nor a config of the package{near_miss(stem, known)}: choose a path, or one of "
            f"{', '.join(sorted(known))}."
        )
    return f"{known[stem]}{colon}{variant}"


def with_config_file(argv: list[str]) -> list[str]:
    """Return the command line with the file that `--config` names, by `--config=NAME` or `--config NAME`; others stay as they are."""
    found = list(argv)
    for place, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            at = place if equals else place + 1
            if at < len(argv):
                found[at] = f"{flag}={config_file(value)}" if equals else config_file(argv[at])
    return found


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a typo in it ends in one sentence, where ml_collections would end in a traceback."""
    try:
        return flags.FLAGS(with_config_file(argv))
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
    try:
        if _COMPILE_ONLY.value:
            sys.exit(0 if compile_only(config, _TOPOLOGY.value, _KERNELS.value) else "Error: not every step fits its chip.")
        initialize()
        run(config, _WORKDIR.value or f"runs/{name}", command=["python", "-m", "user_llm.main", *sys.argv[1:]])
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
