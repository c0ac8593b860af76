"""Whether the user is used: what each method loses when it is given another user's history, or none.

A run leaves these values in the folder `controls` of a phase (`tasks/controls.py`), those of a user's own history among them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from user_llm.evals.bootstrap import intervals, resampled_means
from user_llm.evals.measured import NO_USER, RANDOM_USER, Measured
from user_llm.report.markdown import Markdown, listed, say, table
from user_llm.report.runs import Group, Measurements
from user_llm.report.standing import interval

JUDGED = ("recall@10", "accuracy", "log_likelihood", "rouge1")  # by the first of these that a method has
SHOWN = (*JUDGED, "nearer_to_author")


class Lost(NamedTuple):
    """What a method loses by a control: the metric's value with it, how much is lost, and the 95% interval of the loss."""

    value: float
    loss: float
    span: tuple[float, float]


class Controlled(NamedTuple):
    """One metric of one method, pooled over seeds, with the user's own history and what is lost with each control."""

    group: Group
    method: str
    metric: str
    value: float
    lost: dict[str, Lost]
    n: int
    seeds: list[int]


def control_sections(found: Measurements) -> list[Markdown]:
    """Return a sentence for each method that was measured with another user's history, and a table."""
    sentences, rows = [], []
    for group, methods in found.items():
        for method, seeds in methods.items():
            used = {one.metric: one for one in _used(group, method, seeds)}
            judged = next((used[name] for name in (*JUDGED, *used) if name in used and RANDOM_USER in used[name].lost), None)
            sentences += [_sentence(judged)] if judged else []
            rows += [_row(one) for name, one in used.items() if name in SHOWN or one is judged]
    if not sentences:
        return []
    header = ["dataset", "task", "method", "metric", "own history", "another user's", "lost", "95%", "none", "lost", "95%"]
    return [
        say("## Is the user used?"),
        say(
            "Each method was asked the same questions again with the history of another user, drawn at random, and with none. "
            "What it loses has a 95% interval by paired bootstrap over users."
        ),
        Markdown("  \n".join(sentences)),
        table([*header, "n", "seeds"], rows),
    ]


def _used(group: Group, method: str, seeds: Mapping[int, Measured]) -> list[Controlled]:
    """Return each metric that all seeds measured with the own history and with a control."""
    names = [name for name in next(iter(seeds.values())).values if all(name in one.values for one in seeds.values())]
    columns = np.stack([np.concatenate([one.values[name] for one in seeds.values()]) for name in names], axis=1)
    means = resampled_means(columns, np.concatenate([one.users for one in seeds.values()]))
    place, values = {name: column for column, name in enumerate(names)}, columns.mean(axis=0)

    def lost(metric: str, control: str) -> Lost:
        own, other = place[metric], place[f"{metric}/{control}"]
        [(low, high)] = intervals(means[:, [own]] - means[:, [other]])
        return Lost(float(values[other]), float(values[own] - values[other]), (float(low), float(high)))

    out = []
    for metric in names:
        found = {control: lost(metric, control) for control in (RANDOM_USER, NO_USER) if f"{metric}/{control}" in place}
        if found:
            out.append(Controlled(group, method, metric, float(values[place[metric]]), found, len(columns), sorted(seeds)))
    return out


def _sentence(used: Controlled) -> Markdown:
    """Return what a random user costs a method, and the verdict: it is personalised if the interval lies above zero."""
    value, loss, (low, high) = used.lost[RANDOM_USER]
    dataset, task, _ = used.group
    facts = say(
        "on {} ({}), {} has {} {} with a user's own history and {} with another user's",
        dataset, task, used.method, used.metric, used.value, value,
    )  # fmt: skip
    if NO_USER in used.lost:
        facts = say("{}, {} with none", facts, used.lost[NO_USER].value)
    span = say("{} ({})", loss, interval((low, high)))
    if low > 0:
        return say("**Personalised**: {}. With the other history it loses {}.", facts, span)
    if high < 0:
        return say("**Not personalised**: {}. With the other history it loses nothing: {}.", facts, span)
    return say("**Not personalised**: {}. Chance may explain what it loses with the other history, {}.", facts, span)


def _row(used: Controlled) -> list:
    cells: list = []
    for control in (RANDOM_USER, NO_USER):
        one = used.lost.get(control)
        cells += [one.value, one.loss, interval(one.span)] if one else ["", "", ""]
    return [used.group[0], used.group[1], used.method, used.metric, used.value, *cells, used.n, listed(used.seeds)]
