import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.attention import (
    Attention,
    AttentionConfig,
    KVCache,
    RopeScaling,
    apply_rope,
    attention,
    attention_weights,
    rope_frequencies,
    rotation,
)
from user_llm.nn.visibility import cache_mask, causal_mask, segment_mask

attend = jax.jit(attention, static_argnames="scale")


@functools.partial(jax.jit, static_argnames="of")
def _gradients(of, q, k, v, mask):
    """Of the sum of o + o ** 2 over all numbers o that `of` returns: where o is 0 it still asks how o would change."""

    def loss(*qkv):
        out = of(*qkv, mask=mask)
        return (out + out**2).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


@jax.jit
def _causal(valid):
    return causal_mask(valid).drawn(valid.shape[1])


def _qkv(queries=5, keys=5, heads=4, kv_heads=2, dim=8, batch=2):
    shapes = (batch, queries, heads, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@jax.jit
def _textbook(q, k, v, mask):
    """Attention with repeated key/value heads and jax.nn.softmax; needs at least one visible key."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[1], axis=1) for a in (k, v))
    logits = jnp.einsum("BTNH,BNSH->BNTS", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BNSH->BTNH", weights, v)


def test_answer_by_hand():
    # One head of width 1: the logits are 0 and ln 3, hence the weights 1/4 and 3/4.
    q, k = np.ones((1, 1, 1, 1), np.float32), np.array([0.0, np.log(3)], np.float32).reshape(1, 1, 2, 1)
    v = np.array([4.0, 8.0], np.float32).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(attend(q, k, v).item(), 7.0, rtol=1e-6)
    only_first = np.array([[[True, False]]])
    assert attend(q, k, v, mask=only_first).item() == 4.0
    # A bias of ln 3 on the first key makes the logits equal.
    bias = np.array([np.log(3), 0.0], np.float32).reshape(1, 1, 1, 2)
    np.testing.assert_allclose(attend(q, k, v, bias=bias).item(), 6.0, rtol=1e-6)


def test_query_without_visible_key_gets_exactly_zero():
    q, k, v = _qkv()
    mask = np.ones((2, 5, 5), bool)
    mask[0, 2] = mask[1] = False
    out = np.asarray(attend(q, k, v, mask=mask))
    assert (out[0, 2] == 0).all() and (out[1] == 0).all()
    assert (out[0, 3] != 0).all()
    grads = [np.asarray(g) for g in _gradients(attention, q, k, v, mask)]
    assert all(np.isfinite(g).all() for g in grads)
    assert all((g[1] == 0).all() for g in grads)


def test_values_and_gradients_equal_the_textbook():
    # Under a causal mask the first query sees one key: there the softmax's sum is exactly 1.
    q, k, v = _qkv()
    mask = _causal(np.ones((2, 5), bool))
    np.testing.assert_allclose(attend(q, k, v, mask=mask), _textbook(q, k, v, mask), atol=1e-6)
    ours, theirs = (_gradients(of, q, k, v, mask) for of in (attention, _textbook))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_weights_are_those_that_values_are_summed_by():
    q, k, v = _qkv(heads=4, kv_heads=2)
    mask = np.array(_causal(np.ones((2, 5), bool)))
    mask[0, 2] = False  # sees nothing
    how = {"mask": mask, "bias": np.random.default_rng(1).normal(size=(1, 4, 1, 5)).astype(np.float32), "scale": 0.3}
    weights = np.asarray(jax.jit(attention_weights, static_argnames="scale")(q, k, **how))
    found = np.einsum("BNTS,BNSH->BTNH", weights, v.repeat(2, axis=1))
    np.testing.assert_allclose(found, attend(q, k, v, **how), atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1)[0, :, [0, 2]], [[1] * 4, [0] * 4], atol=1e-6)


def test_softmax_is_float32_in_bfloat16():
    q, k, v = (a.astype(jnp.bfloat16) for a in _qkv())
    mask = _causal(np.ones((2, 5), bool))
    out = attend(q, k, v, mask=mask)
    assert out.dtype == jnp.bfloat16
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    np.testing.assert_allclose(out.astype(np.float32), _textbook(*wide, mask), atol=0.03)


def _drawn(*rows):
    return np.array([[c == "1" for c in row.split()] for row in rows])[None]


def test_masks_are_as_drawn():
    expected = _drawn("1 . . .", "1 1 . .", "1 1 1 .", ". . . .")
    np.testing.assert_array_equal(causal_mask(np.array([[True, True, True, False]])).drawn(4), expected)
    expected = _drawn("1 . . . .", "1 1 . . .", ". . 1 . .", ". . 1 1 .", ". . . . .")
    np.testing.assert_array_equal(segment_mask(np.array([[1, 1, 2, 2, 0]])).drawn(5), expected)
    expected = _drawn("1 1 . . .", "1 1 . . .", ". . 1 1 .", ". . 1 1 .", ". . . . .")
    np.testing.assert_array_equal(segment_mask(np.array([[1, 1, 2, 2, 0]]), causal=False).drawn(5), expected)
    expected = _drawn("1 1 1 . .", "1 . . . .")
    np.testing.assert_array_equal(cache_mask(np.array([[2, 0]]), 5), expected)


def test_rope_turns_by_position_times_frequency_and_scores_by_distance():
    turn = jax.jit(lambda x, at, frequencies: apply_rope(x, rotation(at, frequencies)))
    frequencies = rope_frequencies(4, 100.0)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-6)
    x = np.array([1.0, 1.0, 0.0, 0.0], np.float32).reshape(1, 1, 1, 4)  # pairs (0, 2) and (1, 3)
    turned = np.asarray(turn(x, np.array([[3]]), frequencies))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)], rtol=1e-5)

    q, k, _ = _qkv(queries=1, keys=1, heads=1, kv_heads=1, batch=1)
    frequencies = rope_frequencies(8, 10_000.0)

    def score(at_q, at_k):
        return np.sum(np.asarray(turn(q, np.array([[at_q]]), frequencies)) * turn(k, np.array([[at_k]]), frequencies))

    np.testing.assert_allclose(score(7, 4), score(103, 100), rtol=1e-4)
    assert abs(score(7, 4) - score(7, 5)) > 1e-3


def test_scaled_rotary_frequencies_by_hand():
    plain = rope_frequencies(8, 10_000.0)  # 1, 0.1, 0.01, 0.001
    np.testing.assert_allclose(rope_frequencies(8, 10_000.0, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-6)
    # Within 628 positions they turn some 100, 10, 1 and 0.1 times: one is kept, one is kept in part, and two are divided.
    scaling = RopeScaling("llama3", 4.0, low_freq_factor=1.0, high_freq_factor=21.0, original_length=628)
    kept = (62.8 / (2 * np.pi) - 1) / (21 - 1)
    expected = plain * np.array([1, kept + (1 - kept) / 4, 1 / 4, 1 / 4])
    np.testing.assert_allclose(rope_frequencies(8, 10_000.0, scaling), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="Unknown scaling 'yarn'"):
        RopeScaling("yarn", 4.0)


def test_cache_write_puts_each_row_at_its_own_slots():
    cache = KVCache(jnp.zeros((2, 2, 1, 4, 1)), jnp.zeros((2, 2, 1, 4, 1)))
    k = jnp.arange(1.0, 5.0).reshape(2, 1, 2, 1)
    cache = cache.write(1, k, -k, jnp.array([[0, 1], [3, 2]]))
    np.testing.assert_array_equal(cache.k[1, :, 0, :, 0], [[1, 2, 0, 0], [0, 0, 4, 3]])
    assert not cache.k[0].any()
    np.testing.assert_array_equal(cache.v, -cache.k)


def test_slots_of_the_cache_are_free_of_positions(drawn):
    config = AttentionConfig(width=16, heads=4, kv_heads=2, head_dim=8)
    graphdef, params = drawn(lambda: Attention(config, rngs=nnx.Rngs(params=0)))
    run = jax.jit(lambda *args, **kwargs: trees.merge(graphdef, params)(*args, **kwargs)[0])
    x = np.random.default_rng(1).normal(size=(1, 3, 16)).astype(np.float32)
    turn = rotation(np.arange(3)[None], rope_frequencies(8, 10_000.0))
    expected = run(x, mask=causal_mask(np.ones((1, 3), bool)), rotate=turn)
    slots = np.array([[5, 0, 3]])
    mask = _drawn(". . . . . 1", "1 . . . . 1", "1 . . 1 . 1")
    cache = KVCache(*[np.full((1, 1, 2, 6, 8), 9, np.float32)] * 2)
    out = run(x, mask=mask, rotate=turn, cache=cache, slots=slots)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_uneven_head_groups_are_refused():
    with pytest.raises(ValueError, match="4 heads cannot be shared evenly by 3"):
        Attention(AttentionConfig(width=16, heads=4, kv_heads=3, head_dim=8), rngs=nnx.Rngs(params=0))
