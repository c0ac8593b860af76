"""The gated MLP of every transformer layer here."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from user_llm.common.mesh import constrain
from user_llm.nn.lora import LoRAConfig, adapters
from user_llm.nn.stored import times, weight_param

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


def gated(activation: str, gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """Return activation(gate) * up.

    The backward pass computes the activation again. Otherwise the activation and its intermediate results would be kept until then.
    """
    return jax.checkpoint(lambda gate, up: ACTIVATIONS[activation](gate) * up)(gate, up)


class MLP(nnx.Module):
    """down(activation(gate_proj(x)) * up(x)), the gated MLP of Shazeer 2020."""

    def __init__(
        self, width: int, mlp_width: int, *, activation: str, lora: LoRAConfig | None = None, quantize: str = "", rngs: nnx.Rngs
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}.")
        self.activation = activation
        self.gate_proj = weight_param(rngs, (width, mlp_width), 1, quantize)
        self.up = weight_param(rngs, (width, mlp_width), 1, quantize)
        self.down = weight_param(rngs, (mlp_width, width), 1, quantize)
        self.lora = adapters(lora, "mlp", {name: (getattr(self, name), 1) for name in ("gate_proj", "up", "down")}, rngs)

    def __call__(self, x: Float[Array, "... D"], *, key: Array | None = None) -> Float[Array, "... D"]:
        # As one matrix of rows: the gradients of products over [B, T, D] are slower on CPU.
        rows = x.reshape(-1, x.shape[-1])
        gate, up = times(jnp.matmul, rows, self.gate_proj), times(jnp.matmul, rows, self.up)
        if self.lora is not None:
            gate, up = gate + self.lora("gate_proj", rows, key), up + self.lora("up", rows, key)
        hidden = constrain(gated(self.activation, gate, up), "rows", "features")
        out = times(jnp.matmul, hidden, self.down)
        if self.lora is not None:
            out += self.lora("down", hidden, key)
        return out.reshape(x.shape)
