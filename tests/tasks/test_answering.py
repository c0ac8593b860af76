"""How batches of histories and prompts are padded."""

from types import SimpleNamespace

import numpy as np
import pytest

from user_llm.data.pipeline import ExampleConfig
from user_llm.tasks.answering import Predictor


class Counting:
    """Prompts of as many tokens as there are events in the history, at least one."""

    max_tokens = 200

    def prompt(self, user: int, end: int) -> np.ndarray:
        return np.full(max(end, 1), 1 + user)


@pytest.mark.parametrize(("pad_whole", "events", "tokens"), [(False, [50, 100, 150], [64, 192]), (True, [150], [200])])
def test_padding_to_the_whole_length_makes_one_shape_of_all_batches(make_timelines, mesh_of, pad_whole, events, tokens):
    timelines = make_timelines([[1 + n % 7 for n in range(length)] for length in (10, 60, 149, 180)])
    users, ends = np.arange(4), np.array([9, 59, 148, 179])
    context = SimpleNamespace(timelines=timelines, mesh=mesh_of())

    def predictor(max_events: int) -> Predictor:
        return Predictor(None, context, ExampleConfig(max_events, 1, text_items=9), 1, {}, pad_whole=pad_whole)

    shapes = [batch.events.shape[1] for _, batch in predictor(150).batches(users, ends)]
    assert sorted(set(shapes)) == events and len(shapes) == 4
    for indices, batch in predictor(150).batches(users, ends):
        length = min(int(ends[indices[0]]), 150)
        assert batch.lengths.tolist() == [length] and not batch.events[0, length:].any() and batch.events[0, :length, 0].all()

    read = [predictor(0).read({}, Counting(), batch) for _, batch in predictor(0).batches(users, ends)]
    assert sorted({text.shape[1] for text, _, _ in read}) == tokens
    assert sorted(int(lengths[0]) for _, lengths, _ in read) == ends.tolist()
