"""Plots of a report, each returned as PNG: methods with intervals, curves per phase, gates by layer, recall by bucket, costs. No display.

Labels come from data, and matplotlib would read `$` as mathematics and hide a leading `_`: `_label` shows them as they are.
Legends stand beside the axes, where they cover nothing.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from user_llm.common.printable import printable
from user_llm.report.markdown import text
from user_llm.report.standing import Standing

Curves = Sequence[tuple[str, dict[str, list[dict]]]]  # For each run its label and, by phase, its metrics.jsonl.
MAX_PANELS, MAX_CURVES = 12, 20  # beyond, nothing is told apart any more
LABEL_LIMIT = 40  # characters
LEARNING = {"targets_seen", "recall@10"}  # of an evaluation


def plot_standings(groups: dict[str, list[Standing]]) -> bytes:
    """Draw each method's value with its 95% interval, a panel per title; hollow where it was measured on other users."""
    panels = list(groups.items())[:MAX_PANELS]
    heights = [1.3 + 0.32 * min(len(standings), MAX_CURVES) for _, standings in panels]
    figure = Figure(figsize=(8.5, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, standings) in zip(grid, panels, strict=True):
        shown = standings[:MAX_CURVES]
        for place, one in enumerate(reversed(shown)):
            color = "C0" if one.is_reference else "0.35"
            if one.interval:
                axes.plot(one.interval, (place, place), color=color, linewidth=2)
            axes.plot(one.value, place, "o", color=color, markerfacecolor="white" if one.other_users else color)
            axes.annotate(
                text(one.value), (1.01, place), xycoords=("axes fraction", "data"), va="center", color=color, fontsize=9
            )
        axes.set_yticks(range(len(shown)), [_label(one.marked) for one in reversed(shown)])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.grid(axis="x", linewidth=0.4)
        axes.set_title(_label(title, 90), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def plot_losses(runs: Curves) -> bytes:
    """Draw the training loss of each phase; below, recall@10 (else loss) on validation."""
    phases = list(dict.fromkeys(phase for _, metrics in runs for phase in metrics))[:MAX_PANELS]
    figure = Figure(figsize=(4 * len(phases), 6), layout="constrained")
    grid = figure.subplots(2, len(phases), squeeze=False)
    for column, phase in enumerate(phases):
        chosen = [(label, metrics[phase]) for label, metrics in runs if phase in metrics][:MAX_CURVES]
        ranked = any("recall@10" in row for _, rows in chosen for row in rows)
        for label, rows in chosen:
            grid[0, column].plot(*_series(rows, "train", "loss"), label=_label(label))
            watched = _series(rows, "eval", "recall@10" if ranked else "loss")
            grid[1, column].plot(*watched, marker=".", label=_label(label))
        grid[0, column].set(title=f"{_label(phase)}: training loss", xlabel="step")
        grid[1, column].set(title=f"validation {'recall@10' if ranked else 'loss'}", xlabel="step")
        if len(chosen) > 1:
            _legend(grid[0, column])
    return _png(figure)


def plot_learning(runs: Curves) -> bytes | None:
    """Draw recall@10 on validation by training targets seen, a curve for each phase of each run; None where no phase has both."""
    found = {}
    for label, metrics in runs:
        for phase, rows in metrics.items():
            points = [
                (row["targets_seen"], row["recall@10"]) for row in rows if row["kind"] == "eval" and row.keys() >= LEARNING
            ]
            points = [(seen, recall) for seen, recall in points if seen is not None and recall is not None]
            if points:
                found[f"{phase} ({label})" if len(runs) > 1 else phase] = points
    if not found:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, points in list(found.items())[:MAX_CURVES]:
        axes.plot(*zip(*points, strict=True), marker=".", label=_label(label))
    axes.set(xlabel="training targets seen", ylabel="recall@10 on validation")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return _png(figure)


def plot_gates(runs: Curves) -> bytes | None:
    """Draw tanh(gate) by step, one colour per layer; return None where no phase has gates."""
    gated = {phase: _gate_names(rows) for _, metrics in runs for phase, rows in metrics.items() if _gate_names(rows)}
    if not gated:
        return None
    panels = list(gated.items())[:MAX_PANELS]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (phase, names) in zip(grid, panels, strict=True):
        for layer, name in enumerate(names[:MAX_CURVES]):
            for _, metrics in runs:
                axes.plot(*_series(metrics.get(phase, []), "train", name), color=f"C{layer}")
            axes.plot([], color=f"C{layer}", label=_label(f"layer {name.removeprefix('gate/')}"))
        axes.axhline(0, color="gray", linewidth=0.5)
        axes.set(title=f"{_label(phase)}: tanh(gate)", xlabel="step")
        _legend(axes)
    return _png(figure)


def plot_buckets(number: str, labels: list[str], methods: dict[str, list[dict | None]]) -> bytes:
    """Draw recall@10 by bucket of some number of the targets.

    A method's list has an entry for each label, None where there is no target.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(grid, ("recall@10", "recall@10/unseen"), strict=True):
        for method, parts in list(methods.items())[:MAX_CURVES]:
            values = [part[metric] if part else float("nan") for part in parts]
            axes.plot(range(len(labels)), values, marker="o", label=_label(method))
        axes.set(title=metric, xlabel=number)
        axes.set_xticks(range(len(labels)), labels)
    grid[0].set_ylim(bottom=0)  # Shared, and only now: set before the last curve it would stop the scaling.
    _legend(grid[1])
    return _png(figure)


def plot_costs(curves: dict[str, list[tuple[int, float]]]) -> bytes:
    """Draw FLOPs over events of the history, both as powers of ten, one colour per method and one style per way of serving."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(label.partition(",")[0] for label in curves))
    styles: dict[str, int] = {}
    for label, points in list(curves.items())[:MAX_CURVES]:
        method = label.partition(",")[0]
        style = ("-", "--", ":", "-.")[styles.get(method, 0) % 4]
        styles[method] = styles.get(method, 0) + 1
        color = f"C{methods.index(method)}"
        axes.plot(*zip(*sorted(points), strict=True), color=color, linestyle=style, marker="o", label=_label(label))
    axes.set(xscale="log", yscale="log", xlabel="events in the history", ylabel="FLOPs of a request")
    _legend(axes)
    return _png(figure)


def _label(value: str, limit: int = LABEL_LIMIT) -> str:
    shown = printable(value, limit).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def _gate_names(rows: list[dict]) -> list[str]:
    """Return the names of all gates in the order of their layers."""
    names = {name for row in rows for name in row if name.startswith("gate/")}
    return sorted(names, key=lambda name: (len(name), name))


def _series(rows: list[dict], kind: str, name: str) -> tuple[list[int], list[Any]]:
    points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a title in a script that the font lacks shows boxes
        figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
