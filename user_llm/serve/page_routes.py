"""The routes that the page needs besides those of users and texts: what the model reads, sample users, and a search of the items."""

import asyncio
import datetime
import functools
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import APIRouter, Query

from user_llm.data.fields import Number
from user_llm.data.vocabulary import Vocabulary
from user_llm.serve.state import State
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.ranking import RANKING

SAMPLES, EVENTS = 5, 8  # sample users, and the events of each


def router(state: State) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    titles = functools.lru_cache(maxsize=1)(_titles)

    @routes.get("/v1/description")
    def describe() -> dict[str, Any]:
        return {"model": state.name, **description(state.engine.model)}

    @routes.get("/v1/samples")
    def sample() -> dict[str, Any]:
        vocabulary = state.engine.model.vocabulary
        return {"samples": samples(vocabulary, datetime.datetime.now(datetime.UTC))}

    @routes.get("/v1/items")
    async def items(
        q: Annotated[str, Query(max_length=256)] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 10,
        id: Annotated[list[str] | None, Query(max_length=1000)] = None,
    ) -> dict[str, Any]:
        vocabulary = state.engine.model.vocabulary
        if id is not None:
            named = [(key, vocabulary.title(key)) for key in id]
            return {"items": [{"id": key, "title": title} for key, title in named if title is not None]}
        keys = vocabulary.catalogue.keys
        found = await asyncio.to_thread(lambda: search(titles(vocabulary), q, limit))
        return {"items": [{"id": keys[number], "title": vocabulary.catalogue.titles[number]} for number in found]}

    return routes


def description(model: Personalizer) -> dict[str, Any]:
    """Return what can be asked of a model, and what it was trained on, as a JSON value."""
    template = model.predictor.templates.get(RANKING)
    return {
        "identity": model.identity,
        "dataset": model.facts.get("dataset", ""),
        "items": len(model.vocabulary.catalogue.keys) - 1,
        "chat": model.tokenizer.chat_template is not None,
        "recommends": template is not None,
        "explains": model.predictor.config.resampler is not None,
        "instruction": "" if template is None else template.settings["instruction"],
        "columns": columns(model.vocabulary),
    }


def columns(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the columns of an event, as a JSON value that says which column holds what."""
    fields = vocabulary.fields
    numbers = [
        {"column": one.column, "allowed": list(one.allowed), "required": name in vocabulary.needed, "high": _high(one)}
        for name, one in fields.numbers.items()
    ]
    texts = [one.column for one in fields.texts.values()]
    times = {"time": fields.time, "timed": fields.timed, "unit": fields.unit}
    return {"user": fields.user, "item": fields.item, **times, "numbers": numbers, "texts": texts}


def samples(vocabulary: Vocabulary, now: datetime.datetime) -> list[dict[str, Any]]:
    """Return sample users. They are made up from the catalogue: none of them is a user of the training data.

    There is one for each of the largest categories, who has had items of this category alone, rated as high as can be; for a
    catalogue without categories there is one, whose items are spread over the catalogue. An event a day ends at `now`.
    """
    fields, catalogue = vocabulary.fields, vocabulary.catalogue
    named: list[tuple[str, Sequence[int]]] = [("A bit of everything", range(1, len(catalogue.keys)))]
    if catalogue.multi:
        bag, rows = next(iter(catalogue.multi.items()))
        of = {name: np.flatnonzero((rows == number).any(1)) for number, name in enumerate(catalogue.vocab[bag]) if number}
        largest = sorted((name for name in of if len(of[name])), key=lambda name: -len(of[name]))[:SAMPLES]
        named = [(name, of[name].tolist()) for name in largest] or named
    high = {one.column: _high(one) for name, one in fields.numbers.items() if name in vocabulary.needed}
    made = []
    for name, numbers in named:
        chosen = [numbers[place] for place in np.unique(np.linspace(0, len(numbers) - 1, EVENTS).astype(int))]
        days = [now - datetime.timedelta(days=ago) for ago in reversed(range(len(chosen)))]
        times = [day.isoformat(timespec="seconds") for day in days] if fields.timed else range(1, len(chosen) + 1)
        events = [
            {fields.item: catalogue.keys[number], fields.time: time, **high} for number, time in zip(chosen, times, strict=True)
        ]
        made.append({"name": name, "events": events})
    return made


def search(titles: pa.Array, part: str, limit: int) -> list[int]:
    """Return the numbers from 1 of at most `limit` titles that hold a part, whatever its case; those that begin with it come first."""
    held = pc.indices_nonzero(pc.match_substring(titles, part, ignore_case=True))
    begins = pc.starts_with(titles.take(held), part, ignore_case=True).to_numpy(zero_copy_only=False)
    order = np.argsort(~begins, kind="stable")[:limit]
    return (1 + held.to_numpy()[order].astype(np.int64)).tolist()


def _titles(vocabulary: Vocabulary) -> pa.Array:
    return pa.array(vocabulary.catalogue.titles[1:], pa.string())


def _high(number: Number) -> float:
    """Return a high value of a column: the highest that is allowed, or else the one above which no further level is told apart."""
    return (number.allowed or number.edges or (1.0,))[-1]
