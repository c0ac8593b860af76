import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.nn.visibility import cache_mask, causal_mask

BLOCK = BlockConfig(width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24)
BARE = DecoderConfig(vocab_size=11, num_layers=2, block=BLOCK, tie_embeddings=True)
SEATS = ["after_attention", pytest.param("before_block", marks=pytest.mark.slow)]
IDS = np.random.default_rng(0).integers(0, 11, (3, 7))
LENGTHS = np.array([7, 3, 5])
# Users with three, no and one token.
TOKENS = np.random.default_rng(1).normal(size=(3, 3, 6)).astype(np.float32)
REAL = np.array([[True, True, True], [False, False, False], [True, False, False]])


def _config(seat, **fields):
    cross = CrossAttentionConfig(user_width=6, every=2, heads=2, head_dim=4, seat=seat)
    return dataclasses.replace(BARE, cross=cross, **fields)


def _create(config):
    return lambda: Decoder(config, rngs=nnx.Rngs(params=0))


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, params, ids, lengths, tokens=None, real=None):
    """Logits at all positions of right-padded rows, in one forward pass without a cache."""
    decoder = trees.merge(graphdef, params)
    valid = jnp.arange(ids.shape[1]) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    user = None if tokens is None else decoder.user_kv(tokens, real)
    hidden, _ = decoder(decoder.embed_tokens(ids), mask=causal_mask(valid), positions=positions, user=user)
    return decoder.logits(hidden)


@pytest.mark.parametrize("seat", SEATS)
def test_cached_decoding_equals_the_full_forward(drawn, seat):
    """Prompts of mixed length, then token by token, each row at its own position; users mixed, one of them empty."""
    graphdef, params = drawn(_create(_config(seat)))
    expected = np.asarray(_logits(graphdef, params, IDS, np.array([7, 7, 7]), TOKENS, REAL))
    slots, start = 9, np.array([4, 1, 2])

    @jax.jit
    def step(params, ids, positions, cache, user):
        decoder = trees.merge(graphdef, params)
        hidden, cache = decoder(
            decoder.embed_tokens(ids), mask=cache_mask(positions, slots), positions=positions, cache=cache, user=user
        )
        return decoder.logits(hidden), cache

    user = jax.jit(lambda params: trees.merge(graphdef, params).user_kv(TOKENS, REAL))(params)  # computed once
    prompt = np.where(np.arange(4) < start[:, None], IDS[:, :4], 0)
    logits, cache = step(
        params, prompt, np.tile(np.arange(4), (3, 1)), trees.merge(graphdef, params).init_cache(3, slots), user
    )
    for row, length in enumerate(start):
        np.testing.assert_allclose(np.asarray(logits)[row, :length], expected[row, :length], atol=1e-5)
    for t in range(3):
        positions = (start + t)[:, None]
        logits, cache = step(params, np.take_along_axis(IDS, positions, 1), positions, cache, user)
        np.testing.assert_allclose(np.asarray(logits)[:, 0], expected[np.arange(3), start + t], atol=1e-5)


def test_padding_on_the_right_changes_nothing(drawn):
    graphdef, params = drawn(_create(_config("after_attention")))
    short = np.asarray(_logits(graphdef, params, IDS, LENGTHS, TOKENS, REAL))
    other = np.where(np.arange(7) < LENGTHS[:, None], IDS, (IDS + 1) % 11)
    long = np.asarray(_logits(graphdef, params, np.pad(other, ((0, 0), (0, 5))), LENGTHS, TOKENS, REAL))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(short[row, :length], long[row, :length], atol=1e-5)


@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unroll"])
@pytest.mark.parametrize("seat", SEATS)
def test_an_empty_user_gets_exactly_the_bare_decoder(drawn, seat, unroll):
    graphdef, params = drawn(_create(_config(seat, unroll=unroll)))
    bare = np.asarray(_logits(graphdef, params, IDS, LENGTHS))
    mixed = np.asarray(_logits(graphdef, params, IDS, LENGTHS, TOKENS, REAL))
    np.testing.assert_array_equal(mixed[1], bare[1])
    assert np.abs(mixed - bare)[[0, 2]].max() > 0.01


@pytest.mark.parametrize("seat", SEATS)
def test_closed_gates_give_the_bare_loss_and_alone_of_the_user_side_get_gradient(drawn, seat):
    graphdef, params = drawn(_create(_config(seat)))
    cross = params["stack"]["cross"]
    gates = [name for name in cross if name in ("gate", "mlp_gate")]
    cross |= {name: np.zeros_like(cross[name]) for name in gates}

    def loss(params, *user):
        log_probs = jax.nn.log_softmax(_logits(graphdef, params, IDS, LENGTHS, *user))
        return -jnp.take_along_axis(log_probs[:, :-1], IDS[:, 1:, None], axis=-1).mean()

    with_users, grads = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, TOKENS, REAL))
    assert abs(with_users - jax.jit(loss)(params)) < 1e-6
    for path, grad in trees.flatten(grads).items():
        reached = np.abs(grad).max() > 0
        assert reached == ("stack/cross/" not in path or path.split("/")[-1] in gates), path


def test_one_decoder_reads_tokens_and_embeddings(drawn):
    graphdef, params = drawn(_create(BARE))
    decoder = trees.merge(graphdef, params)
    np.testing.assert_array_equal(decoder.embed_tokens(jnp.asarray(IDS)), np.asarray(params["embed"])[IDS])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_come_from_the_output_table(drawn, tied):
    graphdef, params = drawn(_create(dataclasses.replace(BARE, tie_embeddings=tied)))
    assert ("head" in params) != tied
    decoder = trees.merge(graphdef, params)
    hidden = jnp.asarray(np.random.default_rng(2).normal(size=(2, 16)), jnp.float32)
    table = np.asarray(params["embed"] if tied else params["head"].T)
    np.testing.assert_allclose(decoder.logits(hidden), hidden @ table.T, atol=1e-5)
    np.testing.assert_array_equal(decoder.output_table(), table)
    assert decoder.logits(hidden.astype(jnp.bfloat16)).dtype == jnp.float32


def test_the_cache_has_a_layer_axis_and_the_asked_type():
    graphdef, params = trees.abstract(_create(BARE))
    cache = trees.merge(graphdef, params).init_cache(3, 5, jnp.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 5, 8) and cache.k.dtype == jnp.bfloat16


def test_a_user_needs_cross_attention(drawn):
    graphdef, params = drawn(_create(BARE))
    with pytest.raises(ValueError, match="no cross-attention to a user"):
        trees.merge(graphdef, params).user_kv(TOKENS, REAL)
