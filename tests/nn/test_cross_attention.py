import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.nn.cross_attention import CrossAttentionConfig, GatedCrossAttention

SEATS = ["after_attention", "before_block"]
CONFIG = CrossAttentionConfig(user_width=6, every=1, heads=2, head_dim=4)
WIDTH = 12


def _layer(seat, gate=0.5):
    config = dataclasses.replace(CONFIG, seat=seat)
    layer = GatedCrossAttention(config, WIDTH, 20, norm_eps=1e-6, rngs=nnx.Rngs(params=0))
    layer.gate[...] = jnp.asarray(gate)
    if seat == "before_block":
        layer.mlp_gate[...] = jnp.asarray(gate)
    return layer


def _inputs(users=3, tokens=4):
    text = jax.random.normal(jax.random.key(1), (users, 5, WIDTH))
    return text, jax.random.normal(jax.random.key(2), (users, tokens, CONFIG.user_width))


@pytest.mark.parametrize("seat", SEATS)
def test_a_user_without_tokens_changes_nothing(seat):
    layer, (text, tokens) = _layer(seat), _inputs()
    mask = jnp.array([[True] * 4, [False] * 4, [True, False, False, False]])
    out = layer(text, *layer.user_kv(tokens), mask)
    np.testing.assert_array_equal(out[1], text[1])
    assert (jnp.abs(out - text)[jnp.array([0, 2])].max(-1) > 1e-3).all()


@pytest.mark.parametrize("seat", SEATS)
def test_padding_among_user_tokens_changes_nothing(seat):
    layer, (text, tokens) = _layer(seat), _inputs()
    expected = layer(text, *layer.user_kv(tokens[:, :2]), jnp.ones((3, 2), bool))
    mask = jnp.broadcast_to(jnp.arange(4) < 2, (3, 4))
    np.testing.assert_allclose(layer(text, *layer.user_kv(tokens), mask), expected, atol=1e-6)


@pytest.mark.parametrize("seat", SEATS)
def test_each_row_attends_to_its_own_user(seat):
    layer, (text, tokens) = _layer(seat), _inputs()
    mask = jnp.ones((3, 4), bool)
    before = layer(text, *layer.user_kv(tokens), mask)
    after = layer(text, *layer.user_kv(tokens.at[1].add(1.0)), mask)
    np.testing.assert_array_equal(before[jnp.array([0, 2])], after[jnp.array([0, 2])])
    assert jnp.abs(before[1] - after[1]).max() > 1e-3


@pytest.mark.parametrize("seat", SEATS)
def test_closed_gates_change_nothing_and_alone_get_gradient(seat):
    layer, (text, tokens) = _layer(seat, gate=0.0), _inputs()
    mask = jnp.ones((3, 4), bool)
    np.testing.assert_array_equal(layer(text, *layer.user_kv(tokens), mask), text)

    graphdef, params = nnx.split(layer)

    def loss(params):
        layer = nnx.merge(graphdef, params)
        return (layer(text, *layer.user_kv(tokens), mask) ** 3).sum()

    grads = nnx.to_pure_dict(jax.grad(loss)(params))
    gates = {"gate", "mlp_gate"} & set(grads)
    assert len(gates) == (2 if seat == "before_block" else 1)
    for name, grad in grads.items():
        flat = jnp.concatenate([g.ravel() for g in jax.tree.leaves(grad)])
        assert (flat != 0).all() if name in gates else (flat == 0).all(), name


def test_a_starting_layer_is_closed_but_its_output_projection_is_not():
    layer = GatedCrossAttention(CONFIG, WIDTH, 20, norm_eps=1e-6, rngs=nnx.Rngs(params=0))
    assert layer.gate[...] == 0 and jnp.abs(layer.o[...]).min() > 0


def test_unknown_seat_is_refused():
    with pytest.raises(ValueError, match="'middle': choose after_attention or before_block"):
        dataclasses.replace(CONFIG, seat="middle")
