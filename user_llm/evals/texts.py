"""How a written text compares with a given one, and with what its author and somebody else wrote.

ROUGE (Lin 2004) is by the package rouge_score with its stemmer, as the paper's field reports it. BLEU (Papineni et al. 2002) and
chrF (Popovic 2015) are by the package sacrebleu. METEOR (Banerjee and Lavie 2005) is by nltk where its WordNet is installed.
BERTScore (Zhang et al. 2020) is by the package bert_score.
"""

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

ROUGES = ("rouge1", "rouge2", "rougeLsum")
SENTENCES = ("chrf", "bleu")
GRAMS = (3, 4, 5)  # characters
NO_POSITIONS = 2**20  # tokens of a text where a model limits none


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return the F-measures of each pair, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, for nltk and scipy, that most runs need not spend

    scorer = RougeScorer(list(ROUGES), use_stemmer=True)
    found = [scorer.score(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    return {name: np.array([scores[name].fmeasure for scores in found]) for name in ROUGES}


def sentence_scores(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return chrF and BLEU of each pair, from 0 to 1; BLEU of one sentence is smoothed, and counts n-grams up to the sentence's length.

    The mean of `bleu` is not the BLEU of publications: that is `corpus_scores`.
    """
    scorers = _scorers()
    pairs = list(zip(targets, predictions, strict=True))
    return {
        name: np.array([scorer.sentence_score(prediction, [target]).score / 100 for target, prediction in pairs])
        for name, scorer in scorers.items()
    }


def corpus_scores(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return `chrf/corpus` and `bleu/corpus`, from 0 to 1: of all pairs together, with the settings that sacrebleu has by default."""
    scorers = _scorers(effective_order=False)
    return {f"{name}/corpus": scorer.corpus_score(predictions, [targets]).score / 100 for name, scorer in scorers.items()}


def _scorers(effective_order: bool = True) -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return dict(zip(SENTENCES, (CHRF(), BLEU(effective_order=effective_order)), strict=True))


def meteor(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return METEOR of each pair, from 0 to 1; an empty dict where WordNet is not installed."""
    score = _meteor()
    if score is None:
        return {}
    return {"meteor": np.array([score([_words(t)], _words(p)) for t, p in zip(targets, predictions, strict=True)])}


@functools.cache  # which says it once
def _meteor() -> Callable[..., float] | None:
    try:
        from nltk.translate.meteor_score import meteor_score

        meteor_score([["a"]], ["b"])  # WordNet is read only where words differ
    except (LookupError, OSError):
        logging.info("METEOR is left out: WordNet is not installed (python -m nltk.downloader wordnet).")
        return None
    return meteor_score


def bert_score(targets: Sequence[str], predictions: Sequence[str], model: str) -> dict[str, Float[np.ndarray, " n"]]:
    """Return BERTScore's F-measure of each pair, mostly from 0 to 1, without importance weights and not rescaled by a baseline.

    Vectors are those of the layer that bert_score names for a published model, and of the last layer of any other. An empty text has 0.
    A text that has more tokens than the model has positions is cut.

    Args:
      model: the name or directory of a model that `transformers` loads.

    Raises:
      ValueError: the package is not installed, or the model's config cannot be loaded.
      OSError: the model's weights or its tokenizer cannot be loaded.
    """
    values = np.zeros(len(targets))
    filled = [row for row, pair in enumerate(zip(targets, predictions, strict=True)) if all(text.strip() for text in pair)]
    if filled:
        scorer = _bert_scorer(model)
        values[filled] = scorer.score([predictions[row] for row in filled], [targets[row] for row in filled])[2].numpy()
    return {"bert_score": values}


@functools.lru_cache(maxsize=1)  # A model takes seconds to load.
def _bert_scorer(model: str) -> Any:
    check_bert_score(model)
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    scorer = BERTScorer(model_type=model, num_layers=model2layers.get(model) or config.num_hidden_layers, device="cpu")
    # A tokenizer whose files name no limit has one of 1e30, which overflows. Models like RoBERTa keep two positions back. Models with
    # relative positions alone have none, or -1.
    positions = getattr(config, "max_position_embeddings", -1)
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions - 2 if positions > 0 else NO_POSITIONS)
    return scorer


def check_bert_score(model: str) -> None:
    """See that the package bert_score is installed and that the config of a model can be loaded.

    Raises:
      ValueError: it is not, or it cannot.
    """
    if importlib.util.find_spec("bert_score") is None:
        raise ValueError("eval.bert_score needs the package bert-score, which is not installed: pip install bert-score.")
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"eval.bert_score: no config of {model!r} can be loaded: name a directory, or a model of the Hub that this host reaches."
        ) from error


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def gram_counts(texts: Sequence[str]) -> Counter[str]:
    """Return how often texts hold each sequence of 3 to 5 characters, in lower case and with white space as one blank."""
    counts: Counter[str] = Counter()
    for text in texts:
        plain = " ".join(text.lower().split())
        counts.update(plain[start : start + size] for size in GRAMS for start in range(len(plain) - size + 1))
    return counts


def cosine(one: Counter[str], other: Counter[str]) -> float:
    """Return the cosine of the angle between two counts, from 0 to 1; 0 if one of them is empty."""
    few, many = sorted((one, other), key=len)
    product = sum(count * many[gram] for gram, count in few.items() if gram in many)
    norms = [sum(count * count for count in counts.values()) for counts in (one, other)]
    return product / (norms[0] * norms[1]) ** 0.5 if product else 0.0


def nearer_to_author(
    written: Sequence[str], authors: Sequence[Sequence[str]], others: Sequence[Sequence[str]]
) -> Float[np.ndarray, " n"]:
    """Return 1 for each text that is nearer to its author's texts than to somebody else's, 0 if it is farther, else 0.5.

    Near is a high cosine of the counts of 3 to 5 characters. A text that knows nothing of its author is nearer in half of the cases,
    where authors and others are drawn alike. Where one of the two wrote nothing, there is nothing to compare, which is 0.5.

    Args:
      authors: what the author of each text wrote.
      others: what somebody else wrote.
    """
    found = np.empty(len(written))
    for index, (text, author, other) in enumerate(zip(written, authors, others, strict=True)):
        own, of_author, of_other = (gram_counts(texts) for texts in ([text], author, other))
        nearer = np.sign(cosine(own, of_author) - cosine(own, of_other)) if of_author and of_other else 0
        found[index] = (1 + nearer) / 2
    return found
