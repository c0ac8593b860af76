"""Baselines of the favourite class: counting the history, and the class that most users favour."""

import numpy as np

from user_llm.data.prompts.favorite import OfHistory
from user_llm.evals.measured import Measured


def favorite_baselines(asked: OfHistory, part: str = "test") -> dict[str, Measured]:
    """Return of each method its accuracy, 1 for each target whose class it names.

    `counting` names the favourite of the history, which of the task `favorite` is the label itself. `majority` names the class
    that is the favourite of most users' training events.

    Raises:
      ValueError: nobody has a label.
    """
    users, ends = asked.targets(part)
    if not len(users):
        raise ValueError(f"No user of the {part} part has a favourite: raise data.withhold, or ask no favourites.")
    pairs = list(zip(users.tolist(), ends.tolist(), strict=True))
    expected = np.array([asked.label(user, end) for user, end in pairs])
    counted = np.array([asked.labels.favorite(user, 0, end) for user, end in pairs])
    trained = [asked.labels.favorite(user, 0, int(stop)) for user, stop in enumerate(asked.split.train_stop)]
    most = np.bincount([label for label in trained if label]).argmax()
    correct = {"counting": counted == expected, "majority": expected == most}
    return {method: Measured(users, ends, {"accuracy": named.astype(np.float64)}) for method, named in correct.items()}
