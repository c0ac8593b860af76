"""AdamW, or Muon for matrices, from rules: which parameters train, how fast each learns, which decay.

Only the trainable subtree is ever differentiated or has optimizer state; frozen parameters are not masked but absent (masking
with `optax.masked` would pass raw gradients through to them).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from optax import contrib

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.trees import Params, Rules


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, and the schedule.

    Attributes:
      learning_rate: peak, after `warmup_steps` of linear rise.
      schedule: `constant`, or `cosine` down to a tenth of the peak at the last step.
      trainable: rules to bool.
      lr_multiplier: rules to float.
      decay: rules to bool; gates, norms, biases, embeddings and latents should be False.
      b1, b2: decay a step of the mean gradient and of the mean square, of parameters that Muon does not move. Muon's own mean has
        optax's 0.95.
      first_moment: `float32` or `bfloat16`, in which the mean gradient is kept between steps, Muon's own too.
      second_moment: likewise of the mean square, of parameters that Muon does not move; or `factored`: Adafactor's means over rows and
        columns (Shazeer and Stern 2018), whose memory is next to nothing, with its own decay in place of `b2` and updates clipped to a
        root mean square of 1.
      muon: whether Muon moves the matrices, and Adam or Adafactor only the rest.
      matrices: rules to (inputs, outputs): how many of the last axes of a weight are those of a matrix product's inputs and outputs; axes
        before them number matrices that are stacked. Empty for what is no matrix.
    """

    learning_rate: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    first_moment: str
    second_moment: str
    muon: bool
    matrices: Rules
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
            raise ValueError(f"optimizer.warmup_steps={warmup}: a cosine schedule of {total_steps} steps has no room for them.")
        return optax.schedules.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps, peak / 10)
    raise ValueError(f"Unknown schedule {config.schedule!r}: choose constant or cosine.")


def clipped(updates: Params, most: float) -> Params:
    """Scale updates so that the norm of all of them together is at most `most`.

    All updates are multiplied by one shared number. XLA fuses that product; it would store quotients.
    """
    scale = jnp.minimum(1.0, most / optax.tree.norm(updates))
    return jax.tree.map(lambda update: (update * scale).astype(update.dtype), updates)


def scale_by_moments(config: OptimizerConfig) -> optax.GradientTransformation:
    """Divide a mean of past gradients by the root of their mean square, as Adam or Adafactor does.

    Raises:
      ValueError: no such precision, or one that cannot hold the steps of a mean as slow as `b2`.
    """
    first, second = config.first_moment, config.second_moment
    if first not in ("float32", "bfloat16") or second not in ("float32", "bfloat16", "factored"):
        raise ValueError(
            f"Unknown optimizer.first_moment {first!r} or second_moment {second!r}: choose float32 or bfloat16, or for the second "
            "factored."
        )
    if second == "factored":
        mean = optax.ema(config.b1, accumulator_dtype=jnp.dtype(first))
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), mean)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=jnp.dtype(first))
    if second == "float32":
        return adam
    if config.b2 > 0.99:
        raise ValueError(f"optimizer.b2={config.b2}: a second moment in bfloat16 cannot follow it, set 0.99 or less.")

    def kept(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
        return state._replace(nu=optax.tree.cast(state.nu, dtype))

    def update(updates: Params, state: optax.ScaleByAdamState, params: Params | None = None):
        updates, state = adam.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, jnp.bfloat16)

    return optax.GradientTransformation(lambda params: kept(adam.init(params), jnp.bfloat16), update)


def scale_by_muon(config: OptimizerConfig, params: Params, rest: optax.GradientTransformation) -> optax.GradientTransformation:
    """Replace a matrix's mean gradient by the nearest orthogonal matrix (Muon; Jordan 2024), and scale all others by `rest`.

    Its steps have the root mean square of Adam's, 0.2 of the learning rate, whatever the shape (arXiv 2502.16982).

    Raises:
      ValueError: a weight has fewer axes than `matrices` asks for.
    """
    leaves = trees.flatten(params)
    axes = {name: trees.match(config.matrices, {name: leaf})[name] for name, leaf in leaves.items()}
    for name, pair in axes.items():
        if sum(pair) > (count := leaves[name].ndim):
            raise ValueError(f"optimizer.matrices: {name} has {count} axes, and {pair} asks for {sum(pair)}.")
    numbers = {
        name: contrib.MuonDimensionNumbers(tuple(range(-sum(pair), -pair[1])), tuple(range(-pair[1], 0)))
        for name, pair in axes.items()
        if pair
    }
    dimensions = trees.unflatten({name: numbers.get(name, optax.MaskedNode()) for name in axes})
    sizes = {name: max(math.prod(leaves[name].shape[axis] for axis in side) for side in of) for name, of in numbers.items()}
    scales = trees.unflatten({name: 0.2 * sizes[name] ** 0.5 if name in sizes else optax.MaskedNode() for name in axes})
    muon = optax.chain(
        contrib.scale_by_muon(mu_dtype=jnp.dtype(config.first_moment), weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
    )
    labels = trees.unflatten({name: "muon" if name in numbers else "rest" for name in axes})
    return optax.partition({"muon": muon, "rest": rest}, labels)


def make_optimizer(config: OptimizerConfig, params: Params, total_steps: int) -> optax.GradientTransformation:
    """Build the optimizer of the trainable subtree `params`."""
    decay = trees.match(config.decay, params)
    multiplier = trees.match(config.lr_multiplier, params)
    return optax.chain(
        optax.stateless(lambda updates, _: clipped(updates, config.clip_norm)),
        scale_by_muon(config, params, scale_by_moments(config)) if config.muon else scale_by_moments(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multiplier)),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )


def abstract_optimizer(optimizer: optax.GradientTransformation, params: Params, mesh: Mesh) -> optax.OptState:
    """Return the shapes and shardings of the optimizer's state: moments live where their parameters do, all else everywhere."""
    shapes, everywhere = jax.eval_shape(optimizer.init, params), meshes.replicated(mesh)

    def place(moment: jax.ShapeDtypeStruct | optax.MaskedNode, param: jax.Array) -> Any:
        if isinstance(moment, optax.MaskedNode):  # of a parameter that another part of the optimizer moves
            return moment
        return param.sharding if moment.shape == param.shape else everywhere

    where = optax.tree.map_params(
        optimizer, place, shapes, params,
        transform_non_params=lambda _: everywhere, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )  # fmt: skip
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
