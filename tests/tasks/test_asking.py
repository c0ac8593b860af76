"""How batches of histories and prompts are padded; how likely an answer is."""

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_dataset, make_models, variants

from user_llm.common import trees
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


@pytest.mark.parametrize("variant", variants("cross"))
def test_the_likelihood_of_an_answer_is_the_mean_of_its_tokens(make_timelines, drawn, tmp_path, variant):
    asking = make_models(make_dataset(make_timelines), drawn, tmp_path)(variant).asking
    users, ends = np.array([2, 0, 1]), np.array([10, 2, 7])
    predictor, asked = asking.predictor, asking.examples["favorite"]
    model = trees.merge(predictor.graphdef, predictor.params)
    with jax.set_mesh(predictor.mesh):
        found = asking.likelihood("favorite", 8, users, ends)
        silent = copy.copy(asked)
        silent.answer = lambda user, end: ""  # as a text is whose characters a tokenizer leaves out
        ended = dataclasses.replace(asking, examples={"favorite": silent}).likelihood("favorite", 8, users, ends)
        assert np.isfinite(ended).all() and (ended < 0).all()
        assert len({asked.answer(int(u), int(e)) for u, e in zip(users, ends, strict=True)}) > 1
        for [index], batch in asking.batches(users, ends, batch_size=1):
            prompt, [user] = asking.prompts("favorite", batch)[0], batch.users
            text = asked.template.lines.line(asked.answer(int(user), int(ends[index])), 8)
            row = np.concatenate([prompt, text])[None]
            hidden = model.hidden(row, np.array([row.size]), user=asking.users(batch), leading=predictor.leading("favorite"))[0]
            logs = jax.nn.log_softmax(hidden @ model.decoder.output_table().T)
            expected = np.mean([logs[len(prompt) - 1 + n, token] for n, token in enumerate(text)])
            np.testing.assert_allclose(found[index], expected, rtol=1e-4)
