import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.resampler import Resampler, ResamplerConfig

CONFIG = ResamplerConfig(num_latents=3, input_width=8, heads=2, head_dim=4, mlp_width=12, num_layers=2, recency_buckets=4)
STATES = np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32)
LENGTHS = np.array([5, 16, 1, 0])


def _create():
    return Resampler(CONFIG, rngs=nnx.Rngs(params=0))


def _mask(lengths, padded):
    return np.arange(padded) < lengths[:, None]


@pytest.fixture(scope="module")
def resampler(drawn):
    """(jitted (params, states, mask) -> user tokens of one end, params with recency biases that are not zero)"""
    graphdef, params = drawn(_create)
    return jax.jit(lambda params, states, mask: trees.merge(graphdef, params)(states, mask[:, None])[:, 0]), params


def test_padding_changes_nothing(resampler):
    """Five events padded to 8 and to 16, whatever stands in the padding; nor does a neighbour in the batch."""
    run, params = resampler
    lengths = np.array([5, 3, 1, 0])
    short = np.asarray(run(params, STATES[:, :8], _mask(lengths, 8)))
    np.testing.assert_allclose(short, run(params, STATES, _mask(lengths, 16)), atol=1e-6)
    other = STATES + np.where(_mask(lengths, 16), 0, 9)[..., None].astype(np.float32)
    np.testing.assert_allclose(short, run(params, other, _mask(lengths, 16)), atol=1e-6)
    assert np.isfinite(short).all()


def test_every_real_event_counts(resampler):
    run, params = resampler
    before = np.asarray(run(params, STATES, _mask(LENGTHS, 16)))
    for event in (0, 4):
        changed = STATES.copy()
        changed[0, event] += 1
        after = np.asarray(run(params, changed, _mask(LENGTHS, 16)))
        assert (np.abs(after - before)[0].max(-1) > 1e-3).all()
        np.testing.assert_array_equal(after[1:], before[1:])


def test_recency_counts_back_from_the_last_real_event(resampler):
    """A bias that shuts all buckets but the nearest leaves only the last event to attend to."""
    run, params = resampler
    bias = np.zeros((3, 2, 4), np.float32) + [0, -1e9, -1e9, -1e9]
    shut = trees.replace(params, {f"layers/{layer}/recency": bias.astype(np.float32) for layer in (0, 1)})
    mask = _mask(np.array([5, 5, 5, 5]), 16)
    before = np.asarray(run(shut, STATES, mask))
    others = STATES.copy()
    others[:, :4] += 1
    np.testing.assert_array_equal(run(shut, others, mask), before)
    last = STATES.copy()
    last[:, 4] += 1
    assert np.abs(np.asarray(run(shut, last, mask)) - before).max() > 1e-3


def test_weights_are_by_how_much_latents_see_events(resampler):
    """They and what a latent sees of the latents are all it sees; events beyond an end have none."""
    _, params = resampler
    graphdef, _ = trees.abstract(_create)
    weigh = jax.jit(lambda params, states, masks: trees.merge(graphdef, params).weights(states, masks))
    masks = np.arange(16) < np.array([[1, 5], [16, 7], [2, 2], [0, 16]])[..., None]
    weights = np.asarray(weigh(params, STATES, masks))
    assert weights.shape == (4, 2, 3, 16)
    assert (weights[~np.broadcast_to(masks[:, :, None], weights.shape)] == 0).all()
    total = weights.sum(-1)
    assert (total[masks.any(-1)] > 0.01).all() and (total < 1).all()
    # A latent that sees no bucket but the nearest sees none but the last event.
    shut = np.zeros((3, 2, 4), np.float32) + [0, -1e9, -1e9, -1e9]
    params = trees.replace(params, {"layers/1/recency": shut.astype(np.float32)})
    np.testing.assert_array_equal(np.asarray(weigh(params, STATES, masks))[1, 0].nonzero()[1], [15] * 3)


def test_several_ends_of_one_history_equal_each_alone(resampler):
    """One of them without any event."""
    run, params = resampler
    prefixes = np.array([[1, 5], [16, 7], [2, 2], [0, 16]])
    masks = np.arange(16) < prefixes[..., None]
    graphdef, _ = trees.abstract(_create)
    together = jax.jit(lambda params, states: trees.merge(graphdef, params)(states, masks))(params, STATES)
    for end in (0, 1):
        np.testing.assert_allclose(together[:, end], run(params, STATES, masks[:, end]), atol=1e-6)


@pytest.mark.slow
def test_latents_separate_in_training():
    """Fresh latents move apart and their tokens with them; equal ones, without a recency of their own, never would.

    What is learned depends on the set of tokens, as in cross-attention, and asks no token for anything of its own.
    """
    config = dataclasses.replace(CONFIG, num_layers=1, recency_buckets=0)
    graphdef, params = trees.split(Resampler(config, rngs=nnx.Rngs(params=0)))
    equal = trees.replace(params, {"latents": np.repeat(params["latents"][:1], 3, axis=0)})
    wanted = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    mask = _mask(np.array([5, 16, 1, 9]), 16)

    def loss(params):
        tokens = trees.merge(graphdef, params)(jnp.asarray(STATES), mask[:, None])[:, 0]
        return jnp.mean((jax.nn.logsumexp(4 * tokens, axis=1) / 4 - wanted) ** 2), tokens

    @jax.jit
    def step(params):
        (value, tokens), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value, tokens

    def train(params):
        params, first, _ = step(params)
        for _ in range(100):
            params, last, tokens = step(params)
        return first - last, np.asarray(params["latents"]).std(0).mean(), np.asarray(tokens).std(1).mean()

    gain, latents, tokens = train(params)
    assert gain > 0.2
    assert latents > 3 * np.asarray(params["latents"]).std(0).mean()
    assert tokens > 0.2
    np.testing.assert_allclose(train(equal)[1:], 0, atol=1e-6)


def test_fresh_latents_look_over_many_time_scales():
    """With several recency buckets the first latent sees all events alike, the last one hardly any but the newest."""
    recency = np.asarray(Resampler(CONFIG, rngs=nnx.Rngs(params=0)).layers[0].recency[...])
    np.testing.assert_array_equal(recency[0], 0)
    assert (np.diff(recency[1:], axis=-1) < 0).all() and (np.diff(recency[:, :, 1:], axis=0) < 0).all()
    assert np.exp(recency[-1, 0, 1]) < 0.05
