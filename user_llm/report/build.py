"""From what runs left to report.md and report.html: the answer first, then results beside published figures, comparisons, costs, plots.

Runs with other seeds give mean and spread. `runs.read_run` says what a run's folder may hold; only results.json must be there.
"""

import json
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from etils import epath

from user_llm.common.files import absolute, whole
from user_llm.evals.measured import NO_USER, RANDOM_USER
from user_llm.report import plots
from user_llm.report.breakdowns import breakdown_sections
from user_llm.report.controls import control_sections
from user_llm.report.costs import cost_section
from user_llm.report.markdown import Markdown, code, command, listed, picture, say, table
from user_llm.report.page import write_page
from user_llm.report.published import PUBLISHED, SPLIT
from user_llm.report.runs import ROW_KEYS, Cells, Group, Run, Seen, gather, merge_rows, read_run
from user_llm.report.standing import MARK, Standing, answer, comparison, first_metric, mark, standings

METRICS = ("recall@1", "recall@5", "recall@10", "ndcg@10", "mrr")
# What a metric's name says after its slash.
KINDS = {
    "": "Nothing filtered",
    "unseen": "History removed from the candidates (`unseen`)",
    RANDOM_USER: "With another user's history (`random_user`)",
    NO_USER: "With no history (`no_user`)",
    "corpus": "Of all questions together (`corpus`)",
    "with_user": "While attending to a user (`with_user`)",
}
Stood = dict[Group, tuple[str, list[Standing]]]  # Of each group its first metric, and how the methods stand by it.


def write_report(
    *workdirs: epath.PathLike,
    costs: epath.PathLike = "",
    out: epath.PathLike | None = None,
    reference: str = "",
    metric: str = "",
) -> epath.Path:
    """Write report.md, its plots and report.html, and return the first's path.

    Args:
      costs: what `launch/benchmark_cost.py` wrote, if it is to be shown.
      out: folder; the first run's, or that of `costs`, by default.
      reference: the method that the others are compared with, in each task that it was measured in; in other tasks, and by default, it
        is the first of `standing.REFERENCES` that was measured.
      metric: by which they are compared, in each task that has it; in other tasks, and by default, it is the first of `standing.COMPARED`.

    Raises:
      ValueError: nothing to report, what cannot be read or merged, or a reference or metric that no run has.
    """
    if not workdirs and not costs:
        raise ValueError("Nothing to report: name a run's folder, or --cost=FILE.")
    runs = [read_run(path) for path in dict.fromkeys(absolute(w) for w in workdirs)]
    cells, runs, notes = merge_rows(runs)
    measured = gather(runs)
    for kind, wanted, known in (
        ("reference", reference, dict.fromkeys(method for values in cells.values() for method, _ in values)),
        ("metric", metric, dict.fromkeys(name for values in cells.values() for _, name in values)),
    ):
        if wanted and wanted not in known:
            raise ValueError(
                f"No run has the {kind} {wanted!r}: choose one of {', '.join(known) or 'none, for there are no runs'}."
            )
    stood: Stood = {}
    for group, values in cells.items():
        compared = first_metric(sorted({name for _, name in values}, key=_metric_order), metric)
        rows = {method: seeds for (method, name), seeds in values.items() if name == compared}
        stood[group] = compared, standings(compared, rows, measured.get(group, {}), reference)
    if reference and not any(one.method == reference and one.is_reference for _, methods in stood.values() for one in methods):
        raise ValueError(
            f"No run has {reference}'s values of single targets by {' or '.join(dict.fromkeys(name for name, _ in stood.values()))}: "
            "choose another reference or metric."
        )
    pictures: dict[str, bytes] = {}  # the plots, by their files' names
    sections = [
        say("# Report"),
        *_answer_section(stood, pictures),
        *control_sections(gather(runs, controls=True)),
        *_result_sections(cells, stood),
        *_comparison_sections(stood),
        *breakdown_sections(measured, pictures),
        *_sample_sections(runs),
        *(cost_section(epath.Path(costs), pictures) if costs else []),
        *_audit_section(runs),
        *_training_section(runs, pictures),
        *(_run_section(runs, notes) if runs else []),
    ]
    report = Markdown("\n\n".join(sections) + "\n")
    out = epath.Path(out or (workdirs[0] if workdirs else epath.Path(costs).parent))
    out.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        with whole(out / name) as target:
            target.write_bytes(png)
    with whole(out / "report.md") as target:
        target.write_text(report, encoding="utf-8")
    write_page(out / "report.html", report, pictures)
    return out / "report.md"


def _answer_section(stood: Stood, pictures: dict[str, bytes]) -> list[Markdown]:
    """Return what the runs say in a sentence or two for each dataset and task, and one picture."""
    if not stood:
        return []
    panels = {
        f"{dataset}: {task} ({split}), {metric} with 95% intervals": methods
        for (dataset, task, split), (metric, methods) in stood.items()
    }
    pictures["answer.png"] = plots.plot_standings(panels)
    others = any(one.other_users for _, methods in stood.values() for one in methods)
    return [
        Markdown("  \n".join(answer(dataset, task, metric, m) for (dataset, task, _), (metric, m) in stood.items())),
        picture("answer.png", "methods by their first metric, with intervals"),
        *(
            [say("{} hollow: not measured on all targets of the method that the others are compared with.", MARK)]
            if others
            else []
        ),
    ]


def _run_section(runs: list[Run], notes: list[Markdown]) -> list[Markdown]:
    sections = [say("## Runs")]
    for run in runs:
        facts = {
            # A row's own hash is that of its phase's identity.
            "config": run.config.get("config_hash") or ", ".join(sorted({row["config_hash"] for row in run.rows})),
            "seed": ", ".join(map(str, sorted({row["seed"] for row in run.rows}))),
        }
        config = {**run.config, **run.config.get("versions", {})}
        for name, value in config.items():
            if name not in ("command", *ROW_KEYS) and isinstance(value, str | float | int):
                facts[name] = str(value)
        shown = listed(say("{} {}", name, code(value)) for name, value in facts.items())
        sections.append(say("{}: {}", code(run.directory.name), shown))
        if run.config.get("command"):
            sections.append(command(shlex.join(run.config["command"])))
    configs = [{**run.config["config"], "seed": None, "reuse": None} for run in runs if "config" in run.config]
    if any(config != configs[0] for config in configs):
        notes = [*notes, say("The configs of these runs differ in more than the seed.")]
    return sections + notes


def _result_sections(cells: Cells, stood: Stood) -> list[Markdown]:
    sections = []
    for (dataset, task, split), group in cells.items():
        sections.append(say("## {}: {} ({})", dataset, task, split))
        directories = dict.fromkeys(seen.run for seeds in group.values() for seen in seeds.values())
        sections.append(say("Of {}.", listed(code(directory.name) for directory in directories)))
        if any(len(seeds) > 1 for seeds in group.values()):
            sections.append(say("Mean over seeds ± sample standard deviation."))
        metrics = sorted({metric for _, metric in group}, key=_metric_order)
        suffixes = {metric.partition("/")[2] for metric in metrics}
        others = {one.method for one in stood[dataset, task, split][1] if one.other_users}
        for suffix in [kind for kind in KINDS if kind in suffixes] + sorted(suffixes - set(KINDS)):
            if suffix or "unseen" in suffixes:  # only where something is filtered is there something to say of the rest
                sections.append(say("{}:", Markdown(KINDS[suffix]) if suffix in KINDS else suffix))
            chosen = [metric for metric in metrics if metric.partition("/")[2] == suffix]
            sections.append(_resulttable(group, chosen, others, trained=not suffix))
        if others:
            sections.append(say("{} Not measured on all targets of the method that the others are compared with.", MARK))
        if (dataset, task) in PUBLISHED and split == SPLIT:
            sections += [
                say("Published on {}; filter, preprocessing and order of ties differ:", dataset),
                table(*PUBLISHED[dataset, task]),
            ]
    return sections


def _comparison_sections(stood: Stood) -> list[Markdown]:
    """Return intervals of each method and of its difference to the reference, on the same targets of the seeds that both have."""
    sections = []
    for (dataset, task, _), (metric, methods) in stood.items():
        if shown := comparison(metric, methods):
            sections += [say("## {}: {}, compared", dataset, task), *shown]
    return sections


def _metric_order(metric: str) -> tuple[int, str]:
    base = metric.partition("/")[0]
    return (METRICS.index(base) if base in METRICS else len(METRICS)), metric


def _resulttable(
    group: Mapping[tuple[str, str], dict[int, Seen]], metrics: list[str], others: set[str], *, trained: bool
) -> Markdown:
    """Return a line for each method; with `trained`, how many training targets it saw, if any method says so."""
    rows, seen = [], []
    for method in dict.fromkeys(method for method, _ in group):
        cells = [group.get((method, metric), {}) for metric in metrics]
        if any(cells):
            found = [one for seeds in cells for one in seeds.values()]
            targets = sorted({one.n for one in found})
            seeds = sorted({seed for seeds in cells for seed in seeds})
            numbers = ("/".join(map(str, targets)), listed(seeds))
            rows.append([mark(method, method in others), *map(_mean_and_spread, cells), *numbers])
            seen.append(sorted({one.targets_seen for one in found if one.targets_seen is not None}))
    header = ["method", *(m.partition("/")[0] for m in metrics), "n", "seeds"]
    if trained and any(seen):
        header = [*header, "training targets seen"]
        rows = [
            [*row, " to ".join(f"{n:,}" for n in (counts[:1] + counts[1:][-1:]))]
            for row, counts in zip(rows, seen, strict=True)
        ]
    return table(header, rows)


def _mean_and_spread(seeds: Mapping[int, Seen]) -> Markdown:
    values = [float(seen.value) for seen in seeds.values()]
    if not values:
        return Markdown("")
    mean = statistics.fmean(values)
    return say("{} ± {}", mean, statistics.stdev(values)) if len(values) > 1 else say("{}", mean)


def _sample_sections(runs: list[Run]) -> list[Markdown]:
    """Return what the methods answered to the same users; of several seeds the first run's."""
    answered: dict[tuple[str, str, int], dict[str, dict]] = {}
    for run in runs:
        for sample in run.samples:
            dataset = run.rows[0]["dataset"] if run.rows else ""
            answered.setdefault((dataset, sample["task"], sample["user"]), {}).setdefault(sample["method"], sample)
    sections = []
    for (dataset, task, user), methods in sorted(answered.items()):
        any_one = next(iter(methods.values()))
        history = "; ".join(any_one["history"])
        sections += [
            say("### {}: {}, user {}", dataset, task, user),
            say("Wanted: {}. Latest events, newest first: {}.", any_one["wanted"], history),
            table(
                ["method", "answer", "user tokens attended to (events ago, weight)"],
                [[name, sample["answer"], _attended(sample)] for name, sample in methods.items()],
            ),
        ]
    return [say("## Samples"), *sections] if sections else []


def _attended(sample: dict) -> str:
    return "; ".join(f"{title} ({ago}, {weight:.2f})" for title, ago, weight in sample["attended"])


def _audit_section(runs: list[Run]) -> list[Markdown]:
    audits: list[dict] = []
    for run in runs:
        if run.audit and run.audit not in audits:
            audits.append(run.audit)
    tables = [table(["number", "value"], [(name, _plain(value)) for name, value in audit.items()]) for audit in audits]
    return [say("## Data audit"), *tables] if tables else []


def _plain(value: Any) -> Any:
    """Return a number or a text as it is, and lists and objects as JSON."""
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def _training_section(runs: list[Run], pictures: dict[str, bytes]) -> list[Markdown]:
    curves = [(run.directory.name, run.metrics) for run in runs if run.metrics]
    if not curves:
        return []
    pictures["loss.png"] = plots.plot_losses(curves)
    sections = [say("## Training"), picture("loss.png", "training loss and validation")]
    if gates := plots.plot_gates(curves):
        pictures["gates.png"] = gates
        sections.append(picture("gates.png", "gates by layer"))
    if learned := plots.plot_learning(curves):
        pictures["learning.png"] = learned
        sections += [
            picture("learning.png", "recall@10 on validation by training targets seen"),
            say("A method with a pretrained encoder begins with the targets that its encoder saw."),
        ]
    return sections
