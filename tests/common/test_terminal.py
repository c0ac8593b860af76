"""What a run shows on a terminal."""

import logging
from pathlib import Path

from etils import epath

from user_llm.common import terminal

ROOT = Path(__file__).parents[2]


def test_the_terminal_shows_what_is_ours_and_errors_of_all():
    line = lambda path, level: logging.LogRecord("absl", level, str(path), 1, "x", (), None)  # noqa: E731
    ours, theirs = ROOT / "user_llm" / "training" / "loop.py", "/site-packages/jax/_src/xla_bridge.py"
    assert terminal.is_ours(line(ours, logging.INFO)) and terminal.is_ours(line(theirs, logging.ERROR))
    assert not terminal.is_ours(line(theirs, logging.INFO)) and not terminal.is_ours(line(theirs, logging.WARNING))


def test_a_run_ends_with_its_results_as_text(capsys):
    row = {"dataset": "toy\x1b[2J", "task": "next_item", "method": "user_llm", "metric": "recall@10", "value": 0.25, "n": 1500}
    terminal.show_results([row, row | {"metric": "recall@10/unseen", "value": 0.5}], epath.Path("runs/x/report.html"))
    assert capsys.readouterr().out == (
        "\ntoy: next_item  recall@10      n\nuser_llm           0.2500  1,500\n\nReport: runs/x/report.html\n"
    )
