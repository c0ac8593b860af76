import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.attention import KVCache, cache_mask, causal_mask, segment_mask
from user_llm.nn.cross_attention import CrossAttentionConfig, UserKV
from user_llm.nn.transformer import BlockConfig, Stack

WIDTH, DEPTH = 16, 4
PLAIN = BlockConfig(width=WIDTH, heads=4, kv_heads=2, head_dim=8, mlp_width=24)
GATED = dataclasses.replace(PLAIN, residual_gate=True, qk_norm=True, activation="gelu")
CROSS = CrossAttentionConfig(user_width=6, every=2, heads=2, head_dim=4)


def _stack(block=PLAIN, **options):
    return Stack(block, DEPTH, rngs=nnx.Rngs(params=0), **options)


def _with_open_gates(stack):
    graphdef, params = trees.split(stack)
    flat = trees.flatten(params)
    opened = {k: jnp.full_like(v, 0.5) if k.startswith("cross/") and k.endswith("gate") else v for k, v in flat.items()}
    tree = {}
    for path, leaf in opened.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return trees.merge(graphdef, tree)


def _x(batch, length, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, length, WIDTH))


def _positions(batch, length):
    return jnp.broadcast_to(jnp.arange(length), (batch, length))


def _causal(stack, x, **options):
    batch, length, _ = x.shape
    mask = causal_mask(jnp.ones((batch, length), bool))
    return stack(x, mask=mask, positions=_positions(batch, length), **options)[0]


@pytest.mark.parametrize("block", [PLAIN, GATED], ids=["plain", "gated"])
def test_nothing_flows_backwards(block):
    stack, x = _stack(block), _x(1, 6)
    before = _causal(stack, x)
    after = _causal(stack, x.at[0, 3].add(1.0))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (jnp.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("block", [PLAIN, GATED], ids=["plain", "gated"])
def test_packed_segments_equal_one_row_per_segment(block):
    stack, x = _stack(block), _x(1, 8)
    packed, _ = stack(
        x,
        mask=segment_mask(jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])),
        positions=jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]),  # they start again with each segment
    )
    np.testing.assert_allclose(packed[:, :3], _causal(stack, x[:, :3]), atol=2e-6)
    np.testing.assert_allclose(packed[:, 3:7], _causal(stack, x[:, 3:7]), atol=2e-6)


def test_padding_on_the_right_changes_nothing():
    stack, x = _stack(), _x(2, 5)
    expected = _causal(stack, x)
    for length in (8, 16):
        padded = jnp.concatenate([x, _x(2, length - 5, seed=2)], axis=1)
        valid = jnp.broadcast_to(jnp.arange(length) < 5, (2, length))
        out, _ = stack(padded, mask=causal_mask(valid), positions=_positions(2, length))
        np.testing.assert_allclose(out[:, :5], expected, atol=2e-6)


@pytest.mark.parametrize("seat", ["after_attention", "before_block"])
def test_scan_equals_unroll_with_users_cache_and_dropout(seat):
    block = dataclasses.replace(PLAIN, dropout=0.3)
    cross = dataclasses.replace(CROSS, seat=seat)
    x, tokens = _x(2, 5), jax.random.normal(jax.random.key(3), (2, 3, 6))
    cache = KVCache(*(jnp.zeros((DEPTH, 2, 7, 2, 8)) for _ in range(2)))
    outputs = []
    for unroll in (False, True):
        stack = _with_open_gates(_stack(block, cross=cross, unroll=unroll))
        user = stack.user_kv(tokens, jnp.ones((2, 3), bool))
        positions = _positions(2, 5)
        outputs.append(
            stack(
                x, mask=cache_mask(positions, 7), positions=positions, cache=cache, user=user, key=jax.random.key(4)
            )
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *outputs)


def test_cached_steps_equal_the_whole_at_once():
    stack, x = _stack(), _x(2, 5)
    cache = KVCache(*(jnp.full((DEPTH, 2, 6, 2, 8), 7.0) for _ in range(2)))  # unwritten slots must not be seen
    steps = []
    for t in range(5):
        positions = jnp.full((2, 1), t)
        out, cache = stack(x[:, t : t + 1], mask=cache_mask(positions, 6), positions=positions, cache=cache)
        steps.append(out)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), _causal(stack, x), atol=2e-6)


def test_dropout_needs_a_key_and_differs_by_layer_and_key():
    dropped = _stack(dataclasses.replace(PLAIN, dropout=0.5))
    x = _x(1, 4)
    np.testing.assert_array_equal(_causal(dropped, x), _causal(_stack(), x))
    first, second = (_causal(dropped, x, key=jax.random.key(i)) for i in (0, 1))
    assert jnp.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, _causal(dropped, x, key=jax.random.key(0)))


def test_cross_attention_is_in_the_last_layer_of_each_group():
    """Layer by layer with the parts themselves, in both seats."""
    for seat in ("after_attention", "before_block"):
        stack = _with_open_gates(_stack(cross=dataclasses.replace(CROSS, seat=seat)))
        x, tokens, real = _x(1, 3), jax.random.normal(jax.random.key(3), (1, 2, 6)), jnp.ones((1, 2), bool)
        user = stack.user_kv(tokens, real)
        assert isinstance(user, UserKV) and user.k.shape == (2, 1, 2, 2, 4)
        out = _causal(stack, x, user=user)
        at = lambda module, i: nnx.merge(*(  # noqa: E731
            nnx.split(module)[0], jax.tree.map(lambda a, i=i: a[i], nnx.split(module)[1])
        ))
        mask, positions = causal_mask(jnp.ones((1, 3), bool)), _positions(1, 3)
        for i in range(DEPTH):
            block = at(stack.blocks, i)
            attend = (lambda x, i=i: at(stack.cross, i // 2)(x, user.k[i // 2], user.v[i // 2], real)) if i % 2 else None
            if attend and seat == "before_block":
                x = attend(x)
            x = x + block.attn(block.attn_norm(x), mask=mask, positions=positions)[0]
            if attend and seat == "after_attention":
                x = attend(x)
            x = x + block.mlp(block.mlp_norm(x))
        np.testing.assert_allclose(out, x, atol=5e-6)


def test_depth_that_is_no_multiple_of_every_is_refused():
    with pytest.raises(ValueError, match="every 3th of 4 layers"):
        _stack(cross=dataclasses.replace(CROSS, every=3))
