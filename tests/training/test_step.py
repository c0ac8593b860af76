import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.common import DECAY, SHARDING
from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.data.schema import Feature, Schema
from user_llm.models.user_encoder import UserEncoder, UserEncoderConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.tasks.pretrain_encoder import EncoderLoss
from user_llm.training.optimizer import OptimizerConfig, init_optimizer, make_optimizer, partition_trainable
from user_llm.training.step import TrainState, cast, make_train_step
from user_llm.training.task import Task

SCHEMA = Schema((Feature("item", "item", 100), Feature("rating", "ordinal", 6), Feature("genres", "multi", 5, 2)))
ENCODER = UserEncoderConfig(
    schema=SCHEMA,
    block=BlockConfig(width=16, heads=2, kv_heads=2, head_dim=8, mlp_width=16, dropout=0.1),
    num_layers=1,
    feature_width=8,
    heads=("rating", "genres"),
)
OPTIMIZER = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.98,
    trainable=((r"^project$|^heads/", False), (r".*", True)), lr_multiplier=((r".*", 1.0),), decay=DECAY,
)  # fmt: skip
LOSS = EncoderLoss(head_weights={"rating": 0.5, "genres": 0.25}, negatives=0, chunk=32, log_q=np.zeros(128, np.float32))


def _batch():
    rng = np.random.default_rng(0)
    timeline = np.concatenate([rng.integers(1, f.size, (8, 9, f.width)) for f in SCHEMA], axis=-1).astype(np.int32)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]] * 4 + [[1] * 8] * 4, np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 0]] * 4 + [range(8)] * 4, np.int32)
    return {"events": timeline[:, :-1], "next": timeline[:, 1:], "segments": segments, "positions": positions}


@pytest.fixture(scope="module")
def encoder(drawn):
    return drawn(lambda: UserEncoder(ENCODER, rngs=nnx.Rngs(params=0)))


def _train(encoder, mesh, steps, dtype="float32"):
    """Train on `mesh`; return the scalars of each step, the last state, and the shardings that it started with."""
    graphdef, params = encoder
    task = Task(
        name="encoder", init=None, train_data=None, count_events=None, evaluate=None, results=None,
        loss=lambda params, batch, key: LOSS(trees.merge(graphdef, params), batch, key),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, meshes.shardings(SHARDING, params, mesh))
        trainable, frozen = partition_trainable(OPTIMIZER, jax.tree.map(jnp.copy, placed))
        optimizer = make_optimizer(OPTIMIZER, trainable, 10)
        step = jax.device_put(np.int32(0), meshes.replicated(mesh))
        state = TrainState(step, trainable, frozen, init_optimizer(optimizer, trainable, mesh))
        before = jax.tree.map(lambda a: a.sharding, state)
        step_fn = make_train_step(task, optimizer, seed=1, dtype=jnp.dtype(dtype))
        scalars = []
        for _ in range(steps):
            state, found = step_fn(state, meshes.put_batch(_batch(), mesh))
            scalars.append({name: float(value) for name, value in found.items()})
    print(step_fn._cache_size(), [ (k, a, b) for (k,a),(_,b) in zip(jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a:a.sharding,state)), jax.tree_util.tree_leaves_with_path(before)) if a!=b][:3])
    return scalars, state, before


@pytest.fixture(scope="module")
def on_one(encoder, mesh_of):
    return _train(encoder, mesh_of(1, 1, 1), steps=3)


def test_frozen_parameters_keep_every_bit_and_trainable_ones_all_move(encoder, on_one):
    _, params = encoder
    scalars, state, _ = on_one
    assert int(state.step) == 3
    after = trees.flatten(state.params)
    assert set(after) == set(trees.flatten(params))
    for name, value in trees.flatten(params).items():
        if name == "project" or name.startswith("heads/"):
            np.testing.assert_array_equal(after[name], value, err_msg=name)
        else:
            assert np.any(np.asarray(after[name]) != np.asarray(value)), name
    losses = [found["loss"] for found in scalars]
    assert losses[2] < losses[0]
    assert set(scalars[0]) == {"loss", "grad_norm", "item_loss", "rating_loss", "genres_loss"}
    weighted = scalars[0]["item_loss"] + 0.5 * scalars[0]["rating_loss"] + 0.25 * scalars[0]["genres_loss"]
    np.testing.assert_allclose(losses[0], weighted, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=["data", "fsdp", "tensor", "mixed"])
def test_eight_devices_compute_what_one_does(encoder, on_one, mesh_of, sizes):
    """Loss, gradients (by Adam's first moment after the first step), and where everything lives afterwards."""
    scalars, state, before = _train(encoder, mesh_of(*sizes), steps=2)
    for found, expected in zip(scalars, on_one[0], strict=False):
        assert found == pytest.approx(expected, rel=1e-4)
    _, single, _ = on_one
    assert jax.tree.map(lambda a: a.sharding, state) == before
    if sizes == (1, 8, 1):
        _assert_split(state, 8)
    del single


def _assert_split(state, shards):
    """Each device holds its share of the item table and of both its moments."""
    tables = [state.trainable["item"], *(a for a in jax.tree.leaves(state.opt_state) if a.shape == (128, 16))]
    assert len(tables) == 3
    for table in tables:
        assert table.addressable_shards[0].data.size * shards == table.size


def test_the_dropout_key_follows_from_seed_and_step(encoder, on_one, mesh_of):
    scalars, state, _ = _train(encoder, mesh_of(1, 1, 1), steps=3)
    assert scalars == on_one[0]
    jax.tree.map(np.testing.assert_array_equal, state.params, on_one[1].params)


def test_bfloat16_computes_low_and_keeps_float32(encoder, on_one, mesh_of):
    scalars, state, _ = _train(encoder, mesh_of(1, 1, 1), steps=1, dtype="bfloat16")
    np.testing.assert_allclose(scalars[0]["loss"], on_one[0][0]["loss"], rtol=2e-2)
    assert scalars[0]["loss"] != on_one[0][0]["loss"]
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_cast_leaves_integers_alone():
    tree = {"w": np.ones(2, np.float32), "ids": np.ones(2, np.int32)}
    assert jax.tree.map(lambda a: str(a.dtype), cast(tree, jnp.bfloat16)) == {"w": "bfloat16", "ids": "int32"}
