"""A mixture of experts: many gated MLPs, of which each token goes through a few (Qwen3 mixture of experts).

Tokens are sorted by their experts, and `ragged_dot` multiplies each expert's own run of rows: no token is dropped. On CPUs JAX makes
dense products of it: every expert computes all rows, and what is not its own counts 0, for X times the products and memory. Left out: a loss that spreads tokens evenly over experts, adapters of the experts' weights, and experts shared out over devices; the mesh
splits each expert's matrices instead, as it does those of an MLP.

Axis letters besides those of `nn/attention.py`: R rows, X experts, C experts of a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from user_llm.common.arrays import AnyArray
from user_llm.nn.layers import linear_param
from user_llm.nn.mlp import ACTIVATIONS, gated
from user_llm.nn.stored import times


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """How many experts there are.

    Attributes:
      count: of experts, X.
      per_token: the experts that a token goes through, C: those of the largest probabilities.
      normalised: whether the probabilities of these are scaled to a sum of 1.
    """

    count: int
    per_token: int
    normalised: bool

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"Tokens cannot go through {self.per_token} of {self.count} experts.")


class Experts(nnx.Module):
    """The sum over a token's experts of probability * mlp(x). Parameters: gate [D, X], gate_proj and up [X, D, F], down [X, F, D]."""

    def __init__(self, config: ExpertsConfig, width: int, mlp_width: int, *, activation: str, rngs: nnx.Rngs):
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}.")
        self.config, self.activation = config, activation
        self.gate = linear_param(rngs, (width, config.count), fan_in=width)
        self.gate_proj = linear_param(rngs, (config.count, width, mlp_width), fan_in=width)
        self.up = linear_param(rngs, (config.count, width, mlp_width), fan_in=width)
        self.down = linear_param(rngs, (config.count, mlp_width, width), fan_in=mlp_width)

    def __call__(self, x: Float[Array, "... D"], *, key: Array | None = None) -> Float[Array, "... D"]:
        c, rows = self.config, x.reshape(-1, x.shape[-1])
        router = times(jnp.matmul, rows, self.gate)
        share, expert = jax.lax.top_k(jax.nn.softmax(router.astype(jnp.float32), axis=-1), c.per_token)
        if c.normalised:
            share /= share.sum(axis=-1, keepdims=True)
        # `order` sorts pairs of a token and one of its experts; pair p is of token p // C.
        order = jnp.argsort(expert.reshape(-1), stable=True)
        sizes = jnp.bincount(expert.reshape(-1), length=c.count)
        by_expert = rows[order // c.per_token]

        def each_by_its_expert(rows: Array, weight: AnyArray) -> Array:
            return jax.lax.ragged_dot(rows, jnp.asarray(weight, rows.dtype), sizes)

        gate, up = (times(each_by_its_expert, by_expert, weight) for weight in (self.gate_proj, self.up))
        out = times(each_by_its_expert, gated(self.activation, gate, up), self.down)
        out = out[jnp.argsort(order)].reshape(len(rows), c.per_token, -1)
        return jnp.einsum("RCD,RC->RD", out, share.astype(out.dtype)).reshape(x.shape)
