import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.training.optimizer import (
    OptimizerConfig,
    clipped,
    init_optimizer,
    learning_rate_schedule,
    make_optimizer,
    partition_trainable,
)

CONFIG = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, clip_norm=1e9, b1=0.9, b2=0.98,
    first_moment="float32", second_moment="float32", muon=False, matrices=((r".*", ()),),
    trainable=((r"^llm/", False), (r".*", True)),
    lr_multiplier=((r"gate$", 10.0), (r"slow", 0.1), (r".*", 1.0)),
    decay=((r"(gate|scale)$", False), (r".*", True)),
)  # fmt: skip
PARAMS = {
    "llm": {"q": np.full((2, 2), 3.0, np.float32)},
    "cross": {"gate": np.float32(0.5), "o": np.full((2, 4), 2.0, np.float32), "scale": np.ones(2, np.float32)},
    "slow": {"o": np.full(2, 2.0, np.float32)},
}


def _steps(config, count, gradient):
    """Apply constant gradients; return (trainable before, after, optimizer state)."""
    trainable, _ = partition_trainable(config, PARAMS)
    optimizer = make_optimizer(config, trainable, total_steps=10)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda a: jnp.full_like(a, gradient), params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = trainable, optimizer.init(trainable)
    for _ in range(count):
        params, state = step(params, state)
    return trees.flatten(trainable), {name: np.asarray(a) for name, a in trees.flatten(params).items()}, state


def test_frozen_parameters_are_absent_from_the_trainable_tree_and_from_the_state():
    trainable, frozen = partition_trainable(CONFIG, PARAMS)
    assert set(trees.flatten(frozen)) == {"llm/q"}
    assert set(trees.flatten(trainable)) == {"cross/gate", "cross/o", "cross/scale", "slow/o"}
    sizes = [a.size for a in jax.tree.leaves(make_optimizer(CONFIG, trainable, 10).init(trainable)) if a.ndim]
    assert sum(sizes) + 2 == 2 * trees.count(trainable)  # two moments; the gate's have no dimensions


def test_without_gradients_only_what_decays_moves():
    before, after, _ = _steps(CONFIG, 1, gradient=0.0)
    np.testing.assert_array_equal(after["cross/gate"], before["cross/gate"])
    np.testing.assert_array_equal(after["cross/scale"], before["cross/scale"])
    np.testing.assert_allclose(after["cross/o"], 2 * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(after["slow/o"], 2 * (1 - 0.1 * 0.5 * 0.1), rtol=1e-6)


def test_multipliers_scale_each_step():
    """Adam's first steps with equal gradients are the learning rate in size, whatever the gradients'."""
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    before, after, _ = _steps(config, 3, gradient=7.0)
    moved = {name: (after[name] - before[name]).mean() for name in after}
    expected = {"cross/gate": -3.0, "cross/o": -0.3, "cross/scale": -0.3, "slow/o": -0.03}
    assert moved == pytest.approx(expected, rel=1e-4)


def test_clipping_is_by_the_norm_of_trainable_gradients_together():
    """Nothing shows in Adam's steps, so look at its first moment: 0.1 of the clipped gradient."""
    _, _, state = _steps(dataclasses.replace(CONFIG, clip_norm=1.0), 1, gradient=7.0)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(mu), 0.1, rtol=1e-5)


def test_clipped_by_hand():
    """Their norm is 5. What is shorter, 0 among it, stays as it is; what is no number is not hidden."""
    updates = {"a": np.float32([3.0, 0.0]), "b": np.float32([4.0])}
    jax.tree.map(np.testing.assert_allclose, clipped(updates, 1.0), {"a": [0.6, 0.0], "b": [0.8]})
    jax.tree.map(np.testing.assert_array_equal, clipped(updates, 5.5), updates)
    zeros = jax.tree.map(np.zeros_like, updates)
    jax.tree.map(np.testing.assert_array_equal, clipped(zeros, 1.0), zeros)
    assert np.isnan(clipped({"a": np.float32([np.nan]), "b": np.float32([1.0])}, 1.0)["b"])


def test_schedules_by_hand():
    constant = learning_rate_schedule(dataclasses.replace(CONFIG, warmup_steps=4), 100)
    np.testing.assert_allclose([constant(step) for step in (0, 2, 4, 99)], [0, 0.05, 0.1, 0.1], rtol=1e-6)
    config = dataclasses.replace(CONFIG, warmup_steps=4, schedule="cosine")
    cosine = learning_rate_schedule(config, 104)
    np.testing.assert_allclose([cosine(step) for step in (0, 4, 54, 104)], [0, 0.1, 0.055, 0.01], rtol=1e-5)
    with pytest.raises(ValueError, match=r"^optimizer.warmup_steps=4: a cosine schedule of 4 steps has no room for them"):
        learning_rate_schedule(config, 4)
    with pytest.raises(ValueError, match="Unknown schedule 'linear': choose constant or cosine"):
        learning_rate_schedule(dataclasses.replace(CONFIG, schedule="linear"), 100)


def test_moments_live_where_their_parameters_do(mesh_of):
    """On every device they would be half of all memory twice over."""
    mesh = mesh_of(1, 2, 2)
    rules = ((r"cross/o$", ("fsdp", "tensor")), (r".*", ()))
    trainable, _ = partition_trainable(CONFIG, PARAMS)
    trainable = jax.device_put(trainable, meshes.shardings(rules, trainable, mesh))
    state = init_optimizer(make_optimizer(CONFIG, trainable, 10), trainable, mesh)
    where = jax.tree.map(lambda a: a.sharding, trainable)
    for moment in ("mu", "nu"):
        assert jax.tree.map(lambda a: a.sharding, optax.tree.get(state, moment)) == where
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))


def test_second_moments_in_bfloat16_or_factored_move_about_as_far():
    """With equal gradients every one of them steps by the learning rate, whatever the gradients' size."""
    for second in ("bfloat16", "factored"):
        config = dataclasses.replace(CONFIG, weight_decay=0.0, first_moment="bfloat16", second_moment=second)
        before, after, state = _steps(config, 3, gradient=7.0)
        moved = {name: (after[name] - before[name]).mean() for name in ("cross/o", "slow/o")}
        assert moved == pytest.approx({"cross/o": -0.3, "slow/o": -0.03}, rel=0.02), second
        assert {str(a.dtype) for a in jax.tree.leaves(state) if a.ndim} == (
            {"bfloat16"} if second == "bfloat16" else {"bfloat16", "float32"}
        )


def test_what_moments_take(mesh_of):
    """Of a matrix of 256 x 512: 4 bytes a number twice, 2 twice, or 2 once and a row and a column of 4."""
    params = {"w": jax.device_put(np.ones((256, 512), np.float32), meshes.replicated(mesh_of()))}
    rules = {"trainable": ((r".*", True),), "lr_multiplier": ((r".*", 1.0),), "decay": ((r".*", True),)}
    taken = {}
    for first, second in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "factored")):
        config = dataclasses.replace(CONFIG, first_moment=first, second_moment=second, **rules)
        state = init_optimizer(make_optimizer(config, params, 10), params, mesh_of())
        taken[second] = sum(a.nbytes for a in jax.tree.leaves(state) if a.ndim)
    size = 256 * 512
    assert taken == pytest.approx({"float32": 8 * size, "bfloat16": 4 * size, "factored": 2 * size + 4 * (256 + 512)}, abs=16)


def test_moments_that_there_are_not_or_cannot_follow_are_refused():
    trainable, _ = partition_trainable(CONFIG, PARAMS)
    with pytest.raises(ValueError, match="Unknown optimizer.first_moment 'float16'"):
        make_optimizer(dataclasses.replace(CONFIG, first_moment="float16"), trainable, 10)
    with pytest.raises(
        ValueError, match=r"^optimizer.b2=0.999: a second moment in bfloat16 cannot follow it, set 0.99 or less"
    ):
        make_optimizer(dataclasses.replace(CONFIG, second_moment="bfloat16", b2=0.999), trainable, 10)


def test_muon_makes_the_step_of_each_matrix_orthogonal(mesh_of):
    """A step is U V' of the gradient's singular vectors, with a root mean square of 0.2, within the error of five Newton-Schulz iterations."""
    rng = np.random.default_rng(0)
    params = {
        "q": np.zeros((8, 2, 3), np.float32),  # 8 inputs, 2 x 3 outputs
        "o": np.zeros((2, 3, 8), np.float32),  # 2 x 3 inputs, 8 outputs
        "stacked": np.zeros((2, 4, 6), np.float32),  # two matrices
        "gate": np.zeros(2, np.float32),
    }
    rules = (("^q$", (1, 2)), ("^o$", (2, 1)), ("^stacked$", (1, 1)), ("^gate$", ()))
    config = dataclasses.replace(CONFIG, muon=True, matrices=rules, lr_multiplier=((".*", 1.0),), weight_decay=0.0)
    grads = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in params.items()}
    optimizer = make_optimizer(config, params, 10)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    matrices = [
        (-updates["q"].reshape(8, 6), grads["q"].reshape(8, 6)),
        (-updates["o"].reshape(6, 8), grads["o"].reshape(6, 8)),
    ]
    for layer in range(2):
        matrices.append((-updates["stacked"][layer], grads["stacked"][layer]))
    for update, grad in matrices:
        u, _, v = np.linalg.svd(grad, full_matrices=False)
        expected = 0.1 * 0.2 * max(grad.shape) ** 0.5 * (u @ v)
        assert (update * expected).sum() > 0.97 * np.linalg.norm(update) * np.linalg.norm(expected)
        size = np.sqrt(np.mean(np.square(update))) / 0.1  # of the learning rate
        assert 0.85 < size / 0.2 < 1.1
    np.testing.assert_allclose(updates["gate"], -0.1 * np.sign(grads["gate"]), rtol=1e-5)  # Adam's first step
    # One mean of each matrix, and two moments of all else, each where its parameter is.
    assert sum(a.size for a in jax.tree.leaves(state) if a.shape in {p.shape for p in params.values()}) == 48 + 48 + 48 + 2 * 2
    mesh = mesh_of(1, 2, 2)
    placed = jax.device_put(params, meshes.shardings((("^q$", ("fsdp", "tensor", None)), (".*", ())), params, mesh))
    moments = [
        a for a in jax.tree.leaves(init_optimizer(make_optimizer(config, placed, 10), placed, mesh)) if a.shape == (8, 2, 3)
    ]
    assert [moment.sharding for moment in moments] == [placed["q"].sharding]


def test_muon_keeps_its_mean_in_half_precision_and_moves_by_almost_the_same():
    rng = np.random.default_rng(0)
    params, grads = {"w": np.zeros((8, 6), np.float32)}, {"w": rng.normal(size=(8, 6)).astype(np.float32)}
    config = dataclasses.replace(
        CONFIG, muon=True, matrices=((r".*", (1, 1)),), lr_multiplier=((r".*", 1.0),), weight_decay=0.0
    )
    moved = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(config, first_moment=dtype), params, 10)
        _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        updates, state = jax.jit(optimizer.update)(grads, state, params)  # which reads the mean that was kept
        assert [str(a.dtype) for a in jax.tree.leaves(state) if a.shape == (8, 6)] == [dtype]
        moved[dtype] = np.asarray(updates["w"])
    assert (moved["float32"] != moved["bfloat16"]).any()
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], atol=0.02 * np.abs(moved["float32"]).max())


def test_a_matrix_with_too_few_axes_is_refused():
    config = dataclasses.replace(CONFIG, muon=True, matrices=((r".*", (1, 1)),))
    with pytest.raises(ValueError, match=r"^optimizer.matrices: norm/scale has 1 axes, and \(1, 1\) asks for 2\.$"):
        make_optimizer(config, {"norm": {"scale": np.ones(2, np.float32)}}, 10)
