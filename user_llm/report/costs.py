"""What a request costs, from the JSON of `launch/benchmark_cost.py`, as a table and as curves over the history's length."""

from typing import Any

from etils import epath

from user_llm.common.records import number_or_null, positive_number, read_json, text, whole_number
from user_llm.report import plots
from user_llm.report.markdown import Markdown, code, command, listed, picture, say, table

HEADER = ("events", "method", "serving", "prompt tokens", "MFLOPs", "XLA/formula", "FLOPs ratio", "prefill ratio", "decode ratio",
          "state bytes")  # fmt: skip


COST_ROW = {
    "method": text, "events": whole_number, "serving": text, "prompt_tokens": whole_number, "flops_formula": positive_number,
    "flops_hlo": number_or_null, "flops_ratio": number_or_null, "prefill_ratio": number_or_null, "decode_ratio": number_or_null,
    "state_bytes": whole_number,
}  # fmt: skip
COST = {"facts": {"command": text}, "rows": [COST_ROW]}


def cost_table(rows: list[dict[str, Any]]) -> Markdown:
    """Return a line per request; ratios say how many times more the full text prompt takes, read anew for the same user."""
    show = lambda value: "" if value is None else f"{value:,.1f}"  # noqa: E731
    lines = []
    for row in rows:
        against = "" if row["flops_hlo"] is None else f"{row['flops_hlo'] / row['flops_formula']:.3f}"
        ratios = [show(row[name]) for name in ("flops_ratio", "prefill_ratio", "decode_ratio")]
        facts = (row["events"], row["method"], row["serving"], row["prompt_tokens"], show(row["flops_formula"] / 1e6))
        lines.append([*facts, against, *ratios, f"{row['state_bytes']:,}"])
    return table(HEADER, lines)


def cost_section(path: epath.Path, pictures: dict[str, bytes]) -> list[Markdown]:
    """Return the section, and put its plot among the pictures.

    Raises:
      ValueError: a file that is not what the benchmark writes.
    """
    cost = read_json(path, COST, "it is not what launch/benchmark_cost.py writes; run that again")
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in cost["rows"]:
        label = f"{row['method']}, {row['serving'].replace('_', ' ')}"
        curves.setdefault(label, []).append((row["events"], row["flops_formula"]))
    pictures["cost.png"] = plots.plot_costs(curves)
    return [
        say("## What a request costs"),
        listed(say("{} {}", name, code(value)) for name, value in cost["facts"].items() if name != "command"),
        command(cost["facts"]["command"]),
        picture("cost.png", "FLOPs of a request by history length"),
        cost_table(cost["rows"]),
    ]
