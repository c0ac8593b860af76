"""Controls: the same questions asked again with another user's history, and with none. The metrics fall by as much as the history was worth.

A model that answers as well with another user's history is not personalised, however well it answers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from user_llm.config.phases import ContextualEval
from user_llm.data.prompts.base import Whose
from user_llm.evals.measured import NO_USER, RANDOM_USER, Measured
from user_llm.tasks.asking import Asking, random_users
from user_llm.tasks.task import Found, PromptTask


def no_user(users: Int[np.ndarray, " n"]) -> dict[int, Whose]:
    """Return an empty history for each user: the events before their first one."""
    return {user: (user, 0) for user in np.unique(users).tolist()}


def measure_controls(
    task: PromptTask, asking: Asking, name: str, own: Sequence[Found], sizes: ContextualEval, seed: int
) -> list[Found]:
    """Measure a task's first test questions again with another user's history and with none.

    Metrics of `own` with a slash in their name, such as `recall@10/unseen`, are left out. What filters by the history, such as the
    items of a ranking, filters by the user's own history in all cases.

    Args:
      own: what was measured with everybody's own history.
      sizes: `control_users` of them say how many questions are asked, 0 for none.

    Returns:
      For each of `own` its metrics on these questions, and each metric again as `METRIC/random_user` and `METRIC/no_user`.
    """
    users, ends = (array[: sizes.control_users] for array in asking.examples[name].targets("test"))
    count = len(users)
    few = dataclasses.replace(
        sizes, generate_users=min(sizes.generate_users, count), review_users=min(sizes.review_users, max(count, 1))
    )
    # No seed of a run draws what `review.measure` compares with, or a text would be compared with the very user whom it was given.
    histories = {RANDOM_USER: random_users(users, ends, (seed, 1)), NO_USER: no_user(users)}
    values: dict[str, dict[str, np.ndarray]] = {one.suffix: {} for one in own}
    for control, whose in histories.items():
        if whose:
            asked = dataclasses.replace(asking, whose=whose)
            for one in task.measure(asked, name, "test", count, few):
                values[one.suffix] |= {f"{metric}/{control}": again for metric, again in _plain(one.measured).items()}
    found = []
    for one in own:
        if controlled := values[one.suffix]:
            same = one.measured.first(len(next(iter(controlled.values()))))
            found.append(Found(dataclasses.replace(same, values=_plain(same) | controlled), one.suffix))
    return found


def _plain(measured: Measured) -> dict[str, np.ndarray]:
    return {metric: array for metric, array in measured.values.items() if "/" not in metric}
