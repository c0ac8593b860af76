"""How batches of histories and prompts are padded."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from user_llm.data.dataset import Dataset
from user_llm.serving.predictor import Predictor
from user_llm.tasks.asking import Asking


class Counting:
    """Prompts of as many tokens as there are events in the history, at least one."""

    template = SimpleNamespace(max_tokens=200, shared_tokens=1, lines=SimpleNamespace(text_items=9))

    def prompt(self, user: int, end: int) -> np.ndarray:
        return np.full(max(end, 1), 1 + user)


@pytest.mark.parametrize(("pad_whole", "events", "tokens"), [(False, [50, 100, 150], [64, 192]), (True, [150], [200])])
def test_padding_to_the_whole_length_makes_one_shape_of_all_batches(make_timelines, mesh_of, pad_whole, events, tokens):
    timelines = make_timelines([[1 + n % 7 for n in range(length)] for length in (10, 60, 149, 180)])
    users, ends = np.arange(4), np.array([9, 59, 148, 179])
    asked = {"count": Counting()}
    templates = {"count": Counting.template}
    reads = Predictor(None, None, {}, mesh_of(), templates, max_events=150, batch_size=1, pad_whole=pad_whole)
    asking = Asking(reads, Dataset(timelines, None), asked)

    shapes = [batch.events.shape[1] for _, batch in asking.batches(users, ends)]
    assert sorted(set(shapes)) == events and len(shapes) == 4
    for indices, batch in asking.batches(users, ends):
        length = min(int(ends[indices[0]]), 150)
        assert batch.lengths.tolist() == [length] and not batch.events[0, length:].any() and batch.events[0, :length, 0].all()

    asking = asking.of(dataclasses.replace(reads, max_events=0))
    padded = [asking.predictor.padded("count", asking.prompts("count", batch)) for _, batch in asking.batches(users, ends)]
    assert sorted({text.shape[1] for text, _ in padded}) == tokens
    assert sorted(int(lengths[0]) for _, lengths in padded) == ends.tolist()
    assert all(asking.users(batch) is None for _, batch in asking.batches(users, ends))
