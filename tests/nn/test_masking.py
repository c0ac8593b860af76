import functools

import jax
import numpy as np

from user_llm.nn.masking import choose_masked

# Histories of 4 and 3 events and padding; one of 8.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8])


def _hidden(segments, probability, last_only, seed=0):
    """Where events are hidden."""
    places, used = jax.jit(lambda key: choose_masked(key, segments, probability=probability, last_only=last_only))(
        jax.random.key(seed)
    )
    hidden = np.zeros(segments.shape, bool)
    for row, (where, real) in enumerate(zip(np.asarray(places), np.asarray(used), strict=True)):
        assert len(set(where[real])) == real.sum(), "a place twice"
        hidden[row, where[real]] = True
    return hidden


def test_last_only_hides_the_last_event_of_every_history_and_no_other():
    expected = np.array([[0, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(_hidden(SEGMENTS, 0.5, 1.0), expected)


def test_everything_real_may_be_hidden_and_padding_never():
    np.testing.assert_array_equal(_hidden(SEGMENTS, 1.0, 0.0), SEGMENTS > 0)
    assert not _hidden(SEGMENTS, 0.0, 0.0).any()


def test_events_are_hidden_as_often_as_asked_for_wherever_they_stand():
    often = _hidden(np.tile(SEGMENTS[0], (20_000, 1)), 0.3, 0.0).mean(0)
    np.testing.assert_allclose(often, [*[0.3] * 7, 0.0], atol=0.01)


def test_a_share_of_histories_hides_its_last_event_alone():
    """A quarter of them; the others hide half of their events, the last one too."""
    hidden = _hidden(np.tile(SEGMENTS[1], (20_000, 1)), 0.5, 0.25)
    alone = hidden[:, -1] & ~hidden[:, :-1].any(1)
    np.testing.assert_allclose(alone.mean(), 0.25 + 0.75 / 2**8, atol=0.01)
    np.testing.assert_allclose(hidden[:, :-1].mean(), 0.75 / 2, atol=0.01)
    np.testing.assert_allclose(hidden[:, -1].mean(), 0.25 + 0.75 / 2, atol=0.01)


def test_no_more_places_than_a_row_can_be_expected_to_need():
    """200 events, a tenth: 20 on average, at most 4 standard deviations of 4.24 more."""
    draw = functools.partial(choose_masked, probability=0.1, last_only=0.0)
    shapes = jax.eval_shape(draw, jax.random.key(0), np.ones((3, 200), int))
    assert [array.shape for array in shapes] == [(3, 37), (3, 37)]
    crowded = np.arange(1, 201)[None]  # 200 histories of one event, each the last of its own: 37 of them are hidden
    assert _hidden(crowded, 0.1, 1.0).sum() == 37
