"""Bootstrap intervals of means, and of their differences on the same users (Efron and Tibshirani 1993).

What is drawn with replacement is users: a user measured several times, such as once by each seed, is drawn with all values.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

DRAWS = 10_000
LEVEL = 0.95


def resampled_means(
    values: Float[np.ndarray, "n m"], users: Int[np.ndarray, " n"] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, "draws m"]:
    """Return the means of m columns over users drawn with replacement, the same users for all columns.

    Args:
      users: whose value each is; each another's if not given.

    Raises:
      ValueError: no users.
    """
    if not len(values):
        raise ValueError("No users to resample.")
    _, whose = np.unique(np.arange(len(values)) if users is None else users, return_inverse=True)
    sizes = np.bincount(whose)
    sums = np.stack([np.bincount(whose, column) for column in values.T], axis=1)
    rng = np.random.default_rng(seed)
    means = np.empty((draws, values.shape[1]))
    for draw in range(draws):
        counts = np.bincount(rng.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        means[draw] = counts @ sums / (counts @ sizes)
    return means


def intervals(means: Float[np.ndarray, "draws m"], level: float = LEVEL) -> Float[np.ndarray, "m 2"]:
    """Return the percentile interval of each column."""
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def compare(
    values: Mapping[str, Float[np.ndarray, " n"]],
    reference: str,
    users: Int[np.ndarray, " n"] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, tuple[float, tuple[float, float], float, tuple[float, float]]]:
    """Return of each method (mean, its interval, mean difference to the reference, its interval), paired by value and user.

    Raises:
      ValueError: methods with different numbers of values.
    """
    sizes = {name: len(array) for name, array in values.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Methods are compared on the same users, not on {sizes}.")
    table = np.stack(list(values.values()), axis=1)
    means = resampled_means(table, users, draws=draws, seed=seed)
    base = list(values).index(reference)
    own, differences = intervals(means), intervals(means - means[:, base : base + 1])
    mean = table.mean(axis=0)
    return {
        name: (float(mean[i]), tuple(own[i].tolist()), float(mean[i] - mean[base]), tuple(differences[i].tolist()))
        for i, name in enumerate(values)
    }
