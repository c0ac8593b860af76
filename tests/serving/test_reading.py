"""From raw events to users: further events, and events whose item the model does not know."""

import numpy as np


def test_an_update_equals_encoding_all(made, model):
    user = 2  # with more events than the encoder reads
    whole = model.encode(made.rows(user))
    for split in (0, 1, 5, 10):
        late = model.update(model.encode(made.rows(user, split)), made.rows(user, start=max(split - 1, 0)))
        np.testing.assert_allclose(late.tokens, whole.tokens, atol=1e-6)
        np.testing.assert_array_equal(late.events, whole.events)
        assert (late.count, late.last_time) == (whole.count, whole.last_time)


def test_unknown_items_are_counted_left_out_and_said_once(made, model, caplog):
    rows = made.rows(1)
    strange = [*rows[:2], {**rows[2], "item": "no such"}, *rows[2:], {**rows[-1], "item": "nor this"}]
    user, expected = model.encode(strange), model.encode(rows)
    assert (user.unknown, user.count) == (2, expected.count)
    np.testing.assert_array_equal(user.events, expected.events)
    assert sum("2 events are left out" in record.getMessage() for record in caplog.records) <= 1
    again = model.update(model.update(user, strange), strange[:4])
    assert (again.unknown, again.count) == (user.unknown, user.count)
    alone = model.encode([{**rows[0], "item": "no such"}])
    assert (alone.unknown, alone.count) == (1, 0)
