"""What a task of the LLM is: how it is asked, answered, measured and shown. Each task has one file here.

| task | answer | metrics |
|---|---|---|
| `next_item` | the item head ranks all items; with method `/generate`, beam search in a trie ranks titles | ranks |
| | with `/generate_guided` both together guide the search; with `/generate_reranked` the head ranks the titles that are found | |
| `favorite`, `favorite_future` | beam search in a trie of all classes' names finds the likeliest | accuracy |
| `review` | a text, of which each token is the likeliest one | ROUGE, chrF, BLEU, likelihood of the true text, nearness to the author |
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from user_llm.config.phases import ContextualEval
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset
from user_llm.data.prompts.base import Examples, Lines
from user_llm.evals.measured import Measured
from user_llm.tasks.asking import Asking

Numbers = Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Found:
    """The measured result of one way of answering a task.

    Attributes:
      measured: the metrics of each question.
      suffix: what is added to the method's name, such as `/generate`.
      together: metrics of all questions together that are no means, such as the BLEU of a corpus.
    """

    measured: Measured
    suffix: str = ""
    together: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _nothing(*_: Any) -> dict:
    return {}


def _same(asking: Asking, name: str, sizes: ContextualEval) -> ContextualEval:
    return sizes


@dataclasses.dataclass(frozen=True)
class PromptTask:
    """A task that an LLM with user tokens is trained on and measured by.

    In the functions below, `name` is what the config calls the task: its settings are the section `prompts.NAME`. `part` is a part of
    the split, `validation` or `test`. A question is named by a user and an end, an index into the user's events; its history is the events before the end.

    Attributes:
      settings: a dataclass of the task's settings, whose annotations say what each key may be (`config/values.py`). It has at least
        `weight` and `text`; see `config.phases.Prompts`.
      metrics: the names of the metrics; the phase monitors one of them if the task is its first.
      examples: (lines, dataset, settings, config) -> the questions about a dataset, with their prompts and targets. Their template
        is a `NextItem` or a `Question`, which a model directory can hold. Raises ValueError where the dataset lacks what the task takes.
      measure: (asking, name, part, limit, eval) -> what was measured on at most `limit` questions, None for all. `eval` is the
        phase's section of that name.
      show: (asking, name, users, ends) -> an answer for people to read to each question.
      check: (examples, eval) raises ValueError for what would end an evaluation.
      names: examples -> the possible answers by their numbers, where an answer is one of several names; else empty.
      baselines: (dataset, config) -> by method, what was measured without a model on the test part.
      settle: (asking, name, eval) -> the section with what is chosen on validation, once, before the test part is measured.
    """

    settings: type
    metrics: tuple[str, ...]
    examples: Callable[[Lines, Dataset, Any, Config], Examples]
    measure: Callable[[Asking, str, str, int | None, ContextualEval], list[Found]]
    show: Callable[[Asking, str, Numbers, Numbers], list[str]]
    check: Callable[[Any, ContextualEval], object] = _nothing
    names: Callable[[Any], Mapping[int, str]] = _nothing
    baselines: Callable[[Dataset, Config], Mapping[str, Measured]] = _nothing
    settle: Callable[[Asking, str, ContextualEval], ContextualEval] = _same
