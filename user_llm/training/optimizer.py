"""AdamW from rules: which parameters train, how fast each learns, which decay.

Only the trainable subtree is ever differentiated or has optimizer state; frozen parameters are not masked but absent (masking
with `optax.masked` would pass raw gradients through to them).
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.trees import Params, Rules


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
      learning_rate: peak, after `warmup_steps` of linear rise.
      schedule: `constant`, or `cosine` down to a tenth of the peak at the last step.
      trainable: rules to bool.
      lr_multiplier: rules to float.
      decay: rules to bool; gates, norms, biases, embeddings and latents should be False.
    """

    learning_rate: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    trainable: Rules
    lr_multiplier: Rules
    decay: Rules


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return step -> learning rate."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        return optax.schedules.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "cosine":
        if total_steps <= warmup:
            raise ValueError(f"A cosine schedule of {total_steps} steps has no room after {warmup} warmup steps.")
        return optax.schedules.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps, peak / 10)
    raise ValueError(f"Unknown schedule {config.schedule!r}: choose constant or cosine.")


def make_optimizer(config: OptimizerConfig, params: Params, total_steps: int) -> optax.GradientTransformation:
    """Build the optimizer of the trainable subtree `params`."""
    decay = trees.match(config.decay, params)
    multiplier = trees.match(config.lr_multiplier, params)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decay),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multiplier)),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )


def abstract_optimizer(optimizer: optax.GradientTransformation, params: Params, mesh: Mesh) -> optax.OptState:
    """Return the shapes and shardings of the optimizer's state: moments live where their parameters do, counters everywhere."""
    shapes = jax.eval_shape(optimizer.init, params)
    where = optax.tree.map_params(
        optimizer, lambda _, param: param.sharding, shapes, params, transform_non_params=lambda _: meshes.replicated(mesh)
    )
    return meshes.placed(shapes, where)


def init_optimizer(optimizer: optax.GradientTransformation, params: Params, mesh: Mesh) -> optax.OptState:
    """Return the optimizer's first state; left to itself, `jax.jit(optimizer.init)` puts the whole of it on every device."""
    where = jax.tree.map(lambda a: a.sharding, abstract_optimizer(optimizer, params, mesh))
    return jax.jit(optimizer.init, out_shardings=where)(params)


def partition_trainable(config: OptimizerConfig, params: Params) -> tuple[Params, Params]:
    """Split parameters into (trainable, frozen); whole numbers are data, such as an item's features, and never train."""
    rules = trees.match(config.trainable, params)
    chosen = jax.tree.map(lambda yes, leaf: yes and jnp.issubdtype(leaf.dtype, jnp.floating), rules, params)
    return trees.partition(chosen, params)
