import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from configs import quickstart
from user_llm.common import trees
from user_llm.config import experiments
from user_llm.config.reader import read_config
from user_llm.data import movielens, prepare, synthetic_files
from user_llm.data.dataset import Dataset
from user_llm.data.splits import leave_last_out
from user_llm.data.synthetic import optimal_ranks
from user_llm.evals.evaluator import rank_targets
from user_llm.models.user_encoder import UserEncoder
from user_llm.nn.masking import choose_masked
from user_llm.nn.visibility import segment_mask
from user_llm.phases import pretrain_encoder as module
from user_llm.phases.pretrain_encoder import EncoderLoss, encoder_config, item_catalogue, negative_log_q, score_next
from user_llm.phases.run import Run

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_quickstart import tiny_config

ROOT = Path(__file__).parents[2]
# Of the optimal predictor's recall@10 with the history removed, on the quick start's world, after the quick start's 400 steps.
SHARE = {"bert4rec": 0.7, "dual_encoder": 0.8}


@pytest.mark.slow
def test_encoders_reach_their_share_of_the_optimal_recall(tmp_path):
    """By the command, in a process of its own: there XLA optimises what it compiles. The autoregressive one is the quick start's."""
    command = [sys.executable, "-m", "user_llm.main", "--config=configs/movielens_xattn.py:synthetic", f"--workdir={tmp_path}"]
    phases = "--config.phases=('bert4rec','dual_encoder')"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([*command, phases], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = json.loads((tmp_path / "results.json").read_text())
    found = {row["method"]: row["value"] for row in rows if row["metric"] == "recall@10/unseen"}

    config = experiments.experiment("movielens", "xattn", "synthetic")
    world = synthetic_files.write(tmp_path / "world", seed=config.seed, **config.data.synthetic)
    timelines = prepare.load(movielens.find(tmp_path / "world", tmp_path), epath.Path(tmp_path / "again"), seed=config.seed)
    best = np.mean(optimal_ranks(world, timelines, *leave_last_out(timelines).targets["test"]) <= 10)
    for method, share in SHARE.items():
        assert share * best < found[method] < 1.05 * best  # above the optimum only by chance
        assert found[method] > 1.5 * found["popularity"]


@pytest.fixture
def make_encoder(drawn, make_timelines):
    """Return `make(objective, tower=...)`: an encoder with a genre head, and a batch: one row of two histories and padding."""
    return functools.partial(_make_encoder, drawn, make_timelines([[1, 2, 3], [4, 5, 6, 7]]))


@pytest.fixture
def encoder(make_encoder):
    return make_encoder("autoregressive")


def _make_encoder(drawn, timelines, objective, tower=False):
    config = quickstart.get_config()
    section = config.encoder
    section.update(
        num_layers=1, heads=("genres",), dropout=0.0, block={**section.block, "dropout": 0.0}, objective=objective, tower=tower
    )
    config = read_config(config).encoder
    selected = timelines.select(config.features)
    model_config = encoder_config(config, selected.schema, {})
    graphdef, params = drawn(lambda: UserEncoder(model_config, rngs=nnx.Rngs(0)))
    if model_config.has_tower:
        params["tower"]["catalogue"] = jnp.asarray(item_catalogue(selected, model_config))
    events = [timelines.select(config.features).events(user, 0, stop) for user, stop in ((0, 3), (1, 4))]
    width = events[0].shape[1]
    rows = np.concatenate([events[0][:-1], events[1][:-1], np.zeros((2, width), np.int32)])
    following = np.concatenate([events[0][1:], events[1][1:], np.zeros((2, width), np.int32)])
    batch = {
        "events": rows[None], "next": following[None], "segments": np.array([[1, 1, 2, 2, 2, 0, 0]]),
        "positions": np.array([[0, 1, 0, 1, 2, 0, 0]]),
    }  # fmt: skip
    return trees.merge(graphdef, params), batch


def _loss(encoder, **changes):
    log_q = np.zeros(encoder.config.table_rows, np.float32)
    loss = EncoderLoss(
        head_weights={"genres": 0.5}, negatives=0, chunk=4, log_q=log_q, share=log_q, mask_probability=0.5, last_only=0.0
    )
    return dataclasses.replace(loss, **changes)


@pytest.mark.parametrize("tower", [False, True])
def test_the_loss_is_the_mean_over_real_positions_of_the_item_and_half_the_genres(make_encoder, tower):
    model, batch = make_encoder("autoregressive", tower=tower)
    total, scalars = jax.jit(lambda batch: _loss(model)(model, batch, jax.random.key(0)))(batch)

    @jax.jit
    def log_probs(events):
        length = events.shape[1]
        states = model(events, mask=jnp.tril(jnp.ones((1, length, length), bool)), positions=jnp.arange(length)[None])[0]
        return [jax.nn.log_softmax(logits) for logits in (model.score(states), states @ model.heads["genres"][...])]

    items, genres = [], []
    for start, stop in ((0, 2), (2, 5)):  # each history alone
        length = stop - start
        scores, genre_scores = map(np.asarray, log_probs(batch["events"][:, start:stop]))
        for t in range(length):
            following = np.asarray(batch["next"][0, start + t])
            items.append(-scores[t, following[0]])
            column = 1
            for feature in model.config.schema.features[1:]:
                if feature.name == "genres":
                    bag = following[column : column + feature.width]
                    genres.append(-np.mean([genre_scores[t, g] for g in bag[bag > 0]]))
                column += feature.width
    np.testing.assert_allclose(scalars["item_loss"], np.mean(items), rtol=1e-5)
    np.testing.assert_allclose(scalars["genres_loss"], np.mean(genres), rtol=1e-5)
    np.testing.assert_allclose(total, np.mean(items) + 0.5 * np.mean(genres), rtol=1e-5)


def test_the_masked_loss_is_of_the_hidden_events_each_told_from_all_others_of_its_history(make_encoder):
    """Against each history alone, without packing; the events are those that an autoregressive encoder predicts."""
    model, batch = make_encoder("masked")

    @jax.jit
    def run(batch):
        key = jax.random.key(1)
        draw_key = jax.random.fold_in(jax.random.split(key)[1], 1)
        chosen = choose_masked(draw_key, batch["segments"], probability=0.5, last_only=0.0)
        return _loss(model)(model, batch, key), chosen

    (total, scalars), (places, used) = jax.device_get(run(batch))
    hidden = np.isin(np.arange(7), places[0][used[0]])
    assert hidden[:2].any() and 0 < hidden[2:5].sum() < 3 and not hidden[5:].any()

    @jax.jit
    def log_probs(events, hidden):
        everyone = jnp.ones((1, len(events), len(events)), bool)
        states = model(events[None], mask=everyone, positions=jnp.arange(len(events))[None], hidden=hidden[None])[0]
        return [jax.nn.log_softmax(logits) for logits in (model.score(states), states @ model.heads["genres"][...])]

    items, genres = [], []
    for history in (slice(0, 2), slice(2, 5)):
        events = np.asarray(batch["next"][0, history])
        item_scores, genre_scores = map(np.asarray, log_probs(events, hidden[history]))
        for t in np.flatnonzero(hidden[history]):
            items.append(-item_scores[t, events[t, 0]])
            bag = events[t, model.config.schema.columns("genres")]
            genres.append(-genre_scores[t, bag[bag > 0]].mean())
    np.testing.assert_allclose(scalars["item_loss"], np.mean(items), rtol=1e-5)
    np.testing.assert_allclose(total, np.mean(items) + 0.5 * np.mean(genres), rtol=1e-5)


def test_the_dual_loss_is_among_the_items_of_the_batch_by_the_vectors_of_the_item_tower(make_encoder):
    """Next items 2, 3 and 5, 6, 7, with shares that make each certain to be in the batch but item 7: 1 - (4/5)^5."""
    model, batch = make_encoder("dual")
    share = np.full(model.config.table_rows, 0.9999, np.float32)
    share[7] = 0.2
    _, scalars = jax.jit(lambda batch: _loss(model, share=share)(model, batch, jax.random.key(0)))(batch)
    targets = np.array([2, 3, 5, 6, 7])
    np.testing.assert_array_equal(batch["next"][0, :5, 0], targets)

    @jax.jit
    def products(batch):
        states = model(batch["events"], mask=segment_mask(batch["segments"]), positions=batch["positions"])[0, :5]
        return states @ model.item_vectors(targets).T

    logits = np.array(products(batch))
    logits[:, 4] -= np.log(1 - 0.8**5)
    np.testing.assert_allclose(scalars["item_loss"], -np.diag(jax.nn.log_softmax(logits)).mean(), rtol=1e-4)


def test_an_autoregressive_encoder_with_a_tower_and_the_negatives_of_its_batch_is_a_dual_encoder(make_encoder):
    dual, batch = make_encoder("dual")
    other, _ = make_encoder("autoregressive", tower=True)
    share = np.linspace(0.1, 0.9, dual.config.table_rows).astype(np.float32)
    losses = [
        jax.jit(lambda batch, m=model, c=changes: _loss(m, share=share, **c)(m, batch, jax.random.key(0)))(batch)[0]
        for model, changes in ((dual, {}), (other, {"in_batch": True}))
    ]
    assert losses[0] == losses[1] and losses[0] != _loss(other, share=share)(other, batch, jax.random.key(0))[0]


def test_an_item_tower_reads_the_ids_and_bags_of_the_catalogue(make_timelines):
    timelines = make_timelines([[1, 2, 3]]).select(("item", "rating", "genres"))
    section = read_config(quickstart.get_config()).encoder
    section = dataclasses.replace(section, features=("item", "rating", "genres"))
    table = item_catalogue(timelines, encoder_config(section, timelines.schema, {}))
    np.testing.assert_array_equal(table[:5], [[0, 0, 0], [1, 2, 0], [2, 3, 4], [3, 1, 0], [0, 0, 0]])
    assert table.shape == (128, 3) and not table[4:].any()


@pytest.mark.parametrize("objective", ["masked", "dual"])
def test_ranks_are_those_of_the_scores_of_each_history_alone(make_encoder, make_timelines, objective):
    """Padded and batched with longer histories, ranks of all items by the product with the encoder's query."""
    model, _ = make_encoder(objective)
    timelines = make_timelines([[1, 2, 3, 4], [4, 5, 6, 7, 1, 2]], num_items=7).select(model.config.schema.names)
    split = leave_last_out(timelines)
    graphdef, params = trees.split(model)
    score = lambda batch: score_next(graphdef, params, batch.events, batch.lengths)  # noqa: E731
    ranks = rank_targets(score, timelines, split, "test", max_events=50, batch_size=2)

    @jax.jit
    def products(history):
        return model.encode(history, np.array([history.shape[1:2]])).last()[0, 0] @ model.item_vectors()[1:8].T

    for user, history_length, target in ((0, 3, 4), (1, 5, 2)):
        scores = np.asarray(products(timelines.events(user, 0, history_length)[None]))
        assert ranks.everything[user] == 1 + np.sum(scores > scores[target - 1])


def test_padding_trains_nothing(encoder):
    model, batch = encoder
    loss = jax.jit(lambda batch: _loss(model)(model, batch, jax.random.key(0))[0])
    changed = {name: batch[name].copy() for name in ("events", "next", "positions")}
    for array in changed.values():
        array[:, 5:] = 3
    np.testing.assert_array_equal(loss({**batch, **changed}), loss(batch))


def test_with_many_negatives_the_loss_is_that_of_the_exact_softmax(encoder):
    """However unevenly they are drawn: 20,000 draws leave each item's share uncertain by a few percent at most."""
    model, batch = encoder
    log_q = negative_log_q(np.arange(model.config.schema.num_items + 1), model.config.table_rows)

    def item_losses(negatives, draws):
        loss = jax.jit(lambda key: _loss(model, negatives=negatives, log_q=log_q)(model, batch, key)[1]["item_loss"])
        return np.array([loss(jax.random.key(draw)) for draw in range(draws)])

    [exact] = item_losses(0, 1)
    np.testing.assert_allclose(item_losses(20_000, 4), exact, atol=0.02)
    assert item_losses(1, 8).std() > 0.1  # a single negative says little of the others


def test_negatives_are_drawn_by_frequency_to_three_quarters_and_never_what_was_not_seen():
    log_q = negative_log_q(np.array([0, 16, 1, 0]), 6)
    np.testing.assert_allclose(np.exp(log_q), [0, 8 / 9, 1 / 9, 0, 0, 0], rtol=1e-6)


def test_with_transitions_the_encoder_scores_each_target_once(make_timelines, mesh_of, tmp_path, monkeypatch):
    """For all weights together, and on test for itself and the sum; its own results are those that it has without transitions."""
    rng = np.random.default_rng(0)
    timelines = make_timelines([rng.integers(1, 13, rng.integers(3, 9)).tolist() for _ in range(20)], num_items=12)
    data, calls = Dataset(timelines, leave_last_out(timelines)), []
    monkeypatch.setattr(module, "score_next", lambda *about: calls.append(1) or score_next(*about))

    def results(weights):
        config = tiny_config()
        config.pretrain_encoder.transitions = weights
        task = module.build("pretrain_encoder", Run(read_config(config), epath.Path(tmp_path), mesh_of()), data)
        noise = np.random.default_rng(1)
        params = jax.tree.map(lambda like: noise.normal(size=like.shape).astype(like.dtype), task.shapes)
        found = {}
        for row in task.results(params):
            found.setdefault(row["method"], {})[row["metric"]] = row["value"]
        return found

    alone = results(())
    assert len(calls) == 1  # a batch of test users
    assert set(alone) == {"encoder"}
    found = results((50.0, 20.0))
    assert len(calls) == 1 + 2
    assert set(found) == {"encoder", "encoder+transitions"} and found["encoder"] == alone["encoder"]
    assert found["encoder+transitions"] != found["encoder"]
    assert results((0.0,)) == alone  # the weight that is chosen adds nothing, and no row says that it does
