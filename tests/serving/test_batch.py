"""Stored users as arrays: few shapes, and every user once."""

import dataclasses
from types import SimpleNamespace

import numpy as np

from user_llm.serving import batch
from user_llm.serving.user import unknown_user

PREDICTOR = SimpleNamespace(batch_size=8, max_events=4, bucket=4, config=SimpleNamespace(encoder=None, resampler=None))


def user_of(events: int, tokens: int = 0):
    nobody = unknown_user("m", 2, key=1, ticks_per_second=1)
    numbers = np.arange(1, 2 * events + 1, dtype=np.int32).reshape(events, 2)
    return dataclasses.replace(nobody, events=numbers, tokens=np.ones((tokens, 3), np.float32))


def test_a_batch_has_one_of_few_numbers_of_rows():
    assert [batch.rows(PREDICTOR, count) for count in (0, 1, 2, 3, 5, 8, 100)] == [1, 1, 2, 4, 8, 8, 8]


def test_the_encoder_reads_the_latest_events_and_the_rest_of_a_row_is_padding():
    events, lengths = batch.histories(PREDICTOR, [user_of(6), user_of(1), user_of(0)], 5)
    assert lengths.tolist() == [4, 1, 0] and events.shape == (3, 5, 2)
    assert events[0, :, 0].tolist() == [5, 7, 9, 11, 0] and events[1, :, 0].tolist() == [1, 0, 0, 0, 0] and not events[2].any()


def test_every_user_is_in_one_batch():
    users = [user_of(1, tokens) for tokens in (3, 0, 9, 1, 5, 5, 2, 7, 30, 4, 6)]
    places = []
    for indices, chosen, of_decoder in batch.batches(PREDICTOR, users):
        assert len(chosen) == 8 and of_decoder is None  # a full batch, and a model without an encoder
        assert all(chosen[row] is users[index] for row, index in enumerate(indices))
        places += list(indices)
    assert sorted(places) == list(range(11))
