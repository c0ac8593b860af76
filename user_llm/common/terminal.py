"""What a run shows on a terminal: lines of its own, and at its end a table of results."""

import logging as standard_logging
import os
from pathlib import Path

from absl import flags, logging
from etils import epath

from user_llm.common.printable import printable

PACKAGE = Path(__file__).parents[1]
SHOWN = 5  # metrics of a table


def set_up_log() -> None:
    """Show what is ours: a time and a sentence for each line. `--verbosity=1` shows what libraries say too, and where each line is from.

    Nothing is hidden that ends a run: errors of libraries, and tracebacks, are shown always.
    """
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.INFO)
    standard_logging.captureWarnings(True)  # so that warnings of libraries are lines of a log, too
    if logging.get_verbosity() > logging.INFO:
        return
    # This library says while it is imported that it misses PyTorch, through a handler of its own.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.get_absl_handler()
    handler.addFilter(is_ours)
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


def is_ours(record: standard_logging.LogRecord) -> bool:
    """Return whether a line of the log is this package's, or an error."""
    return record.levelno >= standard_logging.ERROR or Path(record.pathname).is_relative_to(PACKAGE)


def show_results(rows: list[dict], report: epath.Path) -> None:
    """Print the methods of each dataset and task by the first metrics, and where the report is."""
    for dataset, task in dict.fromkeys((row["dataset"], row["task"]) for row in rows):
        chosen = [row for row in rows if (row["dataset"], row["task"]) == (dataset, task) and "/" not in row["metric"]]
        metrics = list(dict.fromkeys(row["metric"] for row in chosen))[:SHOWN]
        values = {(row["method"], row["metric"]): f"{row['value']:.4f}" for row in chosen}
        lines = [[printable(f"{dataset}: {task}"), *map(printable, metrics), "n"]]
        for method in dict.fromkeys(row["method"] for row in chosen):
            targets = max(row["n"] for row in chosen if row["method"] == method)
            lines.append([printable(method), *(values.get((method, metric), "") for metric in metrics), f"{targets:,}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for first, *rest in lines:
            cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
            print("  ".join([first.ljust(widths[0]), *cells]))
    print(f"\nReport: {printable(report)}", flush=True)
