"""What the user tokens look at: a user's events by the attention that they get."""

from typing import NamedTuple

import numpy as np

from user_llm.common.errors import check_count
from user_llm.data.pipeline import length_batches
from user_llm.data.timelines import Catalogue
from user_llm.serving import batch
from user_llm.serving.predictor import Predictor
from user_llm.serving.user import User


class Seen(NamedTuple):
    """An event of a user, with the attention that it gets.

    Attributes:
      id: the item's id in the training data.
      title: the item's title.
      events_ago: how many events ago the event was; the latest event has 1.
      weight: the attention that the user tokens pay to the event, from 0 to 1. The weights of a user's events sum to at most 1.
    """

    id: str
    title: str
    events_ago: int
    weight: float


def attended(predictor: Predictor, catalogue: Catalogue, user: User, k: int | None) -> list[Seen]:
    """Return the `k` events that get the most attention; the arguments and errors are those of `Personalizer.explain`."""
    if k is not None:
        check_count("k", k)
    if predictor.config.resampler is None:
        raise ValueError("This model has no resampler: each event is a user token of its own, and nothing attends to it.")
    (_, rows, padded), *_ = length_batches(np.array([batch.read_events(predictor, user)]), 1, predictor.bucket)
    events, lengths = batch.histories(predictor, [user], padded)
    weights = predictor.attended(events, lengths)[0][: lengths[0]]
    read = user.items[len(user.items) - int(lengths[0]) :]
    order = np.argsort(-weights, kind="stable")[:k]
    return [Seen(catalogue.keys[read[n]], catalogue.titles[read[n]], len(read) - int(n), float(weights[n])) for n in order]
