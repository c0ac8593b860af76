"""What a report says of controls: what is lost, by hand, and when a method is called personalised."""

import json

import numpy as np
import pytest
from etils import epath

from user_llm.evals.measured import Measured
from user_llm.report import plots
from user_llm.report.build import write_report
from user_llm.report.controls import control_sections

GROUP = ("toy", "next_item", "leave_last_out")


def measured(own, other, none=None, metric="recall@10"):
    values = {metric: own, f"{metric}/random_user": other} | ({} if none is None else {f"{metric}/no_user": none})
    return Measured(
        np.arange(len(own)), np.arange(len(own)), {name: np.asarray(array, float) for name, array in values.items()}
    )


def sentence(one: Measured) -> str:
    return control_sections({GROUP: {"user_llm": {0: one}}})[2]


HITS = np.repeat([1.0, 0.0], 20)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            np.zeros(40),
            "**Personalised**: on toy (next_item), user_llm has recall@10 0.5000 with a user's own history and 0.0000",
        ),
        (HITS, "**Not personalised**: on toy"),
        (np.roll(HITS, 1), "Chance may explain what it loses with the other history, 0.0000"),
        (np.ones(40), "With the other history it loses nothing: -0.5000 (-0."),
    ],
)
def test_a_method_is_personalised_where_another_history_loses_beyond_chance(other, says):
    assert says in sentence(measured(HITS, other))


def test_the_loss_is_paired_by_user():
    """A tenth of a metric is lost by every user: however much users differ, the interval is that tenth alone."""
    values = np.linspace(0, 100, 30)
    assert "it loses 0.1000 (0.1000 to 0.1000)" in sentence(measured(values, values - 0.1, metric="mine"))


def test_seeds_are_taken_together_and_users_are_drawn_with_all_of_theirs():
    seeds = {1: measured(HITS, np.zeros(40), HITS), 0: measured(np.ones(40), np.zeros(40), HITS)}
    sections = control_sections({GROUP: {"user_llm": seeds}})
    assert "recall@10 0.7500 with a user's own history and 0.0000 with another user's, 0.5000 with none" in sections[2]
    [row] = sections[3].splitlines()[2:]
    assert row.startswith("| toy | next_item | user_llm | recall@10 | 0.7500 | 0.0000 | 0.7500 | 0.") and row.endswith(
        "| 80 | 0, 1 |"
    )


def test_reviews_are_judged_by_their_likelihood():
    both = measured(HITS, HITS, metric="rouge1")
    both.values.update(measured(HITS - 3, HITS - 4, metric="log_likelihood").values)
    assert "has log_likelihood -2.5000 with a user's own history and -3.5000" in sentence(both)
    rows = control_sections({GROUP: {"user_llm": {0: both}}})[3].splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == ["rouge1", "log_likelihood"]


def test_a_run_with_controls_says_so_and_one_without_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: b"")
    facts = {"dataset": "toy", "task": "next_item", "method": "user_llm", "split": "leave_last_out", "seed": 0, "n": 40}
    rows = [{**facts, "metric": "recall@10", "value": 0.5, "config_hash": "a"}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert "Is the user used?" not in write_report(tmp_path).read_text()
    measured(HITS, np.zeros(40)).save(epath.Path(tmp_path) / "user_llm" / "controls", "next_item", "user_llm")
    assert "## Is the user used?\n" in write_report(tmp_path).read_text()
