"""What a request costs, from the JSON of `launch/benchmark_cost.py`, as a table and as curves over the history's length."""

import json
from typing import Any

from etils import epath

from user_llm.report import plots
from user_llm.report.markdown import table

HEADER = ("events", "method", "serving", "prompt tokens", "MFLOPs", "XLA/formula", "FLOPs ratio", "prefill ratio", "decode ratio",
          "state bytes")  # fmt: skip


def cost_table(rows: list[dict[str, Any]]) -> str:
    """Return a line per request; ratios say how many times more the full text prompt takes, read anew for the same user."""
    number = lambda value: "" if value is None else f"{value:,.1f}"  # noqa: E731
    lines = []
    for row in rows:
        against = "" if row["flops_hlo"] is None else f"{row['flops_hlo'] / row['flops_formula']:.3f}"
        ratios = [number(row[name]) for name in ("flops_ratio", "prefill_ratio", "decode_ratio")]
        facts = (row["events"], row["method"], row["serving"], row["prompt_tokens"], number(row["flops_formula"] / 1e6))
        lines.append([*facts, against, *ratios, f"{row['state_bytes']:,}"])
    return table(HEADER, lines)


def cost_section(path: epath.Path, out: epath.Path) -> list[str]:
    """Return the section, its plot written into `out`.

    Raises:
      ValueError: a file that is not what the benchmark writes.
    """
    try:
        found = json.loads(path.read_text())
        facts, rows = found["facts"], found["rows"]
        shown = cost_table(rows)
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            label = f"{row['method']}, {row['serving'].replace('_', ' ')}"
            curves.setdefault(label, []).append((row["events"], row["flops_formula"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what launch/benchmark_cost.py writes ({error}): run it again.") from error
    plots.plot_costs(out / "cost.png", curves)
    told = ", ".join(f"{name} `{value}`" for name, value in facts.items() if name != "command")
    return [
        "## What a request costs",
        told,
        f"```\n{facts['command']}\n```",
        "![FLOPs of a request by history length](cost.png)",
        shown,
    ]
