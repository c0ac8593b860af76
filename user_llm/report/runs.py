"""What runs left, as read from their folders, and their rows merged by everything but the seed."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from user_llm.common.metrics import read_metrics
from user_llm.evals.measured import Measured, load_measured

ROW_KEYS = ("dataset", "task", "method", "metric", "value", "n", "seed", "split", "config_hash")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run left; all but `rows` may be empty."""

    directory: epath.Path
    rows: list[dict]
    config: dict
    audit: dict
    metrics: dict[str, list[dict]]
    measured: list[tuple[str, str, Measured]]  # (task, method, values of each target)
    samples: list[dict]  # as tasks/samples.py leaves them


def read_run(workdir: epath.PathLike) -> Run:
    """Read what `main` left: results, config, audit, and each phase's metrics, samples and values of targets.

    Raises:
      ValueError: results.json is missing, a file is cut short, or a row lacks a column.
    """
    directory = epath.Path(workdir)
    if not (directory / "results.json").exists():
        raise ValueError(f"{directory} holds no results.json: run its command again until it ends.")
    rows = _read_json(directory / "results.json")
    for number, row in enumerate(rows, 1):
        if missing := [key for key in ROW_KEYS if key not in row]:
            where = f"{directory / 'results.json'}, row {number}"
            raise ValueError(f"{where}: no {missing[0]!r}; run the evaluation again.")
    optional = {name: directory / f"{name}.json" for name in ("config", "audit")}
    return Run(
        directory=directory,
        rows=rows,
        **{name: _read_json(path) if path.exists() else {} for name, path in optional.items()},
        metrics={path.parent.name: read_metrics(path) for path in sorted(directory.glob("*/metrics.jsonl"))},
        samples=[sample for path in sorted(directory.glob("*/samples.json")) for sample in _read_json(path)],
        measured=[load_measured(path) for path in sorted(directory.glob("*/values/*.npz"))],
    )


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON; delete the file and run the command again.") from error


class Seen(NamedTuple):
    """A measured value with its number of targets and the run that holds it."""

    value: float
    n: int
    run: epath.Path


Group = tuple[str, str, str]  # Dataset, task, split.
Cells = dict[Group, dict[tuple[str, str], dict[int, Seen]]]  # (method, metric) -> seed -> value.


def merge_rows(runs: Sequence[Run]) -> tuple[Cells, list[Run], list[str]]:
    """Gather rows by everything but the seed.

    Returns:
      The cells, the runs that added something, and a note for each run that repeats a seed of
      another run with the same values, which counts once.

    Raises:
      ValueError: two rows for one seed with different values.
    """
    cells: Cells = {}
    kept, notes = [], []
    for run in runs:
        repeated: Counter[epath.Path] = Counter()
        for row in run.rows:
            group = cells.setdefault((row["dataset"], row["task"], row["split"]), {})
            seeds = group.setdefault((row["method"], row["metric"]), {})
            new = Seen(row["value"], row["n"], run.directory)
            old = seeds.setdefault(row["seed"], new)
            if old[:2] != new[:2]:
                raise ValueError(
                    f"{old.run} and {new.run} differ for seed {row['seed']} in {row['method']} "
                    f"{row['metric']} ({old.value} and {new.value}): give one run per seed, or "
                    "report them apart."
                )
            if old is not new:
                repeated[old.run] += 1
        notes += [
            f"`{run.directory}` repeats {count} rows of `{other}` (same seed): counted once."
            for other, count in repeated.items()
        ]
        if repeated.total() < len(run.rows) or not run.rows:
            kept.append(run)
    return cells, kept, notes


Measurements = dict[tuple[str, str], dict[str, dict[int, Measured]]]  # (dataset, task) -> method -> seed -> values.


def gather(runs: Sequence[Run]) -> Measurements:
    """Gather the values of targets that have rows, as `merge_rows` does these: a method and seed that two runs hold counts once."""
    found: Measurements = {}
    for run in runs:
        rows = {(row["task"], row["method"]): row for row in run.rows}
        for task, method, measured in run.measured:
            if row := rows.get((task, method)):
                found.setdefault((row["dataset"], task), {}).setdefault(method, {})[row["seed"]] = measured
    return found
