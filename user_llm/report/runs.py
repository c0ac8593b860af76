"""What runs left, as read from their folders, and their rows merged by everything but the seed."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from user_llm.common.files import leads_out
from user_llm.common.metrics import ROW, ROWS, read_metrics
from user_llm.common.records import number, read_json, text, whole_number
from user_llm.evals.measured import Measured, load_measured
from user_llm.report.markdown import Markdown, code, say

ROW_KEYS = tuple(key.removesuffix("?") for key in ROW)
CONFIG = {"command?": [text], "versions?": {}, "config?": {}}


def attended_event(value: Any) -> bool:
    """Return whether a value is [title, how many events ago, weight]."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(fits(part) for fits, part in zip((text, whole_number, number), value, strict=True))
    )


SAMPLES = [{
    "task": text, "method": text, "user": whole_number, "history": [text], "wanted": text, "answer": text, "attended": [attended_event],
}]  # fmt: skip
MAX_ROWS = 20_000


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run left; all but `rows` may be empty."""

    directory: epath.Path
    rows: list[dict]
    config: dict
    audit: dict
    metrics: dict[str, list[dict]]
    measured: list[tuple[str, str, Measured]]  # (task, method, values of each target)
    controls: list[tuple[str, str, Measured]]  # the same with other histories too, as `tasks/controls.py` measures them
    samples: list[dict]  # as phases/samples.py leaves them


def read_run(workdir: epath.PathLike) -> Run:
    """Read what `main` left: results, config, audit, and each phase's metrics, samples and values of targets.

    Raises:
      ValueError: results.json is missing, or a file is cut short, holds what no run writes, or lies outside of the run.
    """
    directory = epath.Path(workdir)
    if not (directory / "results.json").exists():
        raise ValueError(f"{directory} holds no results.json: run its command again until it ends.")
    rows = read_json(_inside(directory, directory / "results.json"), ROWS, "run the evaluation again")
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{directory / 'results.json'} holds {len(rows):,} rows, more than the {MAX_ROWS:,} that are shown.")
    optional = {name: _inside(directory, directory / f"{name}.json") for name in ("config", "audit")}
    forms = {"config": CONFIG, "audit": {}}
    return Run(
        directory=directory,
        rows=rows,
        **{name: read_json(path, forms[name]) if path.exists() else {} for name, path in optional.items()},
        metrics={path.parent.name: read_metrics(path) for path in _found(directory, "*/metrics.jsonl")},
        samples=[sample for path in _found(directory, "*/samples.json") for sample in read_json(path, SAMPLES)],
        measured=[load_measured(path) for path in _found(directory, "*/values/*.npz")],
        controls=[load_measured(path) for path in _found(directory, "*/controls/*.npz")],
    )


def _found(directory: epath.Path, pattern: str) -> list[epath.Path]:
    return [_inside(directory, path) for path in sorted(directory.glob(pattern))]


def _inside(directory: epath.Path, path: epath.Path) -> epath.Path:
    """Return a path of a run, unless it is a link that leads out of its folder: that would show a file of somebody else.

    Raises:
      ValueError: it leads out.
    """
    if leads_out(path, directory):
        raise ValueError(f"{path} is a link to a file outside of the run: put a copy in its place, or delete it.")
    return path


class Seen(NamedTuple):
    """A measured value, its number of targets, the run that holds it, and how many training targets the method saw, if it says so."""

    value: float
    n: int
    run: epath.Path
    targets_seen: int | None = None


Group = tuple[str, str, str]  # Dataset, task, split.
Cells = dict[Group, dict[tuple[str, str], dict[int, Seen]]]  # (method, metric) -> seed -> value.


def merge_rows(runs: Sequence[Run]) -> tuple[Cells, list[Run], list[Markdown]]:
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
            new = Seen(row["value"], row["n"], run.directory, row.get("targets_seen"))
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
            say("{} repeats {} rows of {} (same seed): counted once.", code(run.directory), count, code(other))
            for other, count in repeated.items()
        ]
        if repeated.total() < len(run.rows) or not run.rows:
            kept.append(run)
    return cells, kept, notes


Measurements = dict[Group, dict[str, dict[int, Measured]]]  # method -> seed -> values.


def gather(runs: Sequence[Run], *, controls: bool = False) -> Measurements:
    """Gather the values of targets that have rows, as `merge_rows` does these: a method and seed that two runs hold counts once.

    Args:
      controls: whether to gather what was measured with other histories too.
    """
    found: Measurements = {}
    for run in runs:
        rows = {(row["task"], row["method"]): row for row in run.rows}
        for task, method, measured in run.controls if controls else run.measured:
            if row := rows.get((task, method)):
                found.setdefault((row["dataset"], task, row["split"]), {}).setdefault(method, {})[row["seed"]] = measured
    return found
