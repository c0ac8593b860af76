import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from configs import quickstart
from user_llm.common import trees
from user_llm.data import movielens, prepare, synthetic_files
from user_llm.data.splits import leave_last_out
from user_llm.data.synthetic import optimal_ranks
from user_llm.models.user_encoder import UserEncoder
from user_llm.tasks import pretrain_encoder
from user_llm.tasks.context import Context
from user_llm.tasks.pretrain_encoder import EncoderLoss, encoder_config, negative_log_q
from user_llm.training import loop
from user_llm.training.loop import LoopConfig

# Of the optimal predictor's recall@10 on the quick start's world, after the quick start's 400 steps.
SHARE = 0.8


@pytest.mark.slow
def test_the_encoder_reaches_its_share_of_the_optimal_recall(tmp_path, mesh_of):
    config = quickstart.get_config()
    world = synthetic_files.write(tmp_path / "world", seed=config.seed, **config.data.synthetic)
    timelines = prepare.load(movielens.find(tmp_path / "world", tmp_path), epath.Path(tmp_path / "data"), seed=config.seed)
    split = leave_last_out(timelines)
    facts = {"dataset": "synthetic", "seed": 0, "split": split.name, "config_hash": ""}
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        context = Context(config, timelines, split, mesh, epath.Path(tmp_path / "run"), facts)
        phase = config.pretrain_encoder
        task = pretrain_encoder.build(config, "pretrain_encoder", context)
        settings = LoopConfig(**phase.loop), context.optimizer_config("pretrain_encoder")
        _, rows = loop.run(task, *settings, mesh, context.workdir / "pretrain_encoder", seed=0)
    found = next(row["value"] for row in rows if row["metric"] == "recall@10/unseen")
    best = np.mean(optimal_ranks(world, timelines, *split.targets["test"]) <= 10)
    assert SHARE * best < found < 1.05 * best  # above the optimum only by chance


@pytest.fixture
def encoder(drawn, make_timelines):
    """An encoder with a genre head, its timelines and a batch: one row of two histories and padding."""
    timelines = make_timelines([[1, 2, 3], [4, 5, 6, 7]])
    config = quickstart.get_config().encoder
    config.update(num_layers=1, heads=("genres",), dropout=0.0, block={**config.block, "dropout": 0.0})
    selected = timelines.select(tuple(config.features))
    graphdef, params = drawn(lambda: UserEncoder(encoder_config(config, selected.schema), rngs=nnx.Rngs(0)))
    events = [timelines.select(tuple(config.features)).events(user, 0, stop) for user, stop in ((0, 3), (1, 4))]
    width = events[0].shape[1]
    rows = np.concatenate([events[0][:-1], events[1][:-1], np.zeros((2, width), np.int32)])
    following = np.concatenate([events[0][1:], events[1][1:], np.zeros((2, width), np.int32)])
    batch = {
        "events": rows[None], "next": following[None], "segments": np.array([[1, 1, 2, 2, 2, 0, 0]]),
        "positions": np.array([[0, 1, 0, 1, 2, 0, 0]]),
    }  # fmt: skip
    return trees.merge(graphdef, params), {name: jnp.asarray(a) for name, a in batch.items()}


def _loss(encoder, **changes):
    log_q = np.zeros(encoder.config.table_rows, np.float32)
    return dataclasses.replace(EncoderLoss(head_weights={"genres": 0.5}, negatives=0, chunk=4, log_q=log_q), **changes)


def test_the_loss_is_the_mean_over_real_positions_of_the_item_and_half_the_genres(encoder):
    model, batch = encoder
    total, scalars = _loss(model)(model, batch, jax.random.key(0))
    items, genres = [], []
    for start, stop in ((0, 2), (2, 5)):  # each history alone
        events = batch["events"][:, start:stop]
        length = stop - start
        states = model(events, mask=jnp.tril(jnp.ones((1, length, length), bool)), positions=jnp.arange(length)[None])[0]
        scores = jax.nn.log_softmax(model.score(states))
        genre_scores = jax.nn.log_softmax(states @ model.heads["genres"][...])
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


def test_padding_trains_nothing(encoder):
    model, batch = encoder
    loss = _loss(model)
    changed = {name: batch[name].at[:, 5:].set(3) for name in ("events", "next", "positions")}
    same = loss(model, {**batch, **changed}, jax.random.key(0))[0]
    np.testing.assert_array_equal(same, loss(model, batch, jax.random.key(0))[0])


def test_negatives_are_drawn_by_frequency_to_three_quarters_and_never_what_was_not_seen():
    log_q = negative_log_q(np.array([0, 16, 1, 0]), 6)
    np.testing.assert_allclose(np.exp(log_q), [0, 8 / 9, 1 / 9, 0, 0, 0], rtol=1e-6)
