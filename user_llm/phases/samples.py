"""A few answers for people to read, with the events that the user tokens attended to."""

from collections.abc import Mapping

import numpy as np

from user_llm.tasks.asking import Asking
from user_llm.tasks.task import PromptTask

SHOWN = 5  # attended events, latest events


def draw_samples(asking: Asking, tasks: Mapping[str, PromptTask], method: str, count: int) -> list[dict]:
    """Answer each task for its first `count` test users.

    Returns:
      Of each its task, method, user, `history` (the latest titles, newest first), `prompt`, `wanted`, `answer`, and, with a
      resampler, `attended`: [title, how many events ago, weight] of the events that its user tokens see most.
    """
    samples, timelines = [], asking.data.timelines
    for task, asked in asking.examples.items():
        users, ends = (array[:count] for array in asked.targets("test"))
        answers = tasks[task].show(asking, task, users, ends)
        attended = attended_titles(asking, users, ends)
        for user, end, answer, seen in zip(users.tolist(), ends.tolist(), answers, attended, strict=True):
            latest = timelines.items(user, max(end - SHOWN, 0), end)[::-1]
            samples.append({
                "task": task, "method": method, "user": user, "history": [timelines.catalogue.titles[i] for i in latest],
                "prompt": asked.template.lines.tokenizer.decode(asked.prompt(user, end)),
                "wanted": asked.answer(user, end), "answer": answer, "attended": seen,
            })  # fmt: skip
    return samples


def attended_titles(asking: Asking, users: np.ndarray, ends: np.ndarray) -> list[list[tuple[str, int, float]]]:
    """Return (title, how many events ago, weight) of the events that each user's tokens see most; nothing without a resampler."""
    titles = asking.data.timelines.catalogue.titles
    out: list[list[tuple[str, int, float]]] = [[] for _ in users]
    if asking.predictor.config.resampler is None:
        return out
    for indices, batch in asking.batches(users, ends):
        weights = asking.predictor.attended(batch.events, batch.lengths)
        for index, row, events, length in zip(indices, weights, batch.events, batch.lengths, strict=False):
            most = np.argsort(-row[:length], kind="stable")[:SHOWN]
            out[index] = [(titles[events[e, 0]], int(length - e), float(row[e])) for e in most]
    return out
