"""The kinds of values that keys take: their types, ranges and choices, as annotations of the records' fields.

A `Literal` is a choice, `Annotated[int, Must(...)]` a type with a range.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Must:
    """What holds of a value besides its type; `words` complete the sentence "it must be ..."."""

    words: str
    holds: Callable[[Any], bool]


def is_regex(text: str) -> bool:
    """Return whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


Count = Annotated[int, Must("1 or more", lambda n: n >= 1)]
CountOrZero = Annotated[int, Must("0 or more", lambda n: n >= 0)]
Axis = Annotated[int, Must("1 or more, or -1 for what the other axes leave", lambda n: n >= 1 or n == -1)]
Positive = Annotated[float, Must("above 0", lambda x: x > 0)]
Weight = Annotated[float, Must("0 or more", lambda x: x >= 0)]
Share = Annotated[float, Must("from 0 to below 1", lambda x: 0 <= x < 1)]
Probability = Annotated[float, Must("from 0 to 1", lambda x: 0 <= x <= 1)]
Text = Annotated[str, Must("a text that is not empty", bool)]
Regex = Annotated[str, Must("a regular expression", is_regex)]
Names = tuple[Text, ...]
Sides = Annotated[tuple[Count, ...], Must("a number of inputs and one of outputs, or empty", lambda pair: len(pair) in (0, 2))]

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
Injection = Literal["cross_attention", "soft_prompt", "both"]
Kernel = Literal["auto", "reference", "splash", "cudnn"]
Layout = Literal["movielens", "amazon", "google_local", "events"]
Moment = Literal["float32", "bfloat16"]
Objective = Literal["autoregressive", "masked", "dual"]
Quantization = Literal["", "int8", "int4", "nf4"]
Remat = Literal["none", "dots", "full"]
Seat = Literal["after_attention", "before_block"]

SOURCES = ("movielens", "amazon", "google_local", "events", "synthetic")  # of data.source
ENCODERS = ("transformer",)  # of encoder.kind
# Which of two values of a metric is the better one. Metrics of a caller's own tasks are in neither list.
LOWER_IS_BETTER = ("loss", "perplexity")
HIGHER_IS_BETTER = ("recall", "ndcg", "mrr", "accuracy", "log_likelihood", "rouge1", "rouge2", "rougeLsum", "chrf", "bleu")


def best_of(metric: str) -> str:
    """Return `min` or `max`, whichever value of a metric is the best; empty where nobody knows. `recall@10/unseen` is a recall."""
    name = re.split("[@/]", metric)[0]
    return "min" if name in LOWER_IS_BETTER else "max" if name in HIGHER_IS_BETTER else ""


# `Annotated[dict, CHANGES, Encoder]` is a part of the section Encoder: the keys that a phase changes.
CHANGES = "changes"
