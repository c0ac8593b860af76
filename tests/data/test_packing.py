"""Bundles of packed prompts against the examples that they are made of."""

import json
from itertools import islice

import grain
import jax
import numpy as np
import pytest

from user_llm.data.packing import PackedExamples, Packing, settle

SIZES = Packing(prompts=12, histories=6, rows=6, row_length=16, segments=3)


def make_examples(count=50, *, answers=1, most=8):
    """Return histories with up to three prompts of 4 to `most` tokens; every token of a prompt is of its own number."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        ends = int(rng.integers(1, 4))
        lengths = np.zeros(3, np.int32)
        lengths[:ends] = rng.integers(4, most + 1, ends)
        real = np.arange(3)[:, None] < ends
        text = 1000 * number + 100 * np.arange(1, 4)[:, None] + np.arange(1, most + 1)
        found.append({
            "events": np.full(5, number), "lengths": np.array(number % 5 + 1), "prefix": np.arange(1, 4) * real[:, 0],
            "text": np.where(np.arange(most) < lengths[:, None], text, 0), "text_lengths": lengths,
            "answers": np.arange(1, answers + 1) * real, "items": (10 * number + np.arange(1, 4)[:, None] + np.zeros(answers, int)) * real,
            "text_weight": {"next_item": np.float32(0.5)},
        })  # fmt: skip
    return found


def stream(examples, sizes):
    return PackedExamples(grain.MapDataset.source(examples).repeat().to_iter_dataset(), sizes)


def prompts_of(bundle, sizes):
    """Return the prompts of a bundle by their history and number: tokens, answers, items and what the text loss asks for."""
    found = {}
    for row in range(sizes.rows):
        segments = bundle["segments"][row]
        assert (np.diff(segments[segments > 0]) >= 0).all() and not segments[(segments > 0).sum() :].any()
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(bundle["positions"][row, places], np.arange(len(places)))
            history, number = divmod(int(bundle["users"][row, segment - 1]), 3)
            answers = bundle["answers"][history, number]
            local = [int(answer) - row * sizes.row_length - int(places[0]) for answer in answers]
            assert (int(bundle["events"][history, 0]), number) not in found
            found[int(bundle["events"][history, 0]), number] = (
                bundle["text"][row, places],
                local,
                bundle["items"][history, number],
                bundle["predicted"][row, places],
                int(bundle["prefix"][history, number]),
            )
    assert (bundle["text"][bundle["segments"] == 0] == 0).all() and not bundle["predicted"][bundle["segments"] == 0].any()
    assert len(found) == (bundle["answers"][..., 0] > 0).sum() == (bundle["prefix"] > 0).sum()
    return found


@pytest.mark.parametrize(("soft", "answers"), [(0, 1), (0, 2), (2, 1)])
def test_every_prompt_is_asked_once_and_in_order_with_room_for_its_soft_tokens(soft, answers):
    examples = make_examples(answers=answers)
    sizes = Packing(12, 6, 6, 16, 3, soft, leading=1)
    asked, full = [], 0
    for bundle in islice(iter(stream(examples, sizes)), 8):
        found = prompts_of(bundle, sizes)
        assert 0 < len(found) <= sizes.prompts
        full += len(found) == sizes.prompts
        assert bundle["text_weight"] == {"next_item": 0.5}
        for (history, number), (text, local, items, predicted, prefix) in found.items():
            example, length = examples[history], int(examples[history]["text_lengths"][number])
            expected = example["text"][number, :length]
            np.testing.assert_array_equal(text, [*expected[:1], *[0] * soft, *expected[1:]])
            assert local == [answer + soft for answer in range(1, answers + 1)]
            np.testing.assert_array_equal(items, example["items"][number])
            np.testing.assert_array_equal(predicted, [0] * (1 + soft) + [1] * (length - 2) + [0])
            assert prefix == example["prefix"][number]
        asked += sorted(found)
    assert 0 < full < 8  # some bundles end as their rows are full
    in_order = [
        (history, number) for history, example in enumerate(examples) for number in range((example["text_lengths"] > 0).sum())
    ]
    assert asked == in_order[: len(asked)] and len(asked) > 60


def test_the_iterator_resumes_exactly_with_prompts_that_are_left_over():
    iterator, left_over = iter(stream(make_examples(), SIZES)), 0
    for _ in range(12):
        state = json.loads(json.dumps(iterator.get_state()))
        left_over += state["asked"] > 0
        expected = [next(iterator) for _ in range(3)]
        fresh = iter(stream(make_examples(), SIZES))
        next(fresh)
        for resumed in (fresh, iterator):
            resumed.set_state(state)
            assert json.loads(json.dumps(resumed.get_state())) == state
            jax.tree.map(np.testing.assert_array_equal, [next(resumed) for _ in range(3)], expected)
        iterator.set_state(state)
        next(iterator)
    assert left_over  # some states are in the middle of a history


def test_sizes_are_those_that_examples_need():
    examples = make_examples(1200)
    sizes = settle(stream(examples, SIZES)._parent, 64, 32, soft=1, leading=2)
    each = np.mean([(example["text_lengths"] > 0).sum() for example in examples[:1024]])
    assert sizes.prompts == round(64 * each) and 64 <= sizes.histories <= 72
    bundles = list(islice(iter(stream(examples, sizes)), 20))
    counts = [(bundle["answers"] > 0).sum() for bundle in bundles]
    assert np.mean(counts) > 0.97 * sizes.prompts and max(counts) == sizes.prompts
    assert np.mean([(bundle["segments"] > 0).mean() for bundle in bundles]) > 0.9


def test_a_prompt_that_no_row_holds_is_refused():
    with pytest.raises(ValueError, match="A prompt of 9 tokens does not fit a row of 8"):
        next(iter(stream(make_examples(most=9), Packing(12, 6, 6, 8, 3))))
