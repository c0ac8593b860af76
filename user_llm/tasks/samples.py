"""A few answers for people to read, with the events that the user tokens attended to."""

from collections.abc import Callable, Mapping

import numpy as np
from ml_collections import ConfigDict

from user_llm.common import mesh as meshes
from user_llm.common.trees import Params
from user_llm.data.prompts.base import Prompts
from user_llm.data.prompts.favorite import Favorite
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.prompts.review import Review
from user_llm.models.trie import Trie
from user_llm.tasks.answering import Predictor

SHOWN = 5  # items of a ranking, attended events, latest events


def best_titles(predictor: Predictor, params: Params, task: str, prompts: NextItem, users, ends, settings) -> list[str]:
    """Return the titles of the items that rank highest, by the item head or, where none is trained, by writing."""
    titles, out = predictor.context.timelines.catalogue.titles, [""] * len(users)
    trie = None if predictor.ranks else Trie.build(prompts.lines.titles_as_targets())
    for indices, batch in predictor.batches(users, ends):
        if trie is None:
            scores = meshes.fetch(predictor.score(params, task, prompts, batch))
            best = np.argsort(-scores, axis=1, kind="stable")
        else:
            best = predictor.choose(params, task, prompts, batch, trie, settings.beams)
        for index, row in zip(indices, best[:, :SHOWN], strict=False):
            out[index] = "; ".join(titles[item] for item in row)
    return out


def favorites(predictor: Predictor, params: Params, task: str, prompts: Favorite, users, ends, settings) -> list[str]:
    """Return the name of the likeliest class."""
    best = predictor.favorites(params, task, prompts, users, ends, settings.beams)
    return [prompts.asked.labels.names[i] for i in best]


def texts(predictor: Predictor, params: Params, task: str, prompts: Review, users, ends, settings) -> list[str]:
    """Return what is written."""
    return predictor.write(params, task, prompts, users, ends)


ANSWERS: dict[str, Callable[..., list[str]]] = {
    "next_item": best_titles,
    "favorite": favorites,
    "favorite_future": favorites,
    "review": texts,
}


def draw_samples(
    predictor: Predictor, params: Params, method: str, asked: Mapping[str, Prompts], settings: ConfigDict
) -> list[dict]:
    """Answer each task for its first `settings.samples` test users.

    Returns:
      Of each its task, method, user, `history` (the latest titles, newest first), `prompt`, `wanted`, `answer`, and, with a
      resampler, `attended`: [title, how many events ago, weight] of the events that its user tokens see most.
    """
    samples = []
    for task, prompts in asked.items():
        users, ends = (array[: settings.samples] for array in prompts.targets("test"))
        answers = ANSWERS[task](predictor, params, task, prompts, users, ends, settings)
        attended = attended_titles(predictor, params, users, ends)
        for user, end, answer, seen in zip(users.tolist(), ends.tolist(), answers, attended, strict=True):
            timelines = predictor.context.timelines
            latest = timelines.items(user, max(end - SHOWN, 0), end)[::-1]
            samples.append({
                "task": task, "method": method, "user": user, "history": [timelines.catalogue.titles[i] for i in latest],
                "prompt": predictor.context.tokenizer().decode(prompts.prompt(user, end)),
                "wanted": prompts.answer(user, end), "answer": answer, "attended": seen,
            })  # fmt: skip
    return samples


def attended_titles(
    predictor: Predictor, params: Params, users: np.ndarray, ends: np.ndarray
) -> list[list[tuple[str, int, float]]]:
    """Return (title, how many events ago, weight) of the events that each user's tokens see most; nothing without a resampler."""
    titles = predictor.context.timelines.catalogue.titles
    out: list[list[tuple[str, int, float]]] = [[] for _ in users]
    if not predictor.resamples:
        return out
    for indices, batch in predictor.batches(users, ends):
        weights = predictor.attended(params, batch)
        for index, row, events, length in zip(indices, weights, batch.events, batch.lengths, strict=False):
            most = np.argsort(-row[:length], kind="stable")[:SHOWN]
            out[index] = [(titles[events[e, 0]], int(length - e), float(row[e])) for e in most]
    return out
