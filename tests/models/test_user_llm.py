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


RESAMPLER = ResamplerConfig(num_latents=3, input_width=8, heads=2, head_dim=4, mlp_width=12)
VARIANTS = {  # seat of cross-attention, resampler, soft prompt, encoder
    "after_attention": ("after_attention", RESAMPLER, False, "autoregressive"),
    "before_block": ("before_block", RESAMPLER, False, "masked"),  # sees both ways: the ends of a history share no states
    "soft_prompt": (None, RESAMPLER, True, "autoregressive"),
    "both, by event": ("after_attention", None, True, "autoregressive"),
}


def _config(variant):
    seat, resampler, soft_prompt, objective = VARIANTS[variant]
    cross = seat and CrossAttentionConfig(user_width=8, every=2, heads=2, head_dim=4, seat=seat)
    return dataclasses.replace(
        BARE,
        decoder=dataclasses.replace(BARE.decoder, cross=cross),
        encoder=dataclasses.replace(ENCODER, objective=objective),
        resampler=resampler,
        soft_prompt=soft_prompt,
    )


def _create(config):
    return lambda: UserLLM(config, rngs=nnx.Rngs(params=0))


def _functions(graphdef):
    """(params, events, ends) -> users, and (params, users or None) -> hidden states of the text."""

    @jax.jit
    def users(params, events, ends):
        model = trees.merge(graphdef, params)
        return model.user(model.encode(events, ends))

    @jax.jit
    def hidden(params, user):
        return trees.merge(graphdef, params).hidden(TEXT, TEXT_LENGTHS, user=user, leading=1)

    return users, hidden


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, drawn):
    """Functions and parameters, the gates at 0.5."""
    graphdef, params = drawn(_create(_config(request.param)))
    cross = params["decoder"]["stack"].get("cross", {})
    np.testing.assert_array_equal([cross[name] for name in cross if name.endswith("gate")], 0.5)
    return *_functions(graphdef), params


def _stored(user):
    """What is stored of each row's real user tokens: K and V, and the soft tokens."""
    rows = []
    for row in range(len(user.kv.mask) if user.kv else len(user.prompt.lengths)):
        parts = [np.asarray(part)[:, row][:, :, np.asarray(user.kv.mask)[row]] for part in user.kv[:2]] if user.kv else []
        rows.append(parts + ([np.asarray(user.prompt.tokens)[row, : int(user.prompt.lengths[row])]] if user.prompt else []))
    return rows


def test_several_ends_of_one_history_equal_each_history_alone(model):
    users, hidden, params = model
    together = users(params, EVENTS, ENDS)
    alone = []
    for history, end in zip(np.repeat(EVENTS, 3, axis=0), ENDS.reshape(-1), strict=True):
        cut = np.where(np.arange(8)[:, None] < end, history, 0)  # what comes after is gone
        alone.append(users(params, cut[None], np.array([[end]])))
    rows = _stored(together)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), rows, sum(map(_stored, alone), []))
    alone = jax.tree.map(lambda *rows: np.concatenate(rows, axis=int(rows[0].ndim > 3)), *alone)  # K/V have layers first
    np.testing.assert_allclose(hidden(params, together), hidden(params, alone), atol=1e-5)
    # And the ends of a history are not the same user.
    first, second = rows[0][0], rows[1][0]
    assert first.shape != second.shape or np.abs(first - second).max() > 1e-2


def test_a_user_without_events_is_the_bare_llm_whatever_the_gates(model):
    """To the bit, with a soft prompt in rows that are longer to 1e-6; the other users of the batch do change the text."""
    users, hidden, params = model
    bare, somebody = np.asarray(hidden(params, None)), users(params, EVENTS, ENDS)
    atol = 1e-6 if somebody.prompt else 0
    states = np.asarray(hidden(params, somebody))
    empty = ENDS.reshape(-1) == 0
    np.testing.assert_allclose(states[empty], bare[empty], rtol=0, atol=atol)
    assert (np.abs(states - bare)[~empty].max((1, 2)) > 1e-2).all()
    nobody = hidden(params, users(params, EVENTS, np.zeros((2, 3), int)))
    np.testing.assert_allclose(nobody, bare, rtol=0, atol=atol)
    if somebody.kv is None:  # what stands in front of a soft prompt is the same for all users
        np.testing.assert_allclose(states[:, :1], bare[:, :1], rtol=0, atol=atol)


def test_padding_of_histories_and_text_changes_nothing(model):
    users, hidden, params = model
    padded = np.concatenate([EVENTS, np.full((2, 4, 2), 3)], axis=1)
    padded[1, 5:] = 1
    before, after = (users(params, events, ENDS) for events in (EVENTS, padded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), _stored(after), _stored(before))
    real = np.arange(5) < TEXT_LENGTHS[:, None]
    states = np.asarray(hidden(params, before))[real]
    assert np.isfinite(states).all()
    np.testing.assert_allclose(np.asarray(hidden(params, after))[real], states, atol=1e-5)


def _losses_and_grads(graphdef):
    """(params) -> (loss with users, gradients), and the loss without."""

    def loss(model, user):
        hidden = model.hidden(TEXT, TEXT_LENGTHS, user=user, leading=1)
        return jnp.mean(jnp.square(model.decoder.logits(hidden)[:, 1] - 1))

    def with_users(params):
        model = trees.merge(graphdef, params)
        return loss(model, model.user(model.encode(EVENTS, ENDS)))

    return jax.jit(lambda params: (jax.value_and_grad(with_users)(params), loss(trees.merge(graphdef, params), None)))


def _still(grads):
    return {name for name, grad in trees.flatten(jax.device_get(grads)).items() if not grad.any()}


def test_a_user_llm_starts_as_its_bare_llm_and_its_gates_move_first(drawn):
    """Gates shut as at the start: the bare LLM's loss to 1e-6, and gates alone get gradients; open: everything does."""
    graphdef, opened = drawn(_create(_config("after_attention")))
    gate = "decoder/stack/cross/gate"
    shut = trees.replace(opened, {gate: np.zeros_like(trees.flatten(opened)[gate])})
    losses_and_grads = _losses_and_grads(graphdef)
    (value, grads), bare = losses_and_grads(shut)
    np.testing.assert_allclose(value, bare, rtol=1e-6)
    of_users = {name for name in trees.flatten(grads) if name.startswith(("encoder/", "resampler/", "decoder/stack/cross/"))}
    assert of_users - _still(grads) == {gate}
    (value, grads), bare = losses_and_grads(opened)
    assert abs(value - bare) > 1e-3
    assert _still(grads) == {"item_head", "item_norm/scale"}  # which this loss does not depend on


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["soft_prompt", "both, by event"])
def test_gradients_reach_everything_through_a_soft_prompt(drawn, variant):
    graphdef, params = drawn(_create(_config(variant)))
    (value, grads), bare = _losses_and_grads(graphdef)(params)
    assert abs(value - bare) > 1e-3
    assert _still(grads) == {"item_head", "item_norm/scale"}
    assert ("resampler" in params) == (variant == "soft_prompt") and "project" in params["soft"]


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


@pytest.mark.parametrize("variant", ["before_block", "both, by event"])
def test_a_residual_model_starts_as_its_encoder_ranks_and_the_decoder_reads_its_last_state(variant):
    """The encoder sees both ways in the one, and in the other the user tokens are its states; a user without events has no query."""
    config = dataclasses.replace(_config(variant), residual=True)

    @jax.jit
    def start():
        model = UserLLM(config, rngs=nnx.Rngs(params=0))
        encoded = model.encode(EVENTS, ENDS)
        user, last = model.user(encoded), encoded.last().reshape(6, 8)
        tokens = model.user_tokens(encoded)
        query = model.item_query(model.hidden(TEXT, TEXT_LENGTHS, user=user, leading=1)[:, 0], user.query)
        return model.score(query), model.encoder.score(last), last, tokens

    scores, of_encoder, last, tokens = jax.device_get(start())
    empty = ENDS.reshape(-1) == 0
    np.testing.assert_allclose(scores[~empty], of_encoder[~empty], rtol=1e-6)
    np.testing.assert_array_equal(scores[empty, 1:12], 0.0)
    assert tokens.tokens.shape[1] == (config.num_tokens or 8)
    of_history = np.arange(6) // (6 // len(tokens.tokens))
    read = tokens.tokens[of_history, np.maximum(tokens.counts - 1, 0)]
    np.testing.assert_array_equal(read[~empty], last[~empty])


def test_an_encoder_that_nothing_reads_and_a_soft_prompt_of_nobody_are_refused():
    for changes in ({"encoder": ENCODER}, {"soft_prompt": True}):
        with pytest.raises(ValueError, match="if and only if there is an encoder"):
            dataclasses.replace(BARE, **changes)
    with pytest.raises(ValueError, match="adds to the ranking of its encoder, and there is none"):
        dataclasses.replace(BARE, residual=True)
