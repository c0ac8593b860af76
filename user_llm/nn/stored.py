"""Weights of products that are kept in fewer bytes than what is computed with, because nothing trains them.

Such a weight is a 2-byte number, as a checkpoint holds it, or a code of 8 or 4 bits. Codes come in blocks of up to BLOCK inputs that
share a scale, the largest magnitude among them (QLoRA, Dettmers et al. 2023, section 3; there a block is 64 numbers in storage order).
A weight is restored where it is multiplied with, one product at a time, and once more in the backward pass.
Left out: scales that are quantised themselves, calibration on data, activations in 8 bits.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from user_llm.common.arrays import AnyArray
from user_llm.common.trees import Params, flatten, unflatten
from user_llm.nn.layers import linear_param

BLOCK = 64
# The 16 values of a 4-bit normal float: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KINDS = ("int8", "int4", "nf4")
STEPS = {"int8": 127, "int4": 7}  # whole numbers on either side of 0; both kinds are symmetric
SCALE = jnp.bfloat16  # the type of the scales


class Quantized(nnx.Module):
    """A weight [*inputs, *outputs] in codes. Blocks lie along the last axis of the inputs.

    Parameters: codes, int8 like the weight, or uint8 with two codes of 4 bits in each and half as many along the axis of the blocks;
    scale, with one entry for each block along that axis.

    Raises:
      ValueError: an unknown kind, or an axis that cannot be cut into blocks.
    """

    def __init__(self, kind: str, shape: tuple[int, ...], inputs: int):
        self.kind, self.shape = kind, shape
        codes, scale = jax.eval_shape(lambda: quantize(jnp.zeros(shape), kind, axis=inputs - 1))
        self.codes = nnx.Param(jnp.zeros(codes.shape, codes.dtype))
        self.scale = nnx.Param(jnp.zeros(scale.shape, scale.dtype))


Weight = nnx.Param | Quantized


def weight_param(rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int, quantize: str) -> Weight:
    """Draw a weight whose first `inputs` axes are multiplied with; or return a quantised weight of zeros, which loading fills."""
    if quantize:
        return Quantized(quantize, shape, inputs)
    return linear_param(rngs, shape, fan_in=math.prod(shape[:inputs]))


def times(multiply: Callable[[Array, Array], Array], x: Float[Array, "..."], weight: Weight) -> Float[Array, "..."]:
    """Return multiply(x, weight). `multiply` must be linear in `x`.

    A weight that is stored in fewer bytes than `x` is restored first. The restored weight is not kept for the backward pass. One in codes
    has no gradient.
    """
    if isinstance(weight, Quantized):
        return _of_codes(multiply, x, (weight.codes[...], weight.scale[...]), weight.kind)
    if weight[...].dtype.itemsize >= x.dtype.itemsize:
        return multiply(x, weight[...])
    return jax.checkpoint(lambda x, narrow: multiply(x, narrow.astype(x.dtype)))(x, weight[...])


def _of_codes(multiply: Callable[[Array, Array], Array], x: Array, stored: tuple[Array, Array], kind: str) -> Array:
    """Return multiply(x, weight) of a weight in codes.

    `jax.checkpoint` would do the same, but an outer checkpoint of policy `dots` saves no products inside an inner one: they would be
    computed again.
    """
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)

    @jax.custom_vjp
    def product(x, stored):
        return multiply(x, dequantize(*stored, kind, like.dtype))

    def backward(stored, gradient):
        # Behind a barrier, or XLA would find the same restored weight as in the forward pass, and keep it.
        stored, gradient = jax.lax.optimization_barrier((stored, gradient))
        return *jax.linear_transpose(lambda x: multiply(x, dequantize(*stored, kind, like.dtype)), like)(gradient), None

    product.defvjp(lambda x, stored: (product(x, stored), stored), backward)
    return product(x, stored)


def quantize(weight: Float[AnyArray, "..."], kind: str, axis: int) -> tuple[Num[Array, "..."], Float[Array, "..."]]:
    """Return the codes and the scales of a weight whose blocks lie along `axis`: each number becomes the nearest that a code stands for.

    Raises:
      ValueError: an unknown kind, or an axis that cannot be cut into blocks of 4 numbers or more.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown quantisation {kind!r}: choose one of {', '.join(KINDS)}.")
    length = weight.shape[axis]
    block = math.gcd(length, BLOCK)
    if block < 4:
        raise ValueError(
            f"A weight of shape {weight.shape} cannot be kept in {kind}: its {length} inputs are no multiple of 4."
        )
    before, after = weight.shape[:axis], weight.shape[axis + 1 :]
    blocks = jnp.asarray(weight, jnp.float32).reshape(*before, length // block, block, *after)
    scale = (jnp.abs(blocks).max(axis + 1) / STEPS.get(kind, 1)).astype(SCALE)
    unit = jnp.expand_dims(scale.astype(jnp.float32), axis + 1)
    codes = _nearest(jnp.where(unit == 0, 0.0, blocks / unit), kind)
    if kind != "int8":
        low, high = jnp.split(codes, 2, axis + 1)
        codes = low | high << 4
    return codes.reshape(*before, -1, *after), scale


def dequantize(codes: Num[AnyArray, "..."], scale: Float[AnyArray, "..."], kind: str, dtype: DTypeLike) -> Float[Array, "..."]:
    """Undo `quantize`, up to rounding: return the numbers that codes stand for, in `dtype`."""
    axis = blocks_axis(codes.shape, scale.shape)
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    codes = jnp.asarray(codes).reshape(*before, scale.shape[axis], -1, *after)
    if kind != "int8":
        codes = jnp.concatenate([codes & 15, codes >> 4], axis + 1)
    numbers = _numbers(jnp.asarray(codes), kind) * jnp.expand_dims(scale.astype(jnp.float32), axis + 1)
    return numbers.reshape(*before, -1, *after).astype(dtype)


def blocks_axis(codes: tuple[int, ...], scale: tuple[int, ...]) -> int:
    """Return the axis along which blocks lie, for the shapes of codes and scales: where they differ, as a block has two codes or more."""
    return next(axis for axis, sizes in enumerate(zip(codes, scale, strict=True)) if sizes[0] != sizes[1])


def by_weight(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat tree with one entry for each weight, by the weight's own path. A quantised weight's entry is that of its codes."""
    return {
        path.removesuffix("/codes"): leaf
        for path, leaf in flat.items()
        if not (path.endswith("/scale") and path.removesuffix("scale") + "codes" in flat)
    }


def restored(params: Params, kind: str, dtype: DTypeLike) -> Params:
    """Return parameters with every weight that is kept in codes as the numbers that they stand for, in `dtype`.

    All of them are in host memory: a device that holds the codes may have no room for the numbers.
    """
    flat = flatten(params)
    found = by_weight(flat)
    for path in found.keys() - flat.keys():
        found[path] = _to_host(found[path], flat[f"{path}/scale"], kind, jnp.dtype(dtype))
    return unflatten(jax.device_get(found))


def _to_host(codes: Num[AnyArray, "..."], scale: Float[AnyArray, "..."], kind: str, dtype: jnp.dtype) -> np.ndarray:
    """Return what codes stand for, one entry of the first axis, the layers', at a time, unless blocks lie along it."""
    if blocks_axis(codes.shape, scale.shape) == 0:
        return np.asarray(_dequantize(codes, scale, kind, dtype))
    return np.stack([np.asarray(_dequantize(*layer, kind, dtype)) for layer in zip(codes, scale, strict=True)])


_dequantize = jax.jit(dequantize, static_argnums=(2, 3))


def _nearest(x: Float[Array, "..."], kind: str) -> Num[Array, "..."]:
    """Return the codes of the numbers nearest to `x`, which is scaled."""
    if kind == "nf4":
        middles = [(low + high) / 2 for low, high in zip(NF4, NF4[1:], strict=False)]
        return functools.reduce(jnp.add, ((x > middle).astype(jnp.uint8) for middle in middles))
    whole = jnp.clip(jnp.round(x), -STEPS[kind], STEPS[kind])
    return whole.astype(jnp.int8) if kind == "int8" else (whole + 8).astype(jnp.uint8)


def _numbers(codes: Num[Array, "..."], kind: str) -> Float[Array, "..."]:
    """Return the scaled numbers that codes stand for."""
    if kind != "nf4":
        return codes.astype(jnp.float32) - (0 if kind == "int8" else 8)
    # By 15 choices rather than by NF4[codes], because TPUs look up single numbers slowly.
    numbers = [jnp.float32(number) for number in NF4]
    for bit in range(4):
        odd = (codes >> bit & 1).astype(bool)
        numbers = [jnp.where(odd, high, low) for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
    return numbers[0]
