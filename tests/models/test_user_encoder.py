import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.data.schema import Feature, Schema
from user_llm.models.user_encoder import OBJECTIVES, READ_SCALE, UserEncoder, UserEncoderConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.nn.visibility import causal_mask, segment_mask

SCHEMA = Schema(
    (
        Feature("item", "item", 12),
        Feature("rating", "ordinal", 6),
        Feature("genres", "multi", 5, 3),
        Feature("gap", "time", 9),
    )
)
BLOCK = BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=12)
CONFIG = UserEncoderConfig(schema=SCHEMA, block=BLOCK, num_layers=2, feature_width=4, max_events=16, heads=("rating", "genres"))
LENGTHS = np.array([7, 4, 1])


def _create(config):
    return lambda: UserEncoder(config, rngs=nnx.Rngs(params=0))


def _events(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(1, f.size, (rows, length, f.width)) for f in SCHEMA]
    columns[2] *= rng.random(columns[2].shape) < 0.6  # bags of any size, empty ones too
    return np.concatenate(columns, axis=-1)


EVENTS = _events(3, 8)


@pytest.fixture(scope="module", params=["rotary", "learned"])
def encoder(request, drawn):
    """(jitted (params, events, mask, positions) -> states, params) with either kind of positions."""
    graphdef, params = drawn(_create(dataclasses.replace(CONFIG, positions=request.param)))

    @jax.jit
    def run(params, events, mask, positions):
        return trees.merge(graphdef, params)(events, mask=mask, positions=positions)

    return run, params


def _padded(encoder, events, lengths):
    """States of right-padded histories."""
    run, params = encoder
    positions = np.broadcast_to(np.arange(events.shape[1]), events.shape[:2])
    return np.asarray(run(params, events, causal_mask(positions < lengths[:, None]), positions))


def test_a_state_depends_on_its_event_and_all_before_it_alone(encoder):
    before = _padded(encoder, EVENTS, LENGTHS)
    for at in (0, 3, 6):
        for column in (0, 1, 2, 5):  # item, rating, a genre, gap
            changed = EVENTS.copy()
            changed[0, at, column] = 1 + changed[0, at, column] % 4
            difference = np.abs(_padded(encoder, changed, LENGTHS) - before).max(-1)
            np.testing.assert_array_equal(difference[0, :at], 0)
            assert (difference[0, at : LENGTHS[0]] > 1e-4).all()
            np.testing.assert_array_equal(difference[1:], 0)


def test_padding_changes_nothing(encoder):
    other = EVENTS.copy()
    real = np.arange(8) < LENGTHS[:, None]
    other[~real] = _events(3, 8, seed=1)[~real]
    before, after = (_padded(encoder, events, LENGTHS) for events in (EVENTS, other))
    np.testing.assert_array_equal(before[real], after[real])
    assert np.isfinite(before).all()


def test_packed_rows_equal_one_row_per_user(encoder):
    """Histories of 4 and 1 events and 3 of padding in the first row, one of 7 in the second."""
    run, params = encoder
    packed, segments, positions = np.zeros_like(EVENTS[:2]), np.zeros((2, 8), int), np.zeros((2, 8), int)
    places = [(1, slice(0, 7)), (0, slice(0, 4)), (0, slice(4, 5))]
    for user, (row, where) in enumerate(places):
        packed[row, where] = EVENTS[user, : LENGTHS[user]]
        segments[row, where] = 1 + user
        positions[row, where] = np.arange(LENGTHS[user])
    states = run(params, packed, segment_mask(segments), positions)
    alone = _padded(encoder, EVENTS, LENGTHS)
    for user, (row, where) in enumerate(places):
        np.testing.assert_allclose(states[row, where], alone[user, : LENGTHS[user]], atol=2e-6)


def test_positions_tell_the_order_of_events(encoder):
    """Both kinds: the last event's state changes when two events before it trade places."""
    swapped = EVENTS[:, [1, 0, *range(2, 8)]]
    full = np.array([8, 8, 8])
    assert np.abs(_padded(encoder, swapped, full) - _padded(encoder, EVENTS, full))[:, -1].max() > 1e-3


def test_learned_positions_are_absolute_and_rotary_ones_relative(encoder):
    run, params = encoder
    positions = np.broadcast_to(np.arange(8), (3, 8))
    mask = causal_mask(np.ones((3, 8), bool))
    before, shifted = (np.asarray(run(params, EVENTS, mask, positions + by)) for by in (0, 5))
    if "position" in params:
        assert params["position"].shape == (16, 8)
        assert np.abs(shifted - before).max() > 1e-2
    else:
        np.testing.assert_allclose(shifted, before, atol=1e-4)


def _objective(objective):
    """An encoder of an objective, the catalogue of a dual one from `_catalogue`."""
    return lambda: UserEncoder(
        dataclasses.replace(CONFIG, objective=objective, positions="learned"), catalogue=_catalogue(), rngs=nnx.Rngs(params=0)
    )


def _catalogue():
    """Ids and bags of items 1 to 11."""
    table = np.zeros((128, 4), np.int32)
    table[1:12, 0] = np.arange(1, 12)
    table[1:12, 1:] = _events(1, 11, seed=3)[0, :, 2:5]
    return table


@pytest.fixture(scope="module", params=OBJECTIVES)
def kind(request, drawn):
    """(objective, encoder) of each kind."""
    graphdef, params = drawn(_objective(request.param))
    if request.param == "dual":  # which the numpy draw above replaced
        params["tower"]["catalogue"] = jnp.asarray(_catalogue())
    return request.param, graphdef, params


def test_nothing_at_or_behind_an_end_reaches_what_that_end_sees(kind):
    """Nor the query there; what lies before it does. Ends 3 and 6 of one history, and the empty one."""
    objective, graphdef, params = kind
    ends = np.array([[3, 6, 0]])

    @jax.jit
    def run(events):
        states, seen = encoded = trees.merge(graphdef, params).encode(events, ends)
        visible = jnp.arange(states.shape[1]) < seen[..., None]
        # One row for all ends, or one for each: either way the states that each end sees.
        states = jnp.where(visible[..., None], states[:, None], 0.0).reshape(3, *states.shape[1:])
        return states, encoded.last().reshape(3, -1)

    before = run(EVENTS[:1])
    for at in range(8):
        changed = EVENTS[:1].copy()
        changed[0, at] = 1 + changed[0, at] % 4
        for old, new in zip(before, run(changed), strict=True):
            reached = np.array([np.abs(new[j] - old[j]).max() > 1e-4 for j in range(2)])
            np.testing.assert_array_equal(reached, at < ends[0, :2])
            for j in np.flatnonzero(~reached):
                np.testing.assert_array_equal(new[j], old[j])
    np.testing.assert_array_equal(before[0][2], 0)


def test_the_query_is_the_state_of_the_last_event_or_of_a_mask_token_behind_it(kind):
    """The history of 4 events alone; the token stands for whatever event."""
    objective, graphdef, params = kind
    size = 5 if objective == "masked" else 4
    sees = np.ones((1, 5, 5), bool) if objective == "masked" else np.tri(4, dtype=bool)[None]
    hidden = np.arange(5)[None] == 4 if objective == "masked" else None

    @jax.jit
    def run(params):
        encoder = trees.merge(graphdef, params)
        alone = encoder(EVENTS[1:2, :size], mask=sees, positions=np.arange(size)[None], hidden=hidden)
        return alone[0, -1], encoder.encode(EVENTS, LENGTHS[:, None])

    alone, encoded = run(params)
    np.testing.assert_allclose(encoded.last()[1, 0], alone, atol=1e-5)
    np.testing.assert_array_equal(encoded.seen[:, 0], LENGTHS + (objective == "masked"))


def test_an_items_vector_is_its_row_or_what_the_tower_makes_of_its_features(kind):
    objective, graphdef, params = kind
    table, genres = np.asarray(params["item"]), np.asarray(params["features"]["genres"])
    expected = table[1:12]
    if objective == "dual":
        bags = [genres[bag[bag > 0]].mean(0) if bag.any() else np.zeros(4) for bag in _catalogue()[1:12, 1:]]
        expected = np.concatenate([expected, bags], axis=1) @ np.asarray(params["tower"]["project"])
    query = np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)

    @jax.jit
    def run(params):
        encoder = trees.merge(graphdef, params)
        return encoder.item_vectors(), encoder.item_vectors(np.array([7, 2])), encoder.score(query)

    every, some, scores = run(params)
    np.testing.assert_allclose(every[1:12], expected, atol=1e-5)
    np.testing.assert_allclose(some, expected[[6, 1]], atol=1e-5)
    np.testing.assert_allclose(scores[:, 1:12], query @ expected.T, atol=1e-4)


def test_a_hidden_event_hides_all_its_features_and_others_are_seen_by_their_own_history_from_both_sides(drawn):
    """A packed row: events 0 to 3 of one history, 4 to 6 of another, padding; 1 and 5 are hidden."""
    graphdef, params = drawn(_objective("masked"))
    segments, positions = np.array([[1, 1, 1, 1, 2, 2, 2, 0]]), np.array([[0, 1, 2, 3, 0, 1, 2, 0]])
    hidden = np.isin(np.arange(8), [1, 5])[None]

    @jax.jit
    def run(params, events):
        mask = segment_mask(jnp.asarray(segments), causal=False)
        return trees.merge(graphdef, params)(events, mask=mask, positions=positions, hidden=hidden)[0]

    before = run(params, EVENTS[:1])
    for at in range(8):
        for column in (0, 1, 2, 5):  # item, rating, a genre, gap
            changed = EVENTS[:1].copy()
            changed[0, at, column] = 1 + changed[0, at, column] % 4
            moved = np.abs(run(params, changed) - before).max(-1) > 1e-5
            own = (segments[0] == segments[0, at]) & (segments[0, at] > 0)
            np.testing.assert_array_equal(moved[:7], (own & ~hidden[0, at])[:7])
    moved = np.abs(run({**params, "mask_token": params["mask_token"] + 1}, EVENTS[:1]) - before).max(-1) > 1e-5
    assert moved[:7].all()


def test_a_bag_is_the_mean_of_its_members(drawn):
    """Whatever their order and the padding between them; an empty bag is 0."""
    graphdef, params = drawn(_create(CONFIG))
    params["project"] = jnp.eye(8 + 3 * 4)
    bags = np.array([[2, 4, 0], [0, 4, 2], [3, 0, 0], [0, 0, 0]])
    events = np.concatenate([np.full((4, 1), 5), np.full((4, 1), 3), bags, np.full((4, 1), 7)], axis=1)[None]
    embedded = np.asarray(jax.jit(lambda p: trees.merge(graphdef, p).embed(events))(params))[0]
    table = np.asarray(params["features"]["genres"])
    expected = [(table[2] + table[4]) / 2, (table[2] + table[4]) / 2, table[3], np.zeros(4)]
    np.testing.assert_allclose(embedded[:, 12:16], expected, atol=1e-6)
    others = [params["item"][5], params["features"]["rating"][3], params["features"]["gap"][7]]
    np.testing.assert_allclose(embedded[0, [*range(12), *range(16, 20)]], np.concatenate(others), atol=1e-6)


def test_events_read_the_rows_of_items_that_came_after_training_longer_and_scores_do_not(drawn):
    """The features of the events stay as they are."""
    events = np.full((1, 3, EVENTS.shape[-1]), 3)
    events[0, :, 0] = [8, 9, 11]
    (graphdef, params), (later, _) = (drawn(_create(dataclasses.replace(CONFIG, trained_items=n))) for n in (0, 8))
    longer = params | {"item": params["item"].at[9:].multiply(READ_SCALE)}

    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef, params):
        encoder = trees.merge(graphdef, params)
        return encoder.embed(events), encoder.score(jnp.ones((1, 8)))

    (embedded, scores), (plain, same) = run(later, params), run(graphdef, params)
    np.testing.assert_allclose(embedded, run(graphdef, longer)[0], atol=1e-5)
    np.testing.assert_array_equal(scores, same)
    moved = np.abs(embedded - plain).max(-1)[0]
    assert moved[0] == 0 and (moved[1:] > 1e-3).all()


def test_scores_are_products_with_the_item_table_and_pad_is_never_found(drawn):
    graphdef, params = drawn(_create(CONFIG))
    states = np.random.default_rng(2).normal(size=(2, 8)).astype(np.float32)
    scores = np.asarray(jax.jit(lambda p: trees.merge(graphdef, p).score(states))(params))
    assert scores.shape == (2, 128)  # a multiple that any mesh can share
    np.testing.assert_allclose(scores[:, 1:12], states @ np.asarray(params["item"])[1:12].T, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(scores, range(1, 12), axis=1), -np.inf)


def test_dropout_acts_with_a_key_only(drawn):
    config = dataclasses.replace(CONFIG, dropout=0.5, num_layers=1)
    graphdef, params = drawn(_create(config))
    positions = np.broadcast_to(np.arange(8), (3, 8))

    @jax.jit
    def run(key):
        mask = causal_mask(positions < LENGTHS[:, None])
        return trees.merge(graphdef, params)(EVENTS, mask=mask, positions=positions, key=key)

    bare, one, again, other = (np.asarray(run(key)) for key in (None, *map(jax.random.key, (0, 0, 1))))
    np.testing.assert_array_equal(one, again)
    assert min(np.abs(one - bare).max(), np.abs(one - other).max()) > 0.1


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="Unknown encoder positions 'sinusoid': choose rotary or learned"):
        dataclasses.replace(CONFIG, positions="sinusoid")
    with pytest.raises(ValueError, match="Unknown encoder objective 'causal': choose one of autoregressive, masked, dual"):
        dataclasses.replace(CONFIG, objective="causal")
    with pytest.raises(ValueError, match="No head can predict feature 'gap' of kind time"):
        dataclasses.replace(CONFIG, heads=("gap",))
    with pytest.raises(ValueError, match="No feature 'mood'"):
        dataclasses.replace(CONFIG, heads=("mood",))
