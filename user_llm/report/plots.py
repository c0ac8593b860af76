"""Plots of a report: curves per phase, gates by layer, recall by history length. No display."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

Curves = Sequence[tuple[str, dict[str, list[dict]]]]  # For each run its label and, by phase, its metrics.jsonl.


def plot_losses(path: epath.Path, runs: Curves) -> None:
    """Draw the training loss of each phase; below, recall@10 (else loss) on validation."""
    phases = list(dict.fromkeys(phase for _, metrics in runs for phase in metrics))
    figure = Figure(figsize=(4 * len(phases), 6), layout="constrained")
    grid = figure.subplots(2, len(phases), squeeze=False)
    for column, phase in enumerate(phases):
        chosen = [(label, metrics[phase]) for label, metrics in runs if phase in metrics]
        ranked = any("recall@10" in row for _, rows in chosen for row in rows)
        for label, rows in chosen:
            grid[0, column].plot(*_series(rows, "train", "loss"), label=label)
            watched = _series(rows, "eval", "recall@10" if ranked else "loss")
            grid[1, column].plot(*watched, marker=".", label=label)
        grid[0, column].set(title=f"{phase}: training loss", xlabel="step")
        grid[1, column].set(title=f"validation {'recall@10' if ranked else 'loss'}", xlabel="step")
        if len(chosen) > 1:
            grid[0, column].legend()
    _save(figure, path)


def plot_gates(path: epath.Path, runs: Curves) -> bool:
    """Draw tanh(gate) by step, one colour per layer; return False where no phase has gates."""
    gated = {phase: _gate_names(rows) for _, metrics in runs for phase, rows in metrics.items() if _gate_names(rows)}
    if not gated:
        return False
    figure = Figure(figsize=(5 * len(gated), 4), layout="constrained")
    grid = figure.subplots(1, len(gated), squeeze=False)[0]
    for axes, (phase, names) in zip(grid, gated.items(), strict=True):
        for layer, name in enumerate(names):
            for _, metrics in runs:
                axes.plot(*_series(metrics.get(phase, []), "train", name), color=f"C{layer}")
            axes.plot([], color=f"C{layer}", label=f"layer {name.removeprefix('gate/')}")
        axes.axhline(0, color="gray", linewidth=0.5)
        axes.set(title=f"{phase}: tanh(gate)", xlabel="step")
        axes.legend()
    _save(figure, path)
    return True


def plot_buckets(path: epath.Path, number: str, labels: list[str], methods: dict[str, list[dict | None]]) -> None:
    """Draw recall@10 by bucket of some number of the targets.

    A method's list has an entry for each label, None where there is no target.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(grid, ("recall@10", "recall@10/unseen"), strict=True):
        for method, parts in methods.items():
            values = [part[metric] if part else float("nan") for part in parts]
            axes.plot(range(len(labels)), values, marker="o", label=method)
        axes.set(title=metric, xlabel=number)
        axes.set_xticks(range(len(labels)), labels)
    grid[0].set_ylim(bottom=0)  # Shared, and only now: set before the last curve it would stop the scaling.
    grid[0].legend()
    _save(figure, path)


def plot_costs(path: epath.Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Draw FLOPs over events of the history, both as powers of ten, one colour per method and one style per way of serving."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(label.partition(",")[0] for label in curves))
    styles: dict[str, int] = {}
    for label, points in curves.items():
        method = label.partition(",")[0]
        style = ("-", "--", ":", "-.")[styles.get(method, 0) % 4]
        styles[method] = styles.get(method, 0) + 1
        color = f"C{methods.index(method)}"
        axes.plot(*zip(*sorted(points), strict=True), color=color, linestyle=style, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="events in the history", ylabel="FLOPs of a request")
    figure.legend(loc="outside right upper")
    _save(figure, path)


def _gate_names(rows: list[dict]) -> list[str]:
    """Return the names of all gates in the order of their layers."""
    names = {name for row in rows for name in row if name.startswith("gate/")}
    return sorted(names, key=lambda name: (len(name), name))


def _series(rows: list[dict], kind: str, name: str) -> tuple[list[int], list[Any]]:
    points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _save(figure: Figure, path: epath.Path) -> None:
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=100)
