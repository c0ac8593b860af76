"""A few answers for people to read, with the events that the user tokens attended to."""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from user_llm.common import mesh as meshes
from user_llm.data.prompts.favorite import FavoriteExamples
from user_llm.data.prompts.next_item import NextItemExamples
from user_llm.data.prompts.review import ReviewExamples
from user_llm.models.trie import Trie
from user_llm.tasks.answering import Asking

SHOWN = 5  # items of a ranking, attended events, latest events


def best_titles(asking: Asking, task: str, asked: NextItemExamples, users, ends) -> list[str]:
    """Return the titles of the items that rank highest, by the item head or, where none is trained, by writing."""
    titles, out = asking.timelines.catalogue.titles, [""] * len(users)
    trie = None if asking.predictor.ranks else Trie.build(asked.template.lines.titles_as_targets())
    for indices, batch in asking.batches(users, ends):
        if trie is None:
            scores = meshes.fetch(asking.score(task, batch))
            best = np.argsort(-scores, axis=1, kind="stable")
        else:
            best = asking.choose(task, batch, trie, asking.predictor.beams)
        for index, row in zip(indices, best[:, :SHOWN], strict=False):
            out[index] = "; ".join(titles[item] for item in row)
    return out


def favorites(asking: Asking, task: str, asked: FavoriteExamples, users, ends) -> list[str]:
    """Return the name of the likeliest class."""
    best = asking.favorites(task, asked, users, ends)
    return [asked.asked.labels.names[i] for i in best]


def texts(asking: Asking, task: str, asked: ReviewExamples, users, ends) -> list[str]:
    """Return what is written."""
    return asking.write(task, asked, users, ends)


ANSWERS: dict[str, Callable[..., list[str]]] = {
    "next_item": best_titles,
    "favorite": favorites,
    "favorite_future": favorites,
    "review": texts,
}


def draw_samples(asking: Asking, method: str, settings: ConfigDict) -> list[dict]:
    """Answer each task for its first `settings.samples` test users.

    Returns:
      Of each its task, method, user, `history` (the latest titles, newest first), `prompt`, `wanted`, `answer`, and, with a
      resampler, `attended`: [title, how many events ago, weight] of the events that its user tokens see most.
    """
    samples, timelines = [], asking.timelines
    for task, asked in asking.examples.items():
        users, ends = (array[: settings.samples] for array in asked.targets("test"))
        answers = ANSWERS[task](asking, task, asked, users, ends)
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
    titles = asking.timelines.catalogue.titles
    out: list[list[tuple[str, int, float]]] = [[] for _ in users]
    if asking.predictor.config.resampler is None:
        return out
    for indices, batch in asking.batches(users, ends):
        weights = asking.predictor.attended(batch.events, batch.lengths)
        for index, row, events, length in zip(indices, weights, batch.events, batch.lengths, strict=False):
            most = np.argsort(-row[:length], kind="stable")[:SHOWN]
            out[index] = [(titles[events[e, 0]], int(length - e), float(row[e])) for e in most]
    return out
