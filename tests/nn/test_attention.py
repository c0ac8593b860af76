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
    attention,
    attention_weights,
)
from user_llm.nn.rotary import rope_frequencies, rotation
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


def test_soft_capped_scores_by_hand():
    """Scores 0 and 8 with a cap of 2 are 0 and 2 tanh(4); a hidden key stays hidden."""
    q, k = np.array([8.0, 0.0]).reshape(1, 1, 1, 2), np.array([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]).reshape(1, 1, 3, 2)
    v = np.array([[1.0, 0.0], [0.0, 1.0], [7.0, 7.0]]).reshape(1, 1, 3, 2)
    mask = np.array([[[True, True, False]]])
    out = attention(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), mask=mask, scale=1.0, softcap=2.0)
    second = np.exp(2 * np.tanh(4)) / (1 + np.exp(2 * np.tanh(4)))
    np.testing.assert_allclose(out[0, 0, 0], [1 - second, second], rtol=1e-6)
    weights = attention_weights(*(jnp.asarray(a, jnp.float32) for a in (q, k)), mask=mask, scale=1.0, softcap=2.0)
    np.testing.assert_allclose(weights[0, 0, 0], [1 - second, second, 0], rtol=1e-6)


def test_a_norm_over_all_heads_is_one_norm_of_the_whole():
    """Heads of other sizes keep their proportions, which a norm of each head would take away."""
    config = AttentionConfig(width=4, heads=2, kv_heads=1, head_dim=2, qk_norm=True, qk_norm_over_heads=True, norm_eps=0.0)
    graphdef, shapes = trees.abstract(lambda: Attention(config, rngs=nnx.Rngs(params=0)))
    assert (shapes["q_norm"]["scale"].shape, shapes["k_norm"]["scale"].shape) == ((4,), (2,))
    params = jax.tree.map(lambda like: np.ones(like.shape, np.float32), shapes)
    params["q"] = np.eye(4, dtype=np.float32).reshape(4, 2, 2)
    q = np.array([3.0, 3.0, 1.0, 1.0])  # 3 and 1 are the sizes of the heads; the mean square is 5
    x = jnp.asarray(np.stack([q, -2 * q])[None], jnp.float32)
    k = np.array([1.0, -1.0])[:, None] * np.ones(2)  # the sums 8 and -16, normed
    v = x[0].sum(-1)
    mask = causal_mask(np.ones((1, 2), bool))
    out, _ = trees.merge(graphdef, params)(x, mask=mask, rotate=None)
    expected = 0.0
    for head in (q[:2], q[2:]):
        scores = np.exp(-head / np.sqrt(5) @ k.T / np.sqrt(2))
        expected += 2 * (scores / scores.sum()) @ v
    np.testing.assert_allclose(out[0, 1], np.full(4, expected), rtol=1e-5)


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
