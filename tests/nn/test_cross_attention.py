import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.cross_attention import CrossAttentionConfig, GatedCrossAttention

CONFIG = CrossAttentionConfig(user_width=6, every=1, heads=2, head_dim=4)
WIDTH = 12
SOME = np.array([[True] * 4, [False] * 4, [True, False, False, False]])
ALL = np.ones((3, 4), bool)

_rng = np.random.default_rng(0)
TEXT = jnp.asarray(_rng.normal(size=(3, 5, WIDTH)).astype(np.float32))
TOKENS = _rng.normal(size=(3, 4, CONFIG.user_width)).astype(np.float32)


def _create(seat, recency_buckets=0):
    config = dataclasses.replace(CONFIG, seat=seat, recency_buckets=recency_buckets)
    return lambda: GatedCrossAttention(config, WIDTH, 20, norm_eps=1e-6, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module", params=[("after_attention",), ("before_block",), ("after_attention", 3)])
def layer(request, drawn):
    """A layer as (compiled function of params, tokens, mask; params)."""
    graphdef, params = drawn(_create(*request.param))

    @jax.jit
    def run(params, tokens, mask):
        module = trees.merge(graphdef, params)
        return module(TEXT, *module.user_kv(tokens), mask)

    return run, params


def test_a_user_without_tokens_changes_nothing(layer):
    run, params = layer
    out = np.asarray(run(params, TOKENS, SOME))
    np.testing.assert_array_equal(out[1], TEXT[1])
    assert (np.abs(out - TEXT)[[0, 2]].max(-1) > 1e-3).all()


def test_padding_among_user_tokens_changes_nothing(layer):
    run, params = layer
    padded = run(params, TOKENS, ALL & (np.arange(4) < 2))
    np.testing.assert_allclose(padded, run(params, TOKENS[:, :2], ALL[:, :2]), atol=2e-6)


def test_each_row_attends_to_its_own_user(layer):
    run, params = layer
    changed = TOKENS.copy()
    changed[1] += 1
    before, after = (np.asarray(run(params, tokens, ALL)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_closed_gates_change_nothing_and_alone_get_gradient(layer):
    run, params = layer
    gates = {"gate", "mlp_gate"} & set(params)
    closed = {**params, **{name: np.zeros((), np.float32) for name in gates}}
    np.testing.assert_array_equal(run(closed, TOKENS, ALL), TEXT)
    grads = jax.jit(jax.grad(lambda params: (run(params, TOKENS, ALL) ** 3).sum()))(closed)
    assert len(gates) == (2 if "mlp" in params else 1)
    for path, grad in trees.flatten(grads).items():
        assert (np.asarray(grad) != 0).all() if path in gates else (np.asarray(grad) == 0).all(), path


def test_a_new_layer_is_closed_but_its_output_projection_is_not():
    params = trees.split(_create("after_attention")())[1]
    assert params["gate"] == 0 and np.abs(params["o"]).min() > 0


def test_recency_is_a_bias_over_how_far_back_an_event_lies(drawn):
    """Tokens that are all alike but for their values: the weights are softmax(bias), counted back from each row's last event."""
    graphdef, params = drawn(_create("after_attention", 3))
    biases = np.log([[4.0, 2.0, 1.0], [1.0, 1.0, 6.0]])
    params |= {"recency": biases.astype(np.float32), "gate": np.float32(np.arctanh(0.5))}
    values = _rng.normal(size=(3, 2, 4, 4)).astype(np.float32)
    mask = np.arange(4) < np.array([4, 3, 0])[:, None]
    attend = jax.jit(lambda params, k, v: trees.merge(graphdef, params)(TEXT, k, v, mask))
    out = attend(params, np.ones_like(values), values)
    weights = np.zeros((3, 2, 4))
    weights[0] = np.array([[1, 2, 2, 4], [6, 1, 1, 1]]) / 9  # of distances 3, 2, 1, 0 in buckets 2, 1, 1, 0
    weights[1, 0, :3], weights[1, 1, :3] = np.array([2, 2, 4]) / 8, np.array([1, 1, 1]) / 3
    heads = np.einsum("BNM,BNMH->BNH", weights, values)
    expected = TEXT + 0.5 * np.einsum("BNH,NHD->BD", heads, params["o"])[:, None]
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_unknown_seat_is_refused():
    with pytest.raises(ValueError, match="'middle': choose after_attention or before_block"):
        dataclasses.replace(CONFIG, seat="middle")
