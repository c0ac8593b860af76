"""The loss of contextualization by hand; what trains and learns is in tests/test_main.py and the quick start."""

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
from user_llm.tasks.contextualize import contextual_loss

SCHEMA = Schema((Feature("item", "item", 12),))
CONFIG = UserLLMConfig(
    decoder=DecoderConfig(
        vocab_size=13, num_layers=1, block=BlockConfig(width=12, heads=2, kv_heads=2, head_dim=6, mlp_width=16),
        tie_embeddings=True, cross=CrossAttentionConfig(user_width=8, every=1, heads=2, head_dim=4),
    ),
    encoder=UserEncoderConfig(
        schema=SCHEMA, block=BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=12), num_layers=1
    ),
    resampler=ResamplerConfig(num_latents=3, input_width=8, heads=2, head_dim=4, mlp_width=12),
    table_rows=128, item_width=8, num_items=11,
)  # fmt: skip
# Two histories with two ends each; the second history has one end only, the rest of its row is padding.
BATCH = {
    "events": np.array([[[3], [5], [7], [2]], [[4], [1], [0], [0]]]),
    "lengths": np.array([4, 2]),
    "prefix": np.array([[1, 4], [2, 0]]),
    "text": np.array([[[1, 2, 6, 7, 3], [1, 2, 9, 3, 0]], [[1, 2, 4, 5, 3], [0, 0, 0, 0, 0]]]),
    "text_lengths": np.array([[5, 4], [5, 0]]),
    "answers": np.array([[[1], [1]], [[1], [0]]]),
    "items": np.array([[[5], [9]], [[8], [0]]]),
}


@pytest.fixture(scope="module")
def model(drawn):
    return drawn(lambda: UserLLM(CONFIG, rngs=nnx.Rngs(0)))


def _loss(model, batch, catalogue=1.0, text=0.25, align=0.5):
    graphdef, params = model
    weights = {"catalogue": catalogue, "text": text, "align": align}
    return jax.jit(lambda p: contextual_loss(trees.merge(graphdef, p), batch, None, **weights, chunk=2))(params)


def test_the_loss_is_of_items_at_the_answers_the_titles_that_follow_and_the_way_to_the_encoder(model):
    total, scalars = _loss(model, BATCH)
    llm = trees.merge(*model)
    items, tokens, distances = [], [], []
    for user, end in ((0, 0), (0, 1), (1, 0)):
        prefix, length = BATCH["prefix"][user, end], BATCH["text_lengths"][user, end]
        states = llm.encode(BATCH["events"][user : user + 1, :prefix], np.array([prefix]))
        kv = llm.user_kv(states, np.array([[prefix]]))
        text = BATCH["text"][user, end]
        hidden = llm.hidden(text[None, :length], np.array([length]), user=kv)[0]
        query = llm.item_query(hidden[1:2])
        scores = jax.nn.log_softmax(llm.score(query)[0])
        distances.append(jnp.mean((query[0] - states[0, prefix - 1]) ** 2))
        items.append(-scores[BATCH["items"][user, end, 0]])
        logits = jax.nn.log_softmax(hidden @ llm.decoder.output_table().T)
        tokens += [-logits[t, text[t + 1]] for t in range(1, length - 1)]
    np.testing.assert_allclose(scalars["item_loss"], np.mean(items), rtol=1e-5)
    np.testing.assert_allclose(scalars["text_loss"], np.mean(tokens), rtol=1e-5)
    np.testing.assert_allclose(scalars["align_loss"], np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(total, np.mean(items) + 0.25 * np.mean(tokens) + 0.5 * np.mean(distances), rtol=1e-5)


def test_the_llm_moves_to_the_encoder_and_not_the_encoder_to_the_llm(model):
    """With closed gates the LLM knows nothing of the encoder, whose gradient could only come from the target."""
    graphdef, params = model
    closed = trees.replace(params, {"decoder/stack/cross/gate": np.zeros(1, np.float32)})

    def loss(params):
        weights = {"catalogue": 0.0, "text": 0.0, "align": 1.0}
        return contextual_loss(trees.merge(graphdef, params), BATCH, None, **weights, chunk=2)[0]

    grads = jax.jit(jax.grad(loss))(closed)
    assert np.abs(grads["item_head"]).max() > 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["encoder"]))


def test_ends_that_are_padding_train_nothing(model):
    changed = {name: BATCH[name].copy() for name in BATCH}
    changed["text"][1, 1], changed["answers"][1, 1], changed["prefix"][1, 1] = [4, 3, 2, 1, 5], 2, 2
    changed["text_lengths"][1, 1] = 5
    np.testing.assert_allclose(_loss(model, changed)[0], _loss(model, BATCH)[0], rtol=1e-6)


def test_a_history_is_not_seen_beyond_its_end(model):
    """Events after the last end of a history change nothing, those before it do."""
    graphdef, params = model
    first = {**BATCH, "items": np.array([[[5], [0]], [[0], [0]]])}

    def changed(event):
        events = BATCH["events"].copy()
        events[0, event] = 10
        return _loss((graphdef, params), {**first, "events": events})[0]

    same = _loss(model, first)[0]
    assert all(jnp.array_equal(changed(event), same) for event in (1, 2, 3))
    assert not jnp.array_equal(changed(0), same)
