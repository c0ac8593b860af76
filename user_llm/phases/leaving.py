"""How a finished phase that trains the LLM with user tokens writes its model directory, `RUN/PHASE/model`."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from user_llm.common import trees
from user_llm.common.distributed import is_first
from user_llm.common.files import is_remote
from user_llm.data.vocabulary import Vocabulary
from user_llm.evals.bootstrap import intervals, resampled_means
from user_llm.evals.measured import Measured
from user_llm.models import pretrained
from user_llm.models.export import is_bare_llm
from user_llm.phases import starting
from user_llm.phases.run import Run
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer
from user_llm.tasks.asking import Asking
from user_llm.tasks.task import PromptTask

FOLDER = "model"
DRAWS = 1000  # bootstrap samples for an interval on a model card


def personalizer(asking: Asking, tasks: Mapping[str, PromptTask]) -> Personalizer:
    """Return the model of `asking` as a `Personalizer`, which needs no dataset. Its identity is empty until it is saved."""
    lines = next(iter(asking.examples.values())).template.lines
    names = {task: dict(found) for task, of in asking.examples.items() if (found := tasks[task].names(of))}
    return Personalizer("", asking.predictor, Vocabulary.of(asking.data.timelines), lines, names)


def card_rows(task: str, method: str, measured: Measured) -> list[dict]:
    """Return the rows of a model card's table: each metric with its 95% interval."""
    table = np.stack(list(measured.values.values()), axis=1)
    spans = intervals(resampled_means(table, measured.users, draws=DRAWS))
    return [
        {"task": task, "method": method, "metric": name, "value": value, "interval": span.tolist(), "n": len(measured)}
        for (name, value), span in zip(measured.metrics.items(), spans, strict=True)
    ]


def leave(name: str, run: Run, load: trees.Rules, asking: Asking, rows: list[dict]) -> None:
    """Write the model directory of a phase. In a run of several processes every process must call this function.

    Args:
      name: the name of the phase.
      load: the rules that say where each parameter was loaded from.
      asking: the model and the dataset that it was trained on.
      rows: the rows of the model card's table.
    """
    phase, checkpoint = run.config.contextual(name), run.config.llm.checkpoint
    base, source = None, Path(run.local) / "tokenizer"
    if checkpoint:
        source = run.checkpoint
        base = artifact.Base(checkpoint, pretrained.checkpoint_hashes(source, run.local))
    model = personalizer(asking, run.kinds.tasks)
    timelines, split = asking.data.timelines, asking.data.split
    facts: dict[str, Any] = {
        "dataset": timelines.name, "users": len(timelines), "events": int(split.train_stop.sum()),
        "items": timelines.schema.num_items, "columns": model.vocabulary.fields.columns(), "phase": name,
        "command": shlex.join(run.command), "llm": checkpoint, "license": licence(source),
        "rows": rows,
    }  # fmt: skip
    made = artifact.Making(
        base, touched(name, run, starting.sources(run, load, asking.predictor.params)), source, phase.loop.sharding, phase.loop.dtype,
        asking.data.train_counts, facts, run.kinds.families,
    )  # fmt: skip
    home = Path(run.local) / name
    artifact.save(home / FOLDER, model, made)
    if is_first() and is_remote(run.workdir):
        artifact.copy_to_store(home / FOLDER, run.workdir / name / FOLDER)


def touched(name: str, run: Run, sources: trees.Params) -> bool:
    """Return whether the LLM's own weights may differ from the checkpoint: the phase trained them, or loaded them from elsewhere.

    Args:
      name: the name of the phase.
      sources: where each parameter was loaded from.
    """
    trains = trees.flatten(trees.match(run.config.trainable(name), sources))
    return any(
        is_bare_llm(path) and (trains[path] or source != "checkpoint") for path, source in trees.flatten(sources).items()
    )


def licence(directory: Path) -> str:
    """Return the licence that the model card in an LLM's directory names; the empty string if it names none."""
    page = directory / "README.md"
    found = re.search(r"^license: *(\S+)", page.read_text(errors="replace")[:10_000], re.MULTILINE) if page.is_file() else None
    return found[1] if found else ""
