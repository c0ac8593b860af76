import dataclasses
import functools

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
DROPPED = dataclasses.replace(PLAIN, dropout=0.5)
CROSS = CrossAttentionConfig(user_width=6, every=2, heads=2, head_dim=4)


@pytest.fixture(scope="module")
def stack(drawn):
    """Return `make(block, **options)`: a stack as a compiled function of its inputs; the same seed draws all."""

    @functools.cache
    def make(block=PLAIN, **options):
        graphdef, params = drawn(lambda: Stack(block, DEPTH, rngs=nnx.Rngs(params=0), **options))
        return jax.jit(lambda *args, **kwargs: trees.merge(graphdef, params)(*args, **kwargs))

    return make


def _x(batch, length, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, length, WIDTH)).astype(np.float32)


def _causal(length, batch=1):
    """Mask and positions of full rows."""
    return {
        "mask": causal_mask(jnp.ones((batch, length), bool)),
        "positions": jnp.broadcast_to(jnp.arange(length), (batch, length)),
    }


@pytest.mark.parametrize("block", [PLAIN, GATED], ids=["plain", "gated"])
def test_nothing_flows_backwards(stack, block):
    x = _x(1, 6)
    changed = x.copy()
    changed[0, 3] += 1
    before, after = (np.asarray(stack(block)(inputs, **_causal(6))[0]) for inputs in (x, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("block", [PLAIN, GATED], ids=["plain", "gated"])
def test_packed_segments_equal_one_row_per_segment(stack, block):
    run, x = stack(block), _x(1, 8)
    packed, _ = run(
        x,
        mask=segment_mask(jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])),
        positions=np.array([[0, 1, 2, 0, 1, 2, 3, 0]]),  # they start again with each segment
    )
    np.testing.assert_allclose(packed[:, :3], run(x[:, :3], **_causal(3))[0], atol=5e-6)
    np.testing.assert_allclose(packed[:, 3:7], run(x[:, 3:7], **_causal(4))[0], atol=5e-6)


def test_padding_on_the_right_changes_nothing(stack):
    x = _x(1, 5)
    expected, _ = stack()(x, **_causal(5))
    for length in (8, 16):
        padded = np.concatenate([x, _x(1, length - 5, seed=2)], axis=1)
        mask = causal_mask(jnp.arange(length)[None] < 5)
        out, _ = stack()(padded, mask=mask, positions=_causal(length)["positions"])
        np.testing.assert_allclose(out[:, :5], expected, atol=5e-6)


@pytest.mark.parametrize("seat", ["after_attention", "before_block"])
def test_scan_equals_unroll_with_users_cache_and_dropout(stack, seat):
    cross = dataclasses.replace(CROSS, seat=seat)
    cache = KVCache(*(jnp.zeros((DEPTH, 1, 7, 2, 8)) for _ in range(2)))
    rng = np.random.default_rng(3)
    user = UserKV(*rng.normal(size=(2, DEPTH // 2, 1, 3, 2, 4)).astype(np.float32), np.ones((1, 3), bool))
    positions = _causal(5)["positions"]
    scanned, unrolled = (
        stack(DROPPED, cross=cross, unroll=unroll)(
            _x(1, 5), mask=cache_mask(positions, 7), positions=positions, cache=cache, user=user, key=jax.random.key(4)
        )
        for unroll in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), scanned, unrolled)


def test_cached_steps_equal_the_whole_at_once(stack):
    x = _x(2, 5)
    cache = KVCache(*(jnp.full((DEPTH, 2, 6, 2, 8), 7.0) for _ in range(2)))  # unwritten slots must not be seen
    steps = []
    for t in range(5):
        positions = jnp.full((2, 1), t)
        out, cache = stack()(x[:, t : t + 1], mask=cache_mask(positions, 6), positions=positions, cache=cache)
        steps.append(out)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), stack()(x, **_causal(5, 2))[0], atol=5e-6)


def test_dropout_needs_a_key_and_differs_by_key(stack):
    x = _x(1, 4)
    run = lambda block, **options: np.asarray(stack(block)(x, **_causal(4), **options)[0])  # noqa: E731
    np.testing.assert_array_equal(run(DROPPED), run(PLAIN))
    first, second = (run(DROPPED, key=jax.random.key(i)) for i in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, run(DROPPED, key=jax.random.key(0)))


@pytest.mark.parametrize("seat", ["after_attention", "before_block"])
def test_cross_attention_sits_in_the_last_layer_of_each_group(drawn, seat):
    """The stack's own parts, put together here layer by layer."""
    cross = dataclasses.replace(CROSS, seat=seat)
    graphdef, params = drawn(lambda: Stack(PLAIN, DEPTH, cross=cross, rngs=nnx.Rngs(params=0)))
    x, tokens = _x(1, 3), jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 6)), jnp.float32)
    real = jnp.ones((1, 2), bool)

    def layer(module, i):
        layer_def, layer_params = nnx.split(module)
        return nnx.merge(layer_def, jax.tree.map(lambda a: a[i], layer_params))

    @jax.jit
    def by_parts(params, x):
        stack = trees.merge(graphdef, params)
        for i in range(DEPTH):
            block, attend = layer(stack.blocks, i), lambda x: x
            if i % 2 == 1:
                module = layer(stack.cross, i // 2)
                attend = lambda x, m=module: m(x, *m.user_kv(tokens), real)  # noqa: E731
            if seat == "before_block":
                x, attend = attend(x), lambda x: x
            x = x + block.attn(block.attn_norm(x), **_causal(3))[0]
            x = attend(x)
            x = x + block.mlp(block.mlp_norm(x))
        return x

    @jax.jit
    def at_once(params, x):
        stack = trees.merge(graphdef, params)
        return stack(x, user=stack.user_kv(tokens, real), **_causal(3))[0]

    np.testing.assert_allclose(at_once(params, x), by_parts(params, x), atol=1e-5)


def test_depth_that_is_no_multiple_of_every_is_refused():
    cross = dataclasses.replace(CROSS, every=3)
    with pytest.raises(ValueError, match="every 3th of 4 layers"):
        Stack(PLAIN, DEPTH, cross=cross, rngs=nnx.Rngs(params=0))
