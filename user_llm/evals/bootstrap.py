"""Bootstrap intervals of means over users, and of their differences on the same users (Efron and Tibshirani 1993)."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

DRAWS = 10_000
LEVEL = 0.95


def resampled_means(values: Float[np.ndarray, "n m"], *, draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, "draws m"]:
    """Return the means of m columns over users drawn with replacement, the same users for all columns.

    Raises:
      ValueError: no users.
    """
    n = len(values)
    if not n:
        raise ValueError("No users to resample.")
    rng = np.random.default_rng(seed)
    means = np.empty((draws, values.shape[1]))
    for draw in range(draws):
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        means[draw] = counts @ values / n
    return means


def intervals(means: Float[np.ndarray, "draws m"], level: float = LEVEL) -> Float[np.ndarray, "m 2"]:
    """Return the percentile interval of each column."""
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def compare(
    values: Mapping[str, Float[np.ndarray, "n"]], reference: str, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, tuple[float, float], float, tuple[float, float]]]:
    """Return of each method (mean, its interval, mean difference to the reference, its interval), paired by user.

    Raises:
      ValueError: methods with different numbers of users.
    """
    sizes = {name: len(array) for name, array in values.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Methods are compared on the same users, not on {sizes}.")
    table = np.stack(list(values.values()), axis=1)
    means = resampled_means(table, draws=draws, seed=seed)
    base = list(values).index(reference)
    own, differences = intervals(means), intervals(means - means[:, base : base + 1])
    mean = table.mean(axis=0)
    return {
        name: (float(mean[i]), tuple(own[i].tolist()), float(mean[i] - mean[base]), tuple(differences[i].tolist()))
        for i, name in enumerate(values)
    }
