"""The loss of contextualization by hand; what each strategy trains and leaves alone. Learning is in tests/test_main.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from configs.common import STRATEGIES
from user_llm.common import trees
from user_llm.data.schema import Feature, Schema
from user_llm.models.decoder import DecoderConfig
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.tasks.contextualize import contextual_loss
from user_llm.training.loop import LoopConfig, initial_state, train_summary
from user_llm.training.optimizer import OptimizerConfig
from user_llm.training.task import Task

SCHEMA = Schema((Feature("item", "item", 12),))
RATED = Schema((Feature("item", "item", 12), Feature("rating", "ordinal", 6)))
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


TRAINED = {  # the parts of the model, by how their paths start or what they hold
    "all": {"llm", "cross", "encoder", "encoder heads", "rest"},
    "full": {"llm", "cross", "encoder", "rest"},
    "lora": {"adapters", "cross", "encoder", "rest"},
    "enc": {"cross", "encoder", "rest"},
    "proj": {"cross", "rest"},
}


def _part(path):
    """Name the part of the model that a parameter belongs to."""
    marks = {
        "/lora/": "adapters",
        "/cross/": "cross",
        "decoder/": "llm",
        "encoder/heads/": "encoder heads",
        "encoder/": "encoder",
    }
    return next((name for mark, name in marks.items() if mark in path), "rest")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_its_parts_and_keeps_every_bit_of_the_others(drawn, mesh_of, bare_logits, strategy):
    chosen = STRATEGIES[strategy]
    lora = LoRAConfig(rank=2, alpha=4.0, dropout=0.0, targets=".*") if chosen["adapters"] else None
    block = dataclasses.replace(CONFIG.decoder.block, lora=lora)
    config = dataclasses.replace(
        CONFIG,
        decoder=dataclasses.replace(CONFIG.decoder, block=block),
        encoder=dataclasses.replace(CONFIG.encoder, schema=RATED, heads=("rating",)),
    )
    graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(0)))
    weights = {"catalogue": 1.0, "text": 0.25, "align": 0.5}
    task = Task(
        name="user_llm", train_data=None, steps_per_epoch=1.0, count_events=None, evaluate=None, results=None,
        init=lambda place: jax.device_put(params, place(params)),
        loss=lambda params, batch, key: contextual_loss(trees.merge(graphdef, params), batch, key, **weights, chunk=2),
    )  # fmt: skip
    loop = LoopConfig(**common.loop(3, 3, monitor="loss"))
    optimizer = OptimizerConfig(**common.optimizer(0.1, warmup_steps=0), trainable=chosen["trainable"])
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        state, step = initial_state(task, loop, optimizer, mesh, seed=0)
        before = jax.tree.map(np.array, trees.flatten(state.params))
        trainable = trees.count(state.trainable)
        # Two moments of 4 bytes for each parameter that trains and for no other, and the two counters of Adam and its schedule.
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) == 8 * trainable + 8
        total = trees.count(params)
        assert train_summary(state).startswith(f"{trainable:,} of {total:,} parameters trainable, optimizer state 0.")
        for _ in range(3):
            state, _ = step(state, BATCH | {"events": np.pad(BATCH["events"], ((0, 0), (0, 0), (0, 1)), constant_values=1)})
    after = jax.tree.map(np.array, trees.flatten(state.params))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    by_part = {part: {path for path in before if _part(path) == part} for part in map(_part, before)}
    assert moved == set().union(*(by_part[part] for part in TRAINED[strategy]))
    if strategy in ("lora", "enc", "proj"):  # without adapters and user it is the LLM that it was, bit for bit
        ids = np.arange(1, 13)[None]
        bare = dataclasses.replace(CONFIG.decoder, cross=None)
        logits = [bare_logits(bare, _llm(flat), ids) for flat in (before, after)]
        np.testing.assert_array_equal(*logits)


def _llm(flat):
    """Return the parameters of the LLM alone."""
    return trees.unflatten({path.removeprefix("decoder/"): leaf for path, leaf in flat.items() if _part(path) == "llm"})
