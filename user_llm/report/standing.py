"""How methods stand by one metric, with 95% intervals, and what that comes to in one sentence."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from user_llm.config.values import best_of
from user_llm.evals.bootstrap import DRAWS, compare, intervals, resampled_means
from user_llm.evals.measured import Measured
from user_llm.report.markdown import Markdown, listed, say, table
from user_llm.report.runs import Seen

REFERENCES = ("user_llm", "user_llm_alone")  # the other methods are compared with the first of these that there is
COMPARED = ("recall@10", "accuracy", "rouge1")  # by the first of these that a task has
MARK = "†"  # beside a method that was not measured on all users of the reference

Interval = tuple[float, float]


class Standing(NamedTuple):
    """How one method stands.

    Attributes:
      value: the metric's mean over the targets that the reference has too; over all targets of the method if it shares none.
      interval: the 95% interval of `value`; None where a run left no values of single targets.
      difference: to the reference on the same targets, and its 95% interval; None for the reference and without such targets.
      n: the number of targets that `value` is of, of all `seeds` together.
      other_users: whether the reference was measured on other targets besides these, in these seeds or others, or instead of them.
    """

    method: str
    value: float
    interval: Interval | None
    difference: tuple[float, Interval] | None
    n: int
    seeds: Sequence[int]
    other_users: bool
    is_reference: bool

    @property
    def marked(self) -> str:
        """Return the method's name, marked if it was not measured on all users of the reference."""
        return mark(self.method, self.other_users)


def mark(method: str, other_users: bool) -> str:
    """Return a method's name, marked if it was not measured on all users of the reference."""
    return f"{method} {MARK}" if other_users else method


def first_metric(metrics: Sequence[str], wanted: str = "") -> str:
    """Return the metric by which methods are compared: the `wanted` one where it was measured."""
    return next(name for name in (wanted, *COMPARED, *metrics) if name in metrics)


def standings(
    metric: str,
    rows: Mapping[str, Mapping[int, Seen]],
    measured: Mapping[str, Mapping[int, Measured]],
    wanted: str = "",
) -> list[Standing]:
    """Return how each method stands, the best first.

    Args:
      rows: method -> seed -> the metric's value in results.json.
      measured: method -> seed -> the values of single targets, of methods that have them.
      wanted: the method that the others are compared with, where it was measured; else it is the first of `REFERENCES` that was.
    """
    known = {
        method: {seed: one for seed, one in sorted(measured.get(method, {}).items()) if metric in one.values} for method in rows
    }
    full = [method for method, seeds in known.items() if seeds]
    reference = next((method for method in (wanted, *REFERENCES, *full, *rows) if method in (full or rows)), REFERENCES[0])
    out = [_standing(metric, method, reference, rows, known) for method in rows]
    return sorted(out, key=lambda one: one.value if best_of(metric) == "min" else -one.value)


def _standing(metric: str, method: str, reference: str, rows, known: dict[str, dict[int, Measured]]) -> Standing:
    seeds, base = known[method], known[reference]
    is_reference = method == reference
    shared = {seed: _shared(one, base[seed]) for seed, one in seeds.items() if seed in base}
    if shared := {seed: places for seed, places in shared.items() if len(places[0])}:
        values = {
            reference: np.concatenate([base[seed].values[metric][theirs] for seed, (_, theirs) in shared.items()]),
            method: np.concatenate([seeds[seed].values[metric][own] for seed, (own, _) in shared.items()]),
        }
        users = np.concatenate([base[seed].users[theirs] for seed, (_, theirs) in shared.items()])
        mean, own, difference, apart = compare(values, reference, users)[method]
        others = len(users) < sum(map(len, base.values()))
        return Standing(
            method, mean, own, None if is_reference else (difference, apart), len(users), list(shared), others, is_reference
        )
    if seeds:
        values_of_all = np.concatenate([one.values[metric] for one in seeds.values()])
        users = np.concatenate([one.users for one in seeds.values()])
        own = tuple(intervals(resampled_means(values_of_all[:, None], users))[0].tolist())
        return Standing(method, float(values_of_all.mean()), own, None, len(users), list(seeds), True, is_reference)
    cells = rows[method]
    n = sum(cell.n for cell in cells.values())
    others = {cell.n for cell in cells.values()} != {cell.n for cell in rows[reference].values()}
    return Standing(
        method, statistics.fmean(cell.value for cell in cells.values()), None, None, n, sorted(cells), others, is_reference
    )


def _shared(one: Measured, other: Measured) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the places in each of the targets that both have, in the same order.

    Where both have a target several times, the first of one belongs to the first of the other, the second to the second, and so on.
    """
    if np.array_equal(one.users, other.users) and np.array_equal(one.positions, other.positions):
        return np.arange(len(one)), np.arange(len(one))
    places = [_places(one), _places(other)]
    both = [target for target in places[1] if target in places[0]]
    mine, theirs = ([place[target] for target in both] for place in places)
    return np.array(mine, np.int64), np.array(theirs, np.int64)


def _places(measured: Measured) -> dict[tuple[int, int, int], int]:
    """Return the place of each target, by its user, its position and how often it has occurred before."""
    seen: Counter[tuple[int, int]] = Counter()
    out = {}
    for place, target in enumerate(zip(measured.users.tolist(), measured.positions.tolist(), strict=True)):
        out[*target, seen[target]] = place
        seen[target] += 1
    return out


def answer(dataset: str, task: str, metric: str, methods: list[Standing]) -> Markdown:
    """Return in a sentence or two which method is best of those measured on the same users, and by how much."""
    lasting = [one for one in methods if not one.other_users]
    best, *rest = lasting
    goal = "lowest" if best_of(metric) == "min" else "highest"
    value = say("{} (95% interval {})", best.value, interval(best.interval)) if best.interval else say("{}", best.value)
    if not rest:
        return say("On {} ({}), {} has {} {}.", dataset, task, best.method, metric, value)
    head = say("On {} ({}), {} has the {} {} of {} methods: {}", dataset, task, best.method, goal, metric, len(lasting), value)
    other = rest[0] if best.is_reference else next(one for one in lasting if one.is_reference)
    tail = say("; the next, {}, has {}" if best.is_reference else "; {} has {}", other.method, other.value)
    against = other.difference if best.is_reference else best.difference  # to the reference, which is one of the two
    if against is None:
        return say("{}{}.", head, tail)
    sign = -1 if best.is_reference else 1
    low, high = sorted(sign * bound + 0.0 for bound in against[1])  # no -0
    chance = Markdown(", which chance may explain" if low <= 0 <= high else "")
    return say("{}{}. The difference is {} ({}){}.", head, tail, sign * against[0] + 0.0, interval((low, high)), chance)


def comparison(metric: str, methods: list[Standing]) -> list[Markdown]:
    """Return the table of each method's interval and of its difference to the reference; nothing for one method alone.

    Methods that were not measured on all users of the reference stand last, since their values are not comparable with those above.
    """
    shown = sorted((one for one in methods if one.is_reference or one.difference), key=lambda one: one.other_users)
    if len(shown) < 2:
        return []
    others = [one.method for one in methods if one.interval and one not in shown]
    reference = next(one.method for one in shown if one.is_reference)
    rows = []
    for one in shown:
        against = ["", ""] if one.difference is None else [Markdown(f"{one.difference[0]:+.4f}"), interval(one.difference[1])]
        rows.append([one.marked, one.value, interval(one.interval), *against, one.n, listed(one.seeds)])
    notes = [say("With 95% intervals by paired bootstrap over users ({} draws).", f"{DRAWS:,}")]
    if any(one.other_users for one in shown):
        notes.append(
            say("{} Not measured on all targets of {}: value and difference are of those that both have.", MARK, reference)
        )
    if others:
        notes.append(say("Measured on other users and left out: {}.", listed(others)))
    return [
        Markdown(" ".join(notes)),
        table(["method", metric, "95%", say("against {}", reference), "95%", "n", "seeds"], rows),
    ]


def interval(bounds: Interval | None) -> Markdown:
    """Return an interval as text; nothing for None."""
    return Markdown(f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "")
