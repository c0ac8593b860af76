import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from user_llm.ahead.flops import count_flops
from user_llm.common import trees
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import CrossAttentionConfig, UserKV
from user_llm.nn.experts import ExpertsConfig
from user_llm.nn.transformer import BlockConfig, Stack, unstack
from user_llm.nn.visibility import cache_mask, causal_mask, segment_mask

WIDTH, DEPTH = 16, 5  # cross-attention in layers 1 and 3; layer 4 fills no group
PLAIN = BlockConfig(width=WIDTH, heads=4, kv_heads=2, head_dim=8, mlp_width=24)
GATED = dataclasses.replace(PLAIN, residual_gate=True, qk_norm=True, activation="gelu")
WINDOWED = dataclasses.replace(PLAIN, window=2, window_rope_theta=100.0, post_norms=True, norm_offset=1.0, qkv_bias=True)
LATER = BlockConfig(
    width=WIDTH, heads=4, kv_heads=2, head_dim=8, mlp_width=24, pre_norms=False, post_norms=True, qk_norm=True,
    qk_norm_over_heads=True, attn_softcap=0.5, residual_scale=0.5, rotary_share=0.5, experts=ExpertsConfig(4, 2, True),
)  # fmt: skip
STILL = {"unrotated": (False, True, False, False, True)}  # of layers
DROPPED = dataclasses.replace(PLAIN, dropout=0.5)
CROSS = CrossAttentionConfig(user_width=6, every=2, heads=2, head_dim=4)


@pytest.fixture(scope="module")
def stack(drawn):
    """Return `make(block, depth, **options)`: a stack as a compiled function of its inputs; the same seed draws all."""

    @functools.cache
    def make(block=PLAIN, depth=DEPTH, **options):
        graphdef, params = drawn(lambda: Stack(block, depth, rngs=nnx.Rngs(params=0), **options))
        return jax.jit(lambda *args, **kwargs: trees.merge(graphdef, params)(*args, **kwargs))

    return make


def _x(batch, length, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, length, WIDTH)).astype(np.float32)


def _causal(length, batch=1):
    """Mask and positions of full rows."""
    return {
        "mask": causal_mask(np.ones((batch, length), bool)),
        "positions": np.broadcast_to(np.arange(length), (batch, length)),
    }


def _assert_packed_equals_alone(run, compared=(slice(0, 3), slice(3, 7))):
    """Two segments of one row that ends in padding, against rows that each hold one of them and nothing else."""
    x = _x(1, 8)
    segments, positions = np.array([[1, 1, 1, 2, 2, 2, 2, 0]]), np.array([[0, 1, 2, 0, 1, 2, 3, 0]])
    packed = np.asarray(run(x, mask=segment_mask(segments), positions=positions)[0])  # positions start again with each segment
    for segment in compared:
        alone, _ = run(x[:, segment], **_causal(segment.stop - segment.start))
        np.testing.assert_allclose(packed[:, segment], alone, atol=5e-6)


@pytest.mark.parametrize("block", [PLAIN, GATED], ids=["plain", "gated"])
def test_nothing_flows_backwards(stack, block):
    x = _x(1, 8)
    changed = x.copy()
    changed[0, 3] += 1
    before, after = (np.asarray(stack(block)(inputs, **_causal(8))[0]) for inputs in (x, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("block", [PLAIN, GATED, LATER], ids=["plain", "gated", "later"])
def test_packed_segments_equal_one_row_per_segment(stack, block):
    _assert_packed_equals_alone(stack(block, **(STILL if block is LATER else {})))


def test_padding_on_the_right_changes_nothing(stack):
    x = _x(1, 5)
    expected, _ = stack()(x, **_causal(5))
    for length in (8, 16):
        padded = np.concatenate([x, _x(1, length - 5, seed=2)], axis=1)
        mask = causal_mask(np.arange(length)[None] < 5)
        out, _ = stack()(padded, mask=mask, positions=_causal(length)["positions"])
        np.testing.assert_allclose(np.asarray(out)[:, :5], expected, atol=5e-6)


@pytest.mark.parametrize("seat", ["after_attention", pytest.param("before_block", marks=pytest.mark.slow)])
def test_scan_equals_unroll_with_users_cache_and_dropout(stack, seat):
    cross = dataclasses.replace(CROSS, seat=seat)
    cache = KVCache(*[np.zeros((DEPTH, 1, 2, 7, 8), np.float32)] * 2)
    rng = np.random.default_rng(3)
    user = UserKV(*rng.normal(size=(2, DEPTH // 2, 1, 2, 3, 4)).astype(np.float32), np.ones((1, 3), bool))
    positions = _causal(5)["positions"]
    scanned, unrolled = (
        stack(DROPPED, cross=cross, unroll=unroll)(
            _x(1, 5), mask=cache_mask(positions, 7), positions=positions, cache=cache, user=user, key=jax.random.key(4)
        )
        for unroll in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), scanned, unrolled)


@pytest.mark.parametrize("block", [PLAIN, LATER], ids=["plain", "later"])
def test_cached_steps_equal_the_whole_at_once(stack, block):
    x, run = _x(2, 5), stack(block, **(STILL if block is LATER else {}))
    cache = KVCache(*[np.full((DEPTH, 2, 2, 6, 8), 7, np.float32)] * 2)  # unwritten slots must not be seen
    steps = []
    for t in range(5):
        positions = np.full((2, 1), t)
        out, cache = run(x[:, t : t + 1], mask=cache_mask(positions, 6), positions=positions, cache=cache)
        steps.append(out)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), run(x, **_causal(5, 2))[0], atol=5e-6)


def test_layers_without_rotary_positions_do_not_know_positions(stack):
    x, mask = _x(1, 5), _causal(5)["mask"]
    of = lambda unrotated, step: np.asarray(  # noqa: E731
        stack(unrotated=unrotated)(x, mask=mask, positions=step * np.arange(5)[None])[0]
    )
    every, some = (True,) * DEPTH, STILL["unrotated"]
    np.testing.assert_array_equal(of(every, 1), of(every, 2))
    assert np.abs(of(some, 1) - of(some, 2)).max() > 1e-3
    assert np.abs(of(some, 1) - stack()(x, **_causal(5))[0]).max() > 1e-3
    np.testing.assert_allclose(of(some, 1), stack(unrotated=some, unroll=True)(x, **_causal(5))[0], atol=5e-6)
    with pytest.raises(ValueError, match="5 layers need as many marks of who has no rotary positions"):
        Stack(PLAIN, DEPTH, unrotated=(True,), rngs=nnx.Rngs(params=0))


def test_dropout_needs_a_key_and_differs_by_key(stack):
    x = _x(1, 8)
    run = lambda block, **options: np.asarray(stack(block)(x, **_causal(8), **options)[0])  # noqa: E731
    np.testing.assert_array_equal(run(DROPPED), run(PLAIN))
    first, second = (run(DROPPED, key=jax.random.key(i)) for i in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, run(DROPPED, key=jax.random.key(0)))


@pytest.mark.parametrize("seat", ["after_attention", pytest.param("before_block", marks=pytest.mark.slow)])
def test_cross_attention_sits_in_the_last_layer_of_each_group(drawn, seat):
    """The stack's own parts, put together here layer by layer."""
    cross = dataclasses.replace(CROSS, seat=seat)
    graphdef, params = drawn(lambda: Stack(PLAIN, DEPTH, cross=cross, rngs=nnx.Rngs(params=0)))
    x, tokens = _x(1, 3), jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 6)), jnp.float32)
    real = np.ones((1, 2), bool)

    def layer(module, i):
        layer_def, layer_params = nnx.split(module)
        return nnx.merge(layer_def, jax.tree.map(lambda a: a[i], layer_params))

    @jax.jit
    def by_parts(params, x):
        stack = trees.merge(graphdef, params)
        for i in range(DEPTH):
            block, attend = layer(stack.blocks, i), lambda x: x
            if i in (1, 3):
                module = layer(stack.cross, i // 2)
                attend = lambda x, m=module: m(x, *m.user_kv(tokens), real)  # noqa: E731
            if seat == "before_block":
                x, attend = attend(x), lambda x: x
            view, _ = stack.views(**_causal(3), key_positions=_causal(3)["positions"])
            x = x + block.attn(block.attn_norm(x), mask=view.mask, rotate=view.rotate)[0]
            x = attend(x)
            x = x + block.mlp(block.mlp_norm(x))
        return x

    @jax.jit
    def at_once(params, x):
        stack = trees.merge(graphdef, params)
        return stack(x, user=stack.user_kv(tokens, real), **_causal(3))[0]

    np.testing.assert_allclose(at_once(params, x), by_parts(params, x), atol=1e-5)


@pytest.mark.parametrize("every", [0, 6])
def test_cross_attention_in_no_layer_is_refused(every):
    cross = dataclasses.replace(CROSS, every=every)
    with pytest.raises(ValueError, match=f"every {every}th of 5 layers: choose from 1 to the depth"):
        Stack(PLAIN, DEPTH, cross=cross, rngs=nnx.Rngs(params=0))


# --- windows ---


def test_a_layer_with_a_window_sees_itself_and_what_is_near(drawn):
    """One windowed layer of window 2: a change reaches the next position and no further; through four it reaches four."""
    graphdef, params = drawn(lambda: Stack(WINDOWED, 1, windowed=(True,), rngs=nnx.Rngs(params=0)))
    one = jax.jit(lambda x: trees.merge(graphdef, params)(x, **_causal(8))[0])
    graphdef4, params4 = drawn(lambda: Stack(WINDOWED, 4, windowed=(True,) * 4, rngs=nnx.Rngs(params=0)))
    four = jax.jit(lambda x: trees.merge(graphdef4, params4)(x, **_causal(8))[0])
    x = _x(1, 8)
    changed = x.copy()
    changed[0, 1] += 1
    for run, reach in ((one, 1), (four, 4)):
        moved = np.abs(np.asarray(run(x)) - np.asarray(run(changed)))[0].max(-1) > 1e-5
        np.testing.assert_array_equal(moved, [1 <= t <= 1 + reach for t in range(8)])


MIXED = {"windowed": (True, True, False, True, False)}


def test_layers_of_both_kinds_are_run_in_their_order(drawn):
    """The stack's own blocks, put together here with each layer's own mask and theta."""
    graphdef, params = drawn(lambda: Stack(WINDOWED, DEPTH, **MIXED, rngs=nnx.Rngs(params=0)))
    x = _x(2, 6)

    @jax.jit
    def by_parts(x):
        stack = trees.merge(graphdef, params)
        inputs = _causal(6, 2)
        full, near = stack.views(**inputs, key_positions=inputs["positions"])
        block_def, blocks = nnx.split(stack.blocks)
        for i, windowed in enumerate(MIXED["windowed"]):
            x, _ = nnx.merge(block_def, jax.tree.map(lambda a, i=i: a[i], blocks))(x, near if windowed else full)
        return x

    at_once = jax.jit(lambda x: trees.merge(graphdef, params)(x, **_causal(6, 2))[0])
    np.testing.assert_allclose(at_once(x), by_parts(x), atol=1e-5)


@pytest.mark.parametrize("unroll", [False, True])
def test_windows_and_a_cache_together_equal_the_whole_at_once(stack, unroll):
    """Also where slots are not positions: the windows go by position."""
    x, run = _x(1, 7), stack(WINDOWED, unroll=unroll, **MIXED)
    expected = np.asarray(run(x, **_causal(7))[0])
    slot_of = np.array([[8, 2, 0, 5, 1, 7, 3]])
    key_positions = np.full((1, 9), 100)
    key_positions[0, slot_of[0]] = np.arange(7)
    cache = KVCache(*[np.full((DEPTH, 1, 2, 9, 8), 7, np.float32)] * 2)
    for t in range(7):
        mask = (key_positions <= t)[None]
        out, cache = run(
            x[:, t : t + 1], mask=mask, positions=np.array([[t]]), key_positions=key_positions, cache=cache,
            slots=slot_of[:, t : t + 1],
        )  # fmt: skip
        np.testing.assert_allclose(np.asarray(out)[0, 0], expected[0, t], rtol=2e-6, atol=2e-5)


def test_windows_stay_within_packed_segments(stack):
    _assert_packed_equals_alone(stack(WINDOWED, depth=4, windowed=(True, True, False, True)), compared=(slice(3, 7),))


@pytest.mark.parametrize("windowed", [(True, False), (True,) * DEPTH])
def test_windows_that_do_not_fit_the_stack_are_refused(windowed):
    block = PLAIN if len(windowed) == DEPTH else WINDOWED
    with pytest.raises(ValueError, match="5 layers need as many marks"):
        Stack(block, DEPTH, windowed=windowed, rngs=nnx.Rngs(params=0))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"cross": CROSS}, {"unroll": True}], ids=["scanned", "cross", "unrolled"])
def test_computing_again_changes_no_gradient_and_costs_flops(drawn, options):
    """`full` computes every group's forward pass twice: four products where there were three."""
    x, tokens = (jnp.asarray(a, jnp.float32) for a in (_x(2, 6), np.random.default_rng(2).normal(size=(2, 3, 6))))

    def gradients(remat):
        graphdef, params = drawn(lambda: Stack(PLAIN, 4, remat=remat, rngs=nnx.Rngs(params=0), **options))

        def loss(params):
            stack = trees.merge(graphdef, params)
            kv = {"user": stack.user_kv(tokens, np.ones((2, 3), bool))} if "cross" in options else {}
            return jnp.sum(stack(x, **_causal(6, 2), **kv)[0] ** 2)

        traced = jax.jit(jax.grad(loss)).trace(params)
        return count_flops(traced.jaxpr.jaxpr), jax.jit(jax.grad(loss))(params)

    plain, wanted = gradients("none")
    flops = {}
    for remat in ("dots", "full"):
        flops[remat], found = gradients(remat)
        for grad, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(grad, like, rtol=0, atol=1e-5 * np.abs(like).max())
    assert plain <= flops["dots"] < flops["full"]
    assert 1.2 < flops["full"] / plain < 1.4


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="Unknown remat 'some': choose one of none, dots, full"):
        Stack(PLAIN, 2, remat="some", rngs=nnx.Rngs(params=0))


def test_unstacked_parameters_get_their_own_gradients_and_no_sum_is_made():
    stacked = {"w": jnp.arange(12.0).reshape(3, 4)}
    loss = lambda params: sum(n * jnp.sum(part["w"] ** 2) for n, part in enumerate(unstack(params, 3), 1))  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(stacked)["w"], 2 * np.array([[1], [2], [3]]) * stacked["w"])

    def primitives(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for inner in jaxprs_in_params(equation.params):
                yield from primitives(inner)

    made = set(primitives(jax.make_jaxpr(jax.grad(loss))(stacked).jaxpr))
    assert "concatenate" in made and not made & {"pad", "add_any"}
