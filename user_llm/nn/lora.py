"""Low-rank adapters of frozen weights (LoRA, Hu et al. 2021): W x + alpha / rank * B A x.

B starts at zero, so an adapted model starts as the model it adapts. An adapter lives in the module whose weights it adapts, below
`lora/` and under the weight's own name: `stack/blocks/attn/lora/q/a`. Left out: adapters of embeddings.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from user_llm.common.trees import Params, flatten, unflatten
from user_llm.nn.layers import dropout, linear_param
from user_llm.nn.stored import Weight


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What is adapted and how.

    Attributes:
      rank: of the update.
      alpha: the update is scaled by alpha / rank.
      dropout: on the adapter's input, in training.
      targets: a regex over weights within a layer, such as `attn/q` or `mlp/up`; those that it fully matches are adapted.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoRA needs a rank of at least 1, not {self.rank}.")


class LoRA(nnx.Module):
    """The adapters of one module. Parameters by weight: a [*inputs, rank] and b [rank, *outputs]."""

    def __init__(self, config: LoRAConfig, module: str, weights: Mapping[str, tuple[Weight, int]], *, rngs: nnx.Rngs):
        """Adapt those of `weights` that the config targets; each comes with the number of its input dimensions."""
        self.config = config
        self.names = tuple(name for name in weights if re.fullmatch(config.targets, f"{module}/{name}"))
        for name in self.names:
            inputs = weights[name][1]
            shape = weights[name][0].shape
            a = linear_param(rngs, (*shape[:inputs], config.rank), fan_in=math.prod(shape[:inputs]))
            setattr(self, name, nnx.data({"a": a, "b": nnx.Param(jnp.zeros((config.rank, *shape[inputs:]), jnp.float32))}))

    def __call__(self, name: str, x: Float[Array, "..."], key: Array | None) -> Array | float:
        """Return what the adapter of weight `name` adds to its output for input `x`: 0 where it has none."""
        if name not in self.names:
            return 0.0
        if key is not None:
            key = jax.random.fold_in(key, self.names.index(name))
        x = dropout(x, self.config.dropout, key)
        adapter = getattr(self, name)
        low = jnp.tensordot(x, adapter["a"][...], axes=adapter["a"].ndim - 1)
        return jnp.tensordot(low * (self.config.alpha / self.config.rank), adapter["b"][...], axes=1)


def adapters(config: LoRAConfig | None, module: str, weights: Mapping[str, tuple[Weight, int]], rngs: nnx.Rngs) -> LoRA | None:
    """Return the adapters of a module, or None where none of its weights is a target."""
    lora = None if config is None else LoRA(config, module, weights, rngs=rngs)
    return lora if lora is not None and lora.names else None


def merge_lora(params: Params, config: LoRAConfig) -> Params:
    """Return the parameters of the model without adapters that computes the same: each update added to its weight."""
    flat = flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/lora/" not in path}
    for path in (path for path in flat if re.search("/lora/.*/a$", path)):
        a, b = flat[path], flat[path[:-1] + "b"]
        target = path.removesuffix("/a").replace("/lora/", "/")  # .../attn/lora/q/a adapts .../attn/q
        weight = merged[target]
        layers = weight.shape[: a.ndim + b.ndim - 2 - weight.ndim]  # the leading axis of stacked layers, if any
        update = a.reshape(*layers, -1, config.rank) @ b.reshape(*layers, config.rank, -1)
        merged[target] = weight + (config.alpha / config.rank) * update.reshape(weight.shape)
    return unflatten(merged)
