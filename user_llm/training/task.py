"""What the loop needs to know of a task: a frozen record of functions, no base class."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from user_llm.common.trees import Params, Rules
from user_llm.data.streams import Streams
from user_llm.models.generate import Program
from user_llm.nn.losses import Whole

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One phase of a run.

    Attributes:
      name: names the phase's directory and log lines.
      shapes: of the parameters.
      load: rules to where each parameter starts from: `fresh`, `checkpoint`, or the name of a phase, whose tree is that below the
        path's first part.
      init: place -> parameters, fresh or loaded, where `place` maps a tree of their shapes to one of their shardings.
      loss: (params, batch, dropout key, whole) -> (mean loss, scalars to log). Traced; must not depend on anything mutable. The
        batch may be a part of one whose `counts` are `whole`, with `parts`, how many there are: losses of parts add up. None for
        a whole batch.
      counts: batch -> by what the means of its loss divide, as far as the batch alone tells. Traced.
      train_data: endless batches, of which this process has its share of the rows.
      steps_per_epoch: batches in one pass over the training data, on average.
      work: about how much one step computes: the parameters, times the events or tokens that each of them is multiplied with.
      count_events: batch -> number of real training targets in it, for events/s and for the targets that were seen.
      metrics: the names of what `evaluate` returns.
      check: raises ValueError for what would end an evaluation; needs no parameters.
      evaluate: params -> validation metrics; of several processes all call it, and all have the same.
      programs: shapes of the parameters -> what evaluation compiles besides, by name, for a look ahead (`user_llm/ahead`).
      results: params -> rows for results.json, measured on the test split; likewise.
      taught_by: the phases whose targets the parameters have seen too, before this phase began.
      beside: arrays that every batch holds besides its rows, by name. They are the same at each step. Every device has
        them whole, and they are arguments of the compiled step, not a part of it.
    """

    name: str
    shapes: Params
    load: Rules
    init: Callable[[Callable[[Params], Params]], Params]
    loss: Callable[[Params, Batch, jax.Array, Whole | None], tuple[jax.Array, dict[str, jax.Array]]]
    counts: Callable[[Batch], dict[str, jax.Array]]
    train_data: Streams
    steps_per_epoch: float
    work: float
    count_events: Callable[[dict[str, np.ndarray]], int]
    metrics: tuple[str, ...]
    check: Callable[[], None]
    evaluate: Callable[[Params], dict[str, float]]
    results: Callable[[Params], list[dict]]
    programs: Callable[[Params], dict[str, Program]]
    taught_by: tuple[str, ...] = ()
    beside: Batch = dataclasses.field(default_factory=dict)
