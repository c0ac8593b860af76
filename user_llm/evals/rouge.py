"""ROUGE of written texts (Lin 2004) by the package rouge_score, with its stemmer, as the paper's field reports it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

ROUGES = ("rouge1", "rouge2", "rougeLsum")


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return the F-measures of each pair, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, for nltk and scipy, that most runs need not spend

    scorer = RougeScorer(list(ROUGES), use_stemmer=True)
    found = [scorer.score(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    return {name: np.array([scores[name].fmeasure for scores in found]) for name in ROUGES}
