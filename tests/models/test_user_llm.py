import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.data.schema import Feature, Schema
from user_llm.models.decoder import DecoderConfig
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig

SCHEMA = Schema((Feature("item", "item", 12), Feature("rating", "ordinal", 6)))
ENCODER = UserEncoderConfig(
    schema=SCHEMA, block=BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=12), num_layers=1
)
BARE = UserLLMConfig(
    decoder=DecoderConfig(
        vocab_size=13,
        num_layers=2,
        block=BlockConfig(width=12, heads=2, kv_heads=2, head_dim=6, mlp_width=16),
        tie_embeddings=True,
    ),
    table_rows=ENCODER.table_rows,
    item_width=8,
    num_items=SCHEMA.num_items,
)
_rng = np.random.default_rng(0)
EVENTS = np.stack([_rng.integers(1, feature.size, (2, 8)) for feature in SCHEMA], axis=-1)
ENDS = np.array([[8, 3, 0], [1, 5, 4]])  # of each history
TEXT = _rng.integers(1, 13, (6, 5))
TEXT_LENGTHS = np.array([5, 3, 5, 4, 2, 5])


def _config(seat, objective="autoregressive"):
    cross = CrossAttentionConfig(user_width=8, every=2, heads=2, head_dim=4, seat=seat)
    return dataclasses.replace(
        BARE,
        decoder=dataclasses.replace(BARE.decoder, cross=cross),
        encoder=dataclasses.replace(ENCODER, objective=objective),
        resampler=ResamplerConfig(num_latents=3, input_width=8, heads=2, head_dim=4, mlp_width=12),
    )


def _create(config):
    return lambda: UserLLM(config, rngs=nnx.Rngs(params=0))


def _functions(graphdef):
    """(params, events, ends) -> user K/V, and (params, user or None) -> hidden states of the text."""

    @jax.jit
    def user_kv(params, events, ends):
        model = trees.merge(graphdef, params)
        return model.user_kv(model.encode(events, ends))

    @jax.jit
    def hidden(params, user):
        return trees.merge(graphdef, params).hidden(TEXT, TEXT_LENGTHS, user=user)

    return user_kv, hidden


# A causal encoder, whose states all ends of a history share, and one that sees both ways, with none to share.
@pytest.fixture(scope="module", params=[("after_attention", "autoregressive"), ("before_block", "masked")], ids="-".join)
def model(request, drawn):
    """Functions and parameters, the gates at 0.5."""
    graphdef, params = drawn(_create(_config(*request.param)))
    cross = params["decoder"]["stack"]["cross"]
    np.testing.assert_array_equal([cross[name] for name in cross if name.endswith("gate")], 0.5)
    return *_functions(graphdef), params


def test_several_ends_of_one_history_equal_each_history_alone(model):
    user_kv, hidden, params = model
    together = user_kv(params, EVENTS, ENDS)
    states = np.asarray(hidden(params, together))
    alone = []
    for history, end in zip(np.repeat(EVENTS, 3, axis=0), ENDS.reshape(-1), strict=True):
        cut = np.where(np.arange(8)[:, None] < end, history, 0)  # what comes after is gone
        alone.append(user_kv(params, cut[None], np.array([[end]])))
    alone = jax.tree.map(lambda *rows: np.concatenate(rows, axis=int(rows[0].ndim > 2)), *alone)
    np.testing.assert_array_equal(together.mask, alone.mask)
    real = np.asarray(together.mask)
    for ours, theirs in zip((together.k, together.v), (alone.k, alone.v), strict=True):
        np.testing.assert_allclose(ours.swapaxes(2, 3)[:, real], theirs.swapaxes(2, 3)[:, real], atol=1e-5)
    np.testing.assert_allclose(states, hidden(params, alone), atol=1e-5)
    # And the ends of a history are not the same user.
    assert np.abs(np.asarray(together.k)[:, 0] - np.asarray(together.k)[:, 1]).max() > 1e-2


def test_a_user_without_events_is_the_bare_llm_whatever_the_gates(model):
    """To the bit; the other users of the batch do change the text."""
    user_kv, hidden, params = model
    bare = np.asarray(hidden(params, None))
    states = np.asarray(hidden(params, user_kv(params, EVENTS, ENDS)))
    empty = ENDS.reshape(-1) == 0
    np.testing.assert_array_equal(states[empty], bare[empty])
    assert (np.abs(states - bare)[~empty].max((1, 2)) > 1e-2).all()
    nobody = hidden(params, user_kv(params, EVENTS, np.zeros((2, 3), int)))
    np.testing.assert_array_equal(nobody, bare)


def test_padding_of_histories_and_text_changes_nothing(model):
    user_kv, hidden, params = model
    padded = np.concatenate([EVENTS, np.full((2, 4, 2), 3)], axis=1)
    padded[1, 5:] = 1
    before, after = (user_kv(params, events, ENDS) for events in (EVENTS, padded))
    np.testing.assert_allclose(after.k, before.k, atol=1e-5)
    real = np.arange(5) < TEXT_LENGTHS[:, None]
    assert np.isfinite(np.asarray(hidden(params, before))[real]).all()


def test_a_user_llm_starts_as_its_bare_llm_and_its_gates_move_first(drawn):
    """Gates shut as at the start: the bare LLM's loss to 1e-6, and gates alone get gradients; open: everything does."""
    graphdef, opened = drawn(_create(_config("after_attention")))
    gate = "decoder/stack/cross/gate"
    shut = trees.replace(opened, {gate: np.zeros_like(trees.flatten(opened)[gate])})

    @jax.jit
    def losses_and_grads(params):
        model = trees.merge(graphdef, params)

        def loss(model, user):
            hidden = model.hidden(TEXT, TEXT_LENGTHS, user=user)
            return jnp.mean(jnp.square(model.decoder.logits(hidden)[:, 0] - 1))

        def with_users(params):
            model = trees.merge(graphdef, params)
            return loss(model, model.user_kv(model.encode(EVENTS, ENDS)))

        return jax.value_and_grad(with_users)(params), loss(model, None)

    (value, grads), bare = losses_and_grads(shut)
    np.testing.assert_allclose(value, bare, rtol=1e-6)
    moving = {name for name, grad in trees.flatten(grads).items() if np.any(grad)}
    of_users = {name for name in moving if name.startswith(("encoder/", "resampler/", "decoder/stack/cross/"))}
    assert of_users == {gate}
    (value, grads), bare = losses_and_grads(opened)
    assert abs(value - bare) > 1e-3
    still = {name for name, grad in trees.flatten(grads).items() if not np.any(grad)}
    assert still == {"item_head", "item_norm/scale"}  # which this loss does not depend on


def test_without_an_encoder_it_is_a_decoder_with_an_item_head(drawn):
    """The text-prompt baseline: no trace of users among its parameters, and every item scored."""
    graphdef, params = drawn(_create(BARE))
    assert set(params) == {"decoder", "items", "item_norm", "item_head"}
    assert "cross" not in params["decoder"]["stack"]

    @jax.jit
    def score(params):
        model = trees.merge(graphdef, params)
        query = model.item_query(model.hidden(TEXT, TEXT_LENGTHS)[:, 0])
        return query, model.score(query)

    query, scores = map(np.asarray, score(params))
    np.testing.assert_allclose(scores[:, 1:12], query @ np.asarray(params["items"])[1:12].T, rtol=1e-4)
    np.testing.assert_array_equal(np.delete(scores, range(1, 12), axis=1), -np.inf)


def test_items_are_scored_by_the_encoders_own_table(drawn):
    graphdef, params = drawn(_create(_config("after_attention")))
    query = np.ones((1, 8), np.float32)
    scores = np.asarray(jax.jit(lambda p: trees.merge(graphdef, p).score(query))(params))
    np.testing.assert_allclose(scores[0, 1:12], np.asarray(params["encoder"]["item"])[1:12].sum(-1), rtol=1e-4)
