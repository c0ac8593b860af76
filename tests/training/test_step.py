import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.config.defaults import DECAY, SHARDING
from user_llm.data.schema import Feature, Schema
from user_llm.models.user_encoder import UserEncoder, UserEncoderConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.phases.pretrain_encoder import EncoderLoss
from user_llm.training.optimizer import OptimizerConfig, init_optimizer, make_optimizer, partition_trainable
from user_llm.training.step import TrainState, cast, check_memory, make_train_step
from user_llm.training.task import Task

SCHEMA = Schema((Feature("item", "item", 100), Feature("rating", "ordinal", 6)))
ENCODER = UserEncoderConfig(
    schema=SCHEMA,
    block=BlockConfig(width=16, heads=2, kv_heads=2, head_dim=8, mlp_width=16, dropout=0.1),
    num_layers=1,
    feature_width=8,
    heads=("rating",),
)
OPTIMIZER = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.98,
    first_moment="float32", second_moment="float32", muon=False, matrices=((r".*", ()),),
    trainable=((r"^project$|^heads/", False), (r".*", True)), lr_multiplier=((r".*", 1.0),), decay=DECAY,
)  # fmt: skip
LOSS = EncoderLoss(
    head_weights={"rating": 0.5}, negatives=0, chunk=32, log_q=np.zeros(128, np.float32), share=np.zeros(128, np.float32),
    mask_probability=0.0, last_only=0.0,
)  # fmt: skip


def _batch():
    rng = np.random.default_rng(0)
    timeline = np.concatenate([rng.integers(1, f.size, (8, 9, f.width)) for f in SCHEMA], axis=-1).astype(np.int32)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]] * 4 + [[1] * 8] * 4, np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 0]] * 4 + [range(8)] * 4, np.int32)
    return {"events": timeline[:, :-1], "next": timeline[:, 1:], "segments": segments, "positions": positions}


@pytest.fixture(scope="module")
def encoder(drawn):
    return drawn(lambda: UserEncoder(ENCODER, rngs=nnx.Rngs(params=0)))


def _prepare(encoder, mesh, dtype="float32", parts=1, **changes):
    """The state at step 0 and the jitted step."""
    graphdef, params = encoder
    task = Task(
        name="encoder", shapes=params, init=None, train_data=None, steps_per_epoch=1.0, work=1.0, count_events=None, evaluate=None, results=None,
        programs=None, load=None, metrics=(), check=None,
        loss=lambda params, batch, key, whole: LOSS(trees.merge(graphdef, params), batch, key, whole),
        counts=lambda batch: {"events": (batch["segments"] > 0).sum()},
    )  # fmt: skip
    task = dataclasses.replace(task, **changes)
    placed = jax.device_put(jax.tree.map(np.asarray, params), meshes.shardings(SHARDING, params, mesh))
    trainable, frozen = partition_trainable(OPTIMIZER, placed)
    optimizer = make_optimizer(OPTIMIZER, trainable, 10)
    step = jax.device_put(np.int32(0), meshes.replicated(mesh))
    state = TrainState(step, trainable, frozen, init_optimizer(optimizer, trainable, mesh))
    return state, make_train_step(task, optimizer, state, seed=1, dtype=jnp.dtype(dtype), parts=parts)


def _train(encoder, mesh, steps):
    """Train on `mesh`; return the scalars of each step, the last state, and the shardings that it started with."""
    with jax.set_mesh(mesh):
        state, step_fn = _prepare(encoder, mesh)
        before = jax.tree.map(lambda a: a.sharding, state)
        scalars = []
        for _ in range(steps):
            state, found = step_fn(state, meshes.put_batch(_batch(), mesh))
            scalars.append({name: float(value) for name, value in found.items()})
    assert step_fn._cache_size() == 1, "compiled more than once"
    return scalars, state, before


def _trace(encoder, mesh, dtype):
    with jax.set_mesh(mesh):
        state, step_fn = _prepare(encoder, mesh, dtype)
        return step_fn.trace(state, meshes.put_batch(_batch(), mesh))


@pytest.fixture(scope="module")
def on_one(encoder, mesh_of):
    return _train(encoder, mesh_of(1, 1, 1), steps=2)


def test_frozen_parameters_keep_every_bit_and_trainable_ones_all_move(encoder, on_one):
    _, params = encoder
    scalars, state, _ = on_one
    assert int(state.step) == 2
    after = trees.flatten(state.params)
    assert set(after) == set(trees.flatten(params))
    for name, value in trees.flatten(params).items():
        if name == "project" or name.startswith("heads/"):
            np.testing.assert_array_equal(after[name], value, err_msg=name)
        else:
            assert np.any(np.asarray(after[name]) != np.asarray(value)), name
    losses = [found["loss"] for found in scalars]
    assert losses[1] < losses[0]
    assert set(scalars[0]) == {"loss", "grad_norm", "item_loss", "rating_loss"}
    weighted = scalars[0]["item_loss"] + 0.5 * scalars[0]["rating_loss"]
    np.testing.assert_allclose(losses[0], weighted, rtol=1e-6)


MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}


@pytest.mark.parametrize(
    "sizes", [pytest.param(v, marks=[] if k == "mixed" else pytest.mark.slow, id=k) for k, v in MESHES.items()]
)
def test_eight_devices_compute_what_one_does(encoder, on_one, mesh_of, sizes):
    """Two steps' losses and gradient norms, the gradients by Adam's first moment; and everything stays where it was."""
    scalars, state, before = _train(encoder, mesh_of(*sizes), steps=2)
    for found, expected in zip(scalars, on_one[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    moments, expected = (optax.tree.get(s.opt_state, "mu") for s in (state, on_one[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moments, expected)
    assert jax.tree.map(lambda a: a.sharding, state) == before
    if sizes == (1, 8, 1):
        _assert_split(state, 8)


def _assert_split(state, shards):
    """Each device holds its share of the item table and of both its moments."""
    tables = [state.trainable["item"], *(a for a in jax.tree.leaves(state.opt_state) if a.shape == (128, 16))]
    assert len(tables) == 3
    for table in tables:
        assert table.addressable_shards[0].data.size * shards == table.size


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(drawn, mesh_of, sizes):
    """Also where the parts have unlike numbers of events, so that their own means would not do; without dropout."""
    block = dataclasses.replace(ENCODER.block, dropout=0.0)
    encoder = drawn(lambda: UserEncoder(dataclasses.replace(ENCODER, block=block), rngs=nnx.Rngs(params=0)))
    batch = jax.tree.map(lambda a: a[[0, 4, 1, 5, 2, 6, 3, 7]], _batch())  # part 0 has the shorter rows
    found = []
    with jax.set_mesh(mesh_of(*sizes)):
        for parts in (1, 2):
            state, step = _prepare(encoder, mesh_of(*sizes), parts=parts)
            state, scalars = step(state, meshes.put_batch(batch, mesh_of(*sizes)))
            found.append(({name: float(value) for name, value in scalars.items()}, optax.tree.get(state.opt_state, "mu")))
    (whole, mu), (of_parts, mu_of_parts) = found
    assert of_parts == pytest.approx(whole, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), mu_of_parts, mu)


def test_parts_that_do_not_divide_a_batch_are_refused(encoder, mesh_of):
    with jax.set_mesh(mesh_of()):
        state, step = _prepare(encoder, mesh_of(), parts=3)
        with pytest.raises(ValueError, match="8 rows cannot be computed in 3 parts by 1 devices"):
            step(state, meshes.put_batch(_batch(), mesh_of()))


def test_products_are_computed_in_the_given_dtype_and_the_state_stays_float32(encoder, mesh_of):
    """As traced; nothing is compiled."""
    low, wide = (_trace(encoder, mesh_of(), dtype) for dtype in ("bfloat16", "float32"))
    assert "bf16[" in str(low.jaxpr) and "bf16[" not in str(wide.jaxpr)
    new_state, scalars = low.out_info
    assert {a.dtype for a in jax.tree.leaves(new_state.params)} == {jnp.dtype("float32")}
    assert scalars["loss"].dtype == jnp.float32


def test_cast_leaves_integers_alone():
    tree = {"w": np.ones(2, np.float32), "ids": np.ones(2, np.int32)}
    assert jax.tree.map(lambda a: str(a.dtype), cast(tree, jnp.bfloat16)) == {"w": "bfloat16", "ids": "int32"}


def test_memory_is_counted_in_full_before_the_step_runs(mesh_of, monkeypatch):
    """A product of 5,000 x 5,000 float32 numbers is 0.1 GB, whatever the size of what goes in and comes out."""
    step = jax.jit(lambda state, batch: (state @ state.T) @ batch)
    arrays = (jnp.ones((5000, 4)), jnp.ones((5000, 1)))
    monkeypatch.setattr(meshes, "free_bytes", lambda mesh: 99_000_000)
    with pytest.raises(ValueError, match=r"needs 0\.10 GB on each device and 0\.10 GB are free"):
        check_memory(step, *arrays, mesh_of())
    monkeypatch.setattr(meshes, "free_bytes", lambda mesh: 101_000_000)
    check_memory(step, *arrays, mesh_of())


@pytest.mark.parametrize(("sizes", "parts"), [((1, 1, 1), 1), ((2, 2, 2), 2)], ids=str)
def test_what_stands_beside_the_rows_is_whole_everywhere(encoder, mesh_of, sizes, parts):
    """Five numbers beside 8 rows that two parts of eight devices share: every row finds all five, as arguments of the step."""
    graphdef, params = encoder
    beside = {"five": {"numbers": np.arange(5, dtype=np.float32)}}

    def loss(params, batch, key, whole):
        found, _ = LOSS(trees.merge(graphdef, params), batch, key, whole)
        return found, {"rows": jnp.float32(len(batch["events"])), "sum": batch["five"]["numbers"].sum()}

    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        state, step = _prepare(encoder, mesh, parts=parts, beside=beside, loss=loss)
        batch = meshes.put_batch(_batch(), mesh) | meshes.put_whole(beside, mesh)
        assert batch["five"]["numbers"].sharding.is_fully_replicated
        _, scalars = step(state, batch)
    assert (float(scalars["rows"]), float(scalars["sum"])) == (8 / parts, 10)
