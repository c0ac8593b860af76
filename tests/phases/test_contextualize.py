"""The loss of contextualization by hand; what each strategy trains and leaves alone. Learning is in tests/test_main.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.config import defaults, experiments
from user_llm.config.defaults import STRATEGIES
from user_llm.config.reader import read_config
from user_llm.data.schema import Feature, Schema
from user_llm.models.choices import Choices
from user_llm.models.decoder import DecoderConfig
from user_llm.models.trie import Trie
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.phases import contextual_loss as contextual_loss_of
from user_llm.phases import title_loss
from user_llm.phases.contextual_loss import contextual_counts, contextual_loss
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
    "prefix": np.array([[2, 4], [2, 0]]),
    "text": np.array([[[1, 2, 6, 7, 3], [1, 2, 9, 3, 0]], [[1, 2, 4, 5, 3], [0, 0, 0, 0, 0]]]),
    "text_lengths": np.array([[5, 4], [5, 0]]),
    "answers": np.array([[[1], [1]], [[1], [0]]]),
    "items": np.array([[[5], [9]], [[8], [0]]]),
    "text_weight": {"next_item": np.full(2, 0.25, np.float32)},
}


SOFT = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, cross=None), resampler=None, soft_prompt=True)
WEIGHTS = {"catalogue": 1.0, "align": 0.5, "chunk": 2, "leading": {"next_item": 1, "review": 1}}


@pytest.fixture(scope="module")
def model(drawn):
    return drawn(lambda: UserLLM(CONFIG, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def _compiled_loss(graphdef, params, batch):
    return contextual_loss(trees.merge(graphdef, params), batch, None, **WEIGHTS)


def _loss(model, batch):
    return _compiled_loss(*model, batch)


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, residual=True), pytest.param(SOFT, marks=pytest.mark.slow)],
    ids=["cross", "residual", "soft, by event"],
)
def test_the_loss_is_of_items_at_the_answers_the_titles_that_follow_and_the_way_to_the_encoder(drawn, config):
    model = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(0)))
    total, scalars = _loss(model, BATCH)

    @jax.jit
    def alone(params, events, text):
        """The LLM's log-probabilities of all items and of each token, and its query's distance from the encoder's last state."""
        llm = trees.merge(model[0], params)
        encoded = llm.encode(events[None], np.array([[len(events)]]))
        user = llm.user(encoded)
        hidden = llm.hidden(text[None], np.array([len(text)]), user=user, leading=1)[0]
        query = llm.item_query(hidden[1:2], user.query)
        logits = hidden @ llm.decoder.output_table().T
        distance = jnp.mean((query[0] - encoded.states[0, -1]) ** 2)
        return jax.nn.log_softmax(llm.score(query)[0]), jax.nn.log_softmax(logits), distance

    items, tokens, distances = [], [], []
    for user, end in ((0, 0), (0, 1), (1, 0)):
        prefix, length = BATCH["prefix"][user, end], BATCH["text_lengths"][user, end]
        text = BATCH["text"][user, end, :length]
        scores, logits, distance = map(np.asarray, alone(model[1], BATCH["events"][user, :prefix], text))
        distances.append(distance)
        items.append(-scores[BATCH["items"][user, end, 0]])
        tokens += [-logits[t, text[t + 1]] for t in range(1, length - 1)]
    np.testing.assert_allclose(scalars["item_loss"], np.mean(items), rtol=1e-5)
    np.testing.assert_allclose(scalars["next_item/text_loss"], np.mean(tokens), rtol=1e-5)
    np.testing.assert_allclose(scalars["align_loss"], np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(total, np.mean(items) + 0.25 * np.mean(tokens) + 0.5 * np.mean(distances), rtol=1e-5)


# All titles that begin as those of BATCH do, which end in 3: item 5 is written 6 7, item 9 is written 9, and item 8 is written 4 5.
TITLES = {5: [6, 7, 3], 9: [9, 3], 8: [4, 5, 3], 1: [6, 8, 3], 2: [6, 3], 3: [4, 5, 5, 3]}


# Row and place of BATCH, the token that comes next, and for each token that it is chosen among the items whose titles go on with it.
CHOSEN = [
    (0, 1, 6, {4: [8, 3], 6: [5, 1, 2], 9: [9]}),
    (0, 2, 7, {3: [2], 7: [5], 8: [1]}),
    (1, 1, 9, {4: [8, 3], 6: [5, 1, 2], 9: [9]}),
    (2, 1, 4, {4: [8, 3], 6: [5, 1, 2], 9: [9]}),
    (2, 3, 3, {3: [8], 5: [3]}),
]


@pytest.fixture(scope="module")
def choices():
    return Choices.build(Trie.build(TITLES), CONFIG.decoder.vocab_size, max_title_tokens=4)


@pytest.fixture(scope="module")
def text_logits(model):
    """Of each row and place of BATCH."""

    @jax.jit
    def logits(params):
        llm = trees.merge(model[0], params)
        user = llm.user(llm.encode(BATCH["events"], BATCH["prefix"]))
        hidden = llm.hidden(BATCH["text"].reshape(4, 5), BATCH["text_lengths"].reshape(4), user=user, leading=1)
        return hidden @ llm.decoder.output_table().T

    return np.asarray(logits(model[1]))


def _scalars(model, batch, **settings):
    """The scalars of the loss."""
    loss = jax.jit(
        lambda params, choices: contextual_loss(trees.merge(model[0], params), batch, None, choices=choices, **settings)
    )
    return lambda choices: loss(model[1], choices)[1]


def test_titles_are_chosen_among_those_of_the_catalogue(model, choices, text_logits):
    """By hand: each token is chosen among the tokens that its prefix goes on with, and what has no choice counts for nothing."""
    scalars = _scalars(model, BATCH, **WEIGHTS)(choices)
    losses = [np.logaddexp.reduce(text_logits[r, t, [*among]]) - text_logits[r, t, token] for r, t, token, among in CHOSEN]
    np.testing.assert_allclose(scalars["next_item/text_loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(scalars["item_loss"], _loss(model, BATCH)[1]["item_loss"], rtol=1e-6)
    assert contextual_counts(BATCH, choices)["tokens"] == len(losses) and contextual_counts(BATCH)["tokens"] == 8


def test_the_encoder_teaches_which_titles_are_likely(model, choices, text_logits):
    """By hand: three quarters of a token's target are the encoder's probabilities of the items whose titles go on with it."""
    llm = trees.merge(*model)
    last = llm.encode(BATCH["events"], BATCH["prefix"]).last().reshape(4, -1)
    probs, losses = np.asarray(jax.nn.softmax(llm.score(last))), []
    for row, place, token, among in CHOSEN:
        share = np.array([probs[row, items].sum() for items in among.values()])
        wanted = 0.75 * share / share.sum() + 0.25 * (np.array([*among]) == token)
        found = text_logits[row, place, [*among]]
        losses.append(-wanted @ (found - np.logaddexp.reduce(found)))
    scalars = _scalars(model, BATCH, **WEIGHTS, teacher=0.75)(choices)
    np.testing.assert_allclose(scalars["next_item/text_loss"], np.mean(losses), rtol=1e-5)


def test_the_teacher_reads_without_dropout(model, choices, monkeypatch):
    """In training, too, what teaches is the encoder's reading of whole histories, and not of thinned ones."""
    thinned = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, dropout=0.5))
    graphdef, _ = trees.abstract(lambda: UserLLM(thinned, rngs=nnx.Rngs(params=0)))
    read = []
    monkeypatch.setattr(contextual_loss_of, "taught_targets", lambda _, encoded, *more, **how: read.append(encoded) or more[3])

    @jax.jit
    def taught_by(params, key):
        llm = trees.merge(graphdef, params)
        contextual_loss(llm, BATCH, key, choices=choices, teacher=0.75, **WEIGHTS)
        return read.pop().last(), llm.encode(BATCH["events"], BATCH["prefix"]).last()

    found, whole = taught_by(model[1], jax.random.key(0))
    np.testing.assert_allclose(found.reshape(whole.shape), whole, rtol=1e-5)


def test_titles_among_all_words(model, choices, monkeypatch):
    """All of them are what the loss without choices asks for; of some of them, the mean over both kinds of tokens is by hand."""
    plain = _loss(model, BATCH)[1]["next_item/text_loss"]
    free = _scalars(model, BATCH, **WEIGHTS, teacher=0.75, all_words=1.0)(choices)
    np.testing.assert_allclose(free["next_item/text_loss"], plain, rtol=1e-6)
    assert contextual_counts(BATCH, choices, 1.0)["tokens"] == 8
    assert contextual_counts(BATCH, choices, 0.0)["tokens"] == len(CHOSEN)
    first = dict(BATCH, items=BATCH["items"] * [[[1], [0]], [[0], [0]]], answers=BATCH["answers"] * [[[1], [0]], [[0], [0]]])
    rest = dict(BATCH, items=BATCH["items"] * [[[0], [1]], [[1], [0]]], answers=BATCH["answers"] * [[[0], [1]], [[1], [0]]])
    monkeypatch.setattr(title_loss, "_drawn", lambda batch, share: jnp.asarray(batch["items"]) == 5)
    mixed = _scalars(model, BATCH, **WEIGHTS, all_words=0.5)(choices)["next_item/text_loss"]
    parts = (_loss(model, first)[1]["next_item/text_loss"], _scalars(model, rest, **WEIGHTS)(choices)["next_item/text_loss"])
    np.testing.assert_allclose(mixed, (3 * parts[0] + 3 * parts[1]) / 6, rtol=1e-5)


def test_a_share_of_the_titles_is_drawn_and_always_the_same():
    rng = np.random.default_rng(0)
    batch = {"items": rng.integers(1, 5000, (100, 20, 5)), "prefix": rng.integers(0, 200, (100, 20))}
    drawn = [np.asarray(title_loss._drawn(batch, share)) for share in (0.0, 0.1, 0.1, 0.5, 1.0)]
    assert [round(float(of.mean()), 2) for of in drawn] == [0, 0.1, 0.1, 0.5, 1]
    np.testing.assert_array_equal(drawn[1], drawn[2])
    assert (drawn[3] | ~drawn[1]).all() and np.ptp(drawn[1].mean((0, 1))) < 0.05  # each place has its share


def test_a_large_catalogue_is_no_part_of_the_compiled_step(model):
    """Of 50,000 titles no array of more than a kilobyte is a constant, and the step takes some 5 MB of them as arguments."""
    rng, words = np.random.default_rng(0), 2100
    titles = {n + 1: [*rng.integers(3, words, 3).tolist(), n % 8 + 3, n // 2048 + 3, n % 2048 + 3, 2] for n in range(50_000)}
    many = Choices.build(Trie.build(titles), words, max_title_tokens=8)
    assert sum(a.nbytes for a in many) < 6e6 and len(many.masks) < 4
    traced = jax.make_jaxpr(
        lambda params, batch, choices: contextual_loss(
            trees.merge(model[0], params), batch, None, choices=choices, teacher=1.0, all_words=0.1, **WEIGHTS
        )
    )(model[1], BATCH, many)
    assert max((np.asarray(a).nbytes for a in traced.consts), default=0) < 1024


def test_the_llm_moves_to_the_encoder_and_not_the_encoder_to_the_llm(model):
    """With closed gates the LLM knows nothing of the encoder, whose gradient could only come from the target."""
    graphdef, params = model
    closed = trees.replace(params, {"decoder/stack/cross/gate": np.zeros(1, np.float32)})

    def loss(chosen):
        batch = BATCH | {"text_weight": {"next_item": np.zeros(2)}}
        return contextual_loss(trees.merge(graphdef, closed | chosen), batch, None, **WEIGHTS | {"catalogue": 0.0})[0]

    grads = jax.jit(jax.grad(loss))({name: closed[name] for name in ("item_head", "encoder")})
    assert np.abs(grads["item_head"]).max() > 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["encoder"]))


def test_a_task_without_items_trains_its_text_alone(model):
    asked = {name: value for name, value in BATCH.items() if name != "items"} | {"text_weight": {"review": np.full(2, 3.0)}}
    total, scalars = _loss(model, asked)
    both = _loss(model, BATCH)[1]
    np.testing.assert_allclose(scalars["review/text_loss"], both["next_item/text_loss"], rtol=1e-6)
    np.testing.assert_allclose(total, 3 * both["next_item/text_loss"], rtol=1e-6)
    assert not {"item_loss", "align_loss"} & set(scalars)


def test_ends_that_are_padding_train_nothing(model):
    changed = {name: BATCH[name].copy() for name in BATCH}
    changed["text"][1, 1], changed["prefix"][1, 1] = [4, 3, 2, 1, 5], 2
    changed["text_lengths"][1, 1] = 5
    np.testing.assert_allclose(_loss(model, changed)[0], _loss(model, BATCH)[0], rtol=1e-6)


def test_a_history_is_not_seen_beyond_its_end(model):
    """Events after the last end of a history change nothing, those before it do."""
    graphdef, params = model
    first = {**BATCH, "items": np.array([[[5], [0]], [[0], [0]]]), "answers": np.array([[[1], [0]], [[0], [0]]])}

    def changed(event):
        events = BATCH["events"].copy()
        events[0, event] = 10
        return _loss((graphdef, params), {**first, "events": events})[0]

    same = _loss(model, first)[0]
    assert all(jnp.array_equal(changed(event), same) for event in (2, 3))
    assert not any(jnp.array_equal(changed(event), same) for event in (0, 1))


def _encoders(**changes):
    """A config whose phases pretrain two encoders before user_llm, with changes of that."""
    config = experiments.experiment("movielens", "xattn", "small")
    config.phases = ("pretrain_encoder", "bert4rec", "user_llm")
    config.user_llm.update_from_flattened_dict(changes)
    return read_config(config)


def test_the_encoder_comes_from_the_phase_that_is_named_or_from_nowhere():
    source = lambda **changes: _encoders(**changes).contextual("user_llm").taught_by  # noqa: E731
    assert source(encoder_init="pretrained") == source(encoder_init="frozen") == "pretrain_encoder"
    assert source(encoder="bert4rec") == "bert4rec"
    assert source(encoder_init="scratch", **{"loss.align": 0.0}) == source(**{"examples.max_events": 0}) == ""
    section = _encoders().encoder_of("bert4rec")
    assert section.objective == "masked" and section.num_layers == _encoders().encoder.num_layers


TRAINED = {  # the parts of the model, by how their paths start or what they hold
    "none": set(),
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
        soft_prompt=True,
    )
    graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(0)))
    task = Task(
        name="user_llm", shapes=params, train_data=None, steps_per_epoch=1.0, work=1.0, count_events=None, evaluate=None, results=None,
        programs=None, load=None, metrics=(), check=None,
        init=lambda place: jax.device_put(params, place(params)),
        loss=lambda params, batch, key, whole: contextual_loss(trees.merge(graphdef, params), batch, key, whole=whole, **WEIGHTS),
        counts=contextual_counts,
    )  # fmt: skip
    loop = LoopConfig(**defaults.loop(3, 3, monitor="loss"))
    optimizer = OptimizerConfig(**defaults.optimizer(0.1, warmup_steps=0), trainable=chosen["trainable"])
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


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_compute_what_one_does_with_a_soft_prompt(drawn, mesh_of, sizes):
    graphdef, params = drawn(lambda: UserLLM(SOFT, rngs=nnx.Rngs(0)))
    batch = jax.tree.map(lambda array: np.concatenate([array] * 4), BATCH)
    batch["events"] = batch["events"] + np.arange(8)[:, None, None] % 3  # no two histories are alike
    found = []
    for mesh in (mesh_of(), mesh_of(*sizes)):
        placed = jax.device_put(params, meshes.shardings(defaults.SHARDING, params, mesh))
        with jax.set_mesh(mesh):
            grad = jax.grad(lambda p, b: contextual_loss(trees.merge(graphdef, p), b, None, **WEIGHTS)[0])
            found.append(jax.device_get(jax.jit(grad)(placed, meshes.put_batch(batch, mesh))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SOFT, dataclasses.replace(SOFT, resampler=CONFIG.resampler)], ids=["by event", "resampled"])
def test_a_frozen_llm_learns_from_a_soft_prompt_what_its_user_did(config):
    """The next item is the last event's successor: nothing but the soft prompt tells, and 11 items are a loss of 2.4."""
    create = lambda: UserLLM(config, rngs=nnx.Rngs(params=0))  # noqa: E731
    graphdef, params = trees.split(create())
    chosen, frozen = trees.partition(trees.match(STRATEGIES["enc"]["trainable"], params), params)
    optimizer = optax.adam(0.01)
    state = optimizer.init(chosen)
    weights = WEIGHTS | {"align": 0.0}

    @jax.jit
    def step(chosen, state, batch):
        loss = lambda c: contextual_loss(trees.merge(graphdef, trees.combine(c, frozen)), batch, None, **weights)  # noqa: E731
        (_, scalars), grads = jax.value_and_grad(loss, has_aux=True)(chosen)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(chosen, updates), state, scalars["item_loss"]

    rng, losses = np.random.default_rng(0), []
    for _ in range(300):
        events, prefix = rng.integers(1, 12, (16, 5, 1)), rng.integers(1, 6, (16, 2))
        items = 1 + np.take_along_axis(events[..., 0], prefix - 1, axis=1) % 11
        text = np.broadcast_to([1, 2, 3], (16, 2, 3))
        batch = {
            "events": events, "lengths": np.full(16, 5), "prefix": prefix, "text": text, "text_lengths": np.full((16, 2), 3),
            "answers": np.ones((16, 2, 1), int), "items": items[..., None],
            "text_weight": {"next_item": np.zeros(16, np.float32)},
        }  # fmt: skip
        chosen, state, loss = step(chosen, state, batch)
        losses.append(float(loss))
    assert np.mean(losses[:10]) > 2.2 and np.mean(losses[-10:]) < 0.5
