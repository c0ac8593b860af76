"""The state of training and the one jitted step that changes it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.memory import compiling
from user_llm.common.trees import Params
from user_llm.nn.losses import Whole
from user_llm.training.task import Batch, Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes; the dropout key is derived from the seed and `step`."""

    step: jax.Array
    trainable: Params
    frozen: Params
    opt_state: Any

    @property
    def params(self) -> Params:
        """The whole parameter tree."""
        return trees.combine(self.trainable, self.frozen)


def cast(tree: Params, dtype: jnp.dtype) -> Params:
    """Return arrays, or the shapes of arrays, with floating-point leaves in `dtype`, but for those that take fewer bytes already.

    These are weights that nothing trains, as their checkpoint holds them (`nn/stored.py`); they and leaves in `dtype` are not copied.
    """
    dtype = jnp.dtype(dtype)

    def to_dtype(a: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        if a.dtype == dtype or not jnp.issubdtype(a.dtype, jnp.floating) or a.dtype.itemsize < dtype.itemsize:
            return a
        if isinstance(a, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding)
        return a.astype(dtype)

    return jax.tree.map(to_dtype, tree)


def split_batch(batch: Batch, parts: int, shards: int) -> Batch:
    """Return arrays [parts, rows / parts, ...]; each part has rows of every device.

    Raises:
      ValueError: a batch that the parts, or `shards` devices within them, do not divide.
    """

    def split(array: jax.Array) -> jax.Array:
        if array.shape[0] % (parts * shards):
            raise ValueError(f"{array.shape[0]} rows cannot be computed in {parts} parts by {shards} devices (data x fsdp).")
        return jnp.swapaxes(array.reshape(-1, parts, *array.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, like: TrainState, *, seed: int, dtype: jnp.dtype, parts: int = 1
) -> jax.stages.Wrapped:
    """Return the jitted (state, batch) -> (state, scalars); the state given is donated. A batch holds `task.beside`, too.

    What comes out is sharded as in `like`: left to itself, XLA may choose otherwise, and the next step compiles again. With
    `parts` above 1 the gradient is summed up over as many parts of the batch, one in memory at a time; scalars named `loss` are sums
    over the parts as the loss is, all others means.
    """
    where = jax.tree.map(lambda a: a.sharding, like)

    def gradient(state: TrainState, batch: Batch, key: jax.Array, whole: Whole | None) -> tuple[jax.Array, dict, Params]:
        def loss(trainable: Params):
            return task.loss(cast(trees.combine(trainable, state.frozen), dtype), batch, key, whole)

        (value, scalars), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        return value, scalars, grads

    def accumulated(state: TrainState, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict, Params]:
        whole = {**task.counts(batch), "parts": jnp.asarray(parts)}
        beside = {name: batch[name] for name in task.beside}
        rows = {name: arrays for name, arrays in batch.items() if name not in beside}
        of_parts = split_batch(rows, parts, meshes.row_shards(jax.sharding.get_abstract_mesh()))

        def add(grads: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, tuple]:
            rows, key = part
            value, scalars, more = gradient(state, rows | beside, key, whole)
            return jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, grads, more), where.trainable), (value, scalars)

        start = jax.tree.map(jnp.zeros_like, state.trainable)
        grads, (values, scalars) = jax.lax.scan(add, start, (of_parts, jax.random.split(key, parts)))
        reduced = {name: found.sum() if name.endswith("loss") else found.mean() for name, found in scalars.items()}
        return values.sum(), reduced, grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, scalars, grads = gradient(state, batch, key, None) if parts == 1 else accumulated(state, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        scalars = {"loss": value, "grad_norm": optax.tree.norm(grads), **scalars}
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), scalars

    return jax.jit(train_step, donate_argnums=0, out_shardings=(where, None))


def check_memory(step: jax.stages.Wrapped, state: TrainState, batch: Batch, mesh: Mesh) -> None:
    """Compile the step, which its first call then reuses, and refuse what the devices cannot hold.

    Raises:
      ValueError: the step needs more memory than is free.
    """
    with compiling():
        stats = step.lower(state, batch).compile().memory_analysis()
    if stats is None:  # not every backend tells
        return
    needed = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    free = meshes.free_bytes(mesh)
    if needed > free:
        raise ValueError(
            f"A step needs {needed / 1e9:.2f} GB on each device and {free / 1e9:.2f} GB are free: lower the batch "
            "(rows, row_length or batch_size) or loss.chunk, raise loop.accumulation_steps, or share it among more devices."
        )
