"""From what runs left to report.md and report.html: results beside published figures, comparisons, costs, data audit, plots.

Runs with other seeds give mean and spread. `runs.read_run` says what a run's folder may hold; only results.json must be there.
"""

import re
import shlex
import statistics

import numpy as np
from etils import epath

from user_llm.common.files import absolute, whole
from user_llm.evals.bootstrap import DRAWS, compare
from user_llm.evals.measured import Measured
from user_llm.report import plots
from user_llm.report.breakdowns import breakdown_sections
from user_llm.report.costs import cost_section
from user_llm.report.markdown import table
from user_llm.report.page import write_page
from user_llm.report.published import PUBLISHED, SPLIT
from user_llm.report.runs import ROW_KEYS, Cells, Measurements, Run, Seen, gather, merge_rows, read_run

METRICS = ("recall@1", "recall@5", "recall@10", "ndcg@10", "mrr")
REFERENCE = "user_llm"  # what the other methods are compared with
COMPARED = ("recall@10", "accuracy", "rouge1")  # by the first of these that a task has
# What a metric's name says after its slash.
KINDS = {
    "": "Nothing filtered",
    "unseen": "History removed from the candidates (`unseen`)",
    "with_user": "While attending to a user (`with_user`)",
}


def write_report(*workdirs: epath.PathLike, costs: epath.PathLike = "", out: epath.PathLike | None = None) -> epath.Path:
    """Write report.md, its plots and report.html, and return the first's path.

    Args:
      costs: what `launch/benchmark_cost.py` wrote, if it is to be shown.
      out: folder; the first run's, or that of `costs`, by default.

    Raises:
      ValueError: nothing to report, or what cannot be read or merged.
    """
    if not workdirs and not costs:
        raise ValueError("Nothing to report: name a run's folder, or --cost=FILE.")
    runs = [read_run(path) for path in dict.fromkeys(absolute(w) for w in workdirs)]
    cells, runs, notes = merge_rows(runs)
    found = gather(runs)
    out = epath.Path(out or (workdirs[0] if workdirs else epath.Path(costs).parent))
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        "# Report",
        *(_run_section(runs, notes) if runs else []),
        *_result_sections(cells),
        *_comparison_sections(found),
        *breakdown_sections(found, out),
        *_sample_sections(runs),
        *(cost_section(epath.Path(costs), out) if costs else []),
        *_audit_section(runs),
        *_training_section(runs, out),
    ]
    path = out / "report.md"
    with whole(path) as target:
        target.write_text("\n\n".join(sections) + "\n")
    write_page(path)
    return path


def _run_section(runs: list[Run], notes: list[str]) -> list[str]:
    sections = ["## Runs"]
    for run in runs:
        facts = {
            # A row's own hash is that of its phase's identity.
            "config": run.config.get("config_hash") or ", ".join(sorted({str(row["config_hash"]) for row in run.rows})),
            "seed": ", ".join(sorted({str(row["seed"]) for row in run.rows})),
        }
        config = {**run.config, **run.config.get("versions", {})}
        for name, value in config.items():
            if name not in ("command", *ROW_KEYS) and isinstance(value, str | float | int):
                facts[name] = str(value)
        shown = ", ".join(f"{name} `{value}`" for name, value in facts.items())
        sections.append(f"`{run.directory.name}`: {shown}")
        if "command" in run.config:
            command = shlex.join(["python", "-m", "user_llm.main", *run.config["command"][1:]])
            sections.append(f"```\n{command}\n```")
    configs = [{**run.config["config"], "seed": None, "reuse": None} for run in runs if "config" in run.config]
    if any(config != configs[0] for config in configs):
        notes = [*notes, "The configs of these runs differ in more than the seed."]
    return sections + notes


def _result_sections(cells: Cells) -> list[str]:
    sections = []
    for (dataset, task, split), group in cells.items():
        sections.append(f"## {dataset}: {task} ({split})")
        directories = dict.fromkeys(seen.run for seeds in group.values() for seen in seeds.values())
        sections.append(f"Of {', '.join(f'`{directory.name}`' for directory in directories)}.")
        if any(len(seeds) > 1 for seeds in group.values()):
            sections.append("Mean over seeds ± sample standard deviation.")
        metrics = sorted({metric for _, metric in group}, key=_metric_order)
        suffixes = {metric.partition("/")[2] for metric in metrics}
        for suffix in [kind for kind in KINDS if kind in suffixes] + sorted(suffixes - set(KINDS)):
            if suffix or "unseen" in suffixes:  # only where something is filtered is there something to say of the rest
                sections.append(f"{KINDS.get(suffix, suffix)}:")
            sections.append(_resulttable(group, [metric for metric in metrics if metric.partition("/")[2] == suffix]))
        if (dataset, task) in PUBLISHED and split == SPLIT:
            sections += [
                f"Published on {dataset}; filter, preprocessing and order of ties differ:",
                table(*PUBLISHED[dataset, task]),
            ]
    return sections


def _comparison_sections(found: Measurements) -> list[str]:
    """Return intervals of each method and of its difference to the reference, on the same targets of the seeds that both have."""
    sections = []
    for (dataset, task), methods in found.items():
        reference = REFERENCE if REFERENCE in methods else next(iter(methods))
        base = methods[reference]
        known = next(iter(base.values())).values
        metric = next(name for name in (*COMPARED, *known) if name in known)
        rows, others = [], []
        for method, seeds in methods.items():
            shared = [seed for seed, measured in sorted(seeds.items()) if seed in base and _same_targets(measured, base[seed])]
            if not shared:
                others.append(method)
                continue
            values = {
                name: np.concatenate([methods[name][seed].values[metric] for seed in shared]) for name in (reference, method)
            }
            users = np.concatenate([base[seed].users for seed in shared])
            mean, own, difference, apart = compare(values, reference, users)[method]
            against = ["", ""] if method == reference else [f"{difference:+.4f}", _interval(apart)]
            rows.append([method, mean, _interval(own), *against, len(users), ", ".join(map(str, shared))])
        if len(rows) > 1:
            sections += [
                f"## {dataset}: {task}, compared",
                f"With 95% intervals by paired bootstrap over users ({DRAWS:,} draws)."
                + (f" Measured on other users and left out: {', '.join(others)}." if others else ""),
                table(["method", metric, "95%", f"against {reference}", "95%", "n", "seeds"], rows),
            ]
    return sections


def _same_targets(one: Measured, other: Measured) -> bool:
    return np.array_equal(one.users, other.users) and np.array_equal(one.positions, other.positions)


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def _metric_order(metric: str) -> tuple[int, str]:
    base = metric.partition("/")[0]
    return (METRICS.index(base) if base in METRICS else len(METRICS)), metric


def _resulttable(group: dict[tuple[str, str], dict[int, Seen]], metrics: list[str]) -> str:
    rows = []
    for method in dict.fromkeys(method for method, _ in group):
        cells = [group.get((method, metric), {}) for metric in metrics]
        if any(cells):
            targets = sorted({seen.n for seeds in cells for seen in seeds.values()})
            seeds = sorted({seed for seeds in cells for seed in seeds})
            numbers = ("/".join(map(str, targets)), ", ".join(map(str, seeds)))
            rows.append([method, *map(_mean_and_spread, cells), *numbers])
    return table(["method", *(m.partition("/")[0] for m in metrics), "n", "seeds"], rows)


def _mean_and_spread(seeds: dict[int, Seen]) -> str:
    values = [seen.value for seen in seeds.values()]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}" if values else ""


def _sample_sections(runs: list[Run]) -> list[str]:
    """Return what the methods answered to the same users; of several seeds the first run's."""
    found: dict[tuple[str, str, int], dict[str, dict]] = {}
    for run in runs:
        for sample in run.samples:
            asked = run.rows[0]["dataset"], sample["task"], sample["user"]
            found.setdefault(asked, {}).setdefault(sample["method"], sample)
    sections = []
    for (dataset, task, user), methods in sorted(found.items()):
        any_one = next(iter(methods.values()))
        sections += [
            f"### {dataset}: {task}, user {user}",
            f"Wanted: {_plain(any_one['wanted'])}. Latest events, newest first: {_plain('; '.join(any_one['history']))}.",
            table(
                ["method", "answer", "user tokens attended to (events ago, weight)"],
                [[name, _plain(sample["answer"]), _attended(sample)] for name, sample in methods.items()],
            ),
        ]
    return ["## Samples", *sections] if sections else []


def _attended(sample: dict) -> str:
    return _plain("; ".join(f"{title} ({ago}, {weight:.2f})" for title, ago, weight in sample["attended"]))


def _plain(text: str) -> str:
    """Return text of users on one line, without what Markdown would take for its own."""
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", " ".join(text.split()))


def _audit_section(runs: list[Run]) -> list[str]:
    audits: list[dict] = []
    for run in runs:
        if run.audit and run.audit not in audits:
            audits.append(run.audit)
    tables = [table(["number", "value"], audit.items()) for audit in audits]
    return ["## Data audit", *tables] if tables else []


def _training_section(runs: list[Run], out: epath.Path) -> list[str]:
    curves = [(run.directory.name, run.metrics) for run in runs if run.metrics]
    if not curves:
        return []
    plots.plot_losses(out / "loss.png", curves)
    sections = ["## Training", "![training loss and validation](loss.png)"]
    if plots.plot_gates(out / "gates.png", curves):
        sections.append("![gates by layer](gates.png)")
    return sections
