"""Weights in fewer bytes: codes and their numbers by hand, and products that are those with the restored weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.stored import BLOCK, KINDS, NF4, Quantized, dequantize, quantize, restored, times
from user_llm.nn.transformer import BlockConfig, Stack
from user_llm.nn.visibility import causal_mask

RNG = np.random.default_rng(3)
LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.0, targets="attn/(q|o)|mlp/down")
BLOCK_OF = BlockConfig(width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24, lora=LORA)


def test_codes_by_hand():
    """A block of 4 inputs of one output; 4 bits hold the first half of a block beneath the second."""
    weight = jnp.array([[127.0], [-64.0], [1.4], [0.0]])
    codes, scale = quantize(weight, "int8", axis=0)
    assert codes.tolist() == [[127], [-64], [1], [0]] and codes.dtype == jnp.int8 and scale.tolist() == [[1.0]]
    codes, scale = quantize(
        jnp.array([[14.0], [-14.0], [3.0], [0.9]]), "int4", axis=0
    )  # 7, -7, 2 and 0 steps of 2, each of them + 8
    assert codes.tolist() == [[15 | 10 << 4], [1 | 8 << 4]] and codes.dtype == jnp.uint8 and scale.tolist() == [[2.0]]
    assert dequantize(codes, scale, "int4", jnp.float32).tolist() == [[14.0], [-14.0], [4.0], [0.0]]
    codes, scale = quantize(jnp.array([[2.0], [-2.0], [0.0], [0.88]]), "nf4", axis=0)  # the nearest to 0.44 is number 12
    assert codes.tolist() == [[15 | 7 << 4], [0 | 12 << 4]] and scale.tolist() == [[2.0]]
    expected = np.float32([[2.0], [-2.0], [0.0], [2 * NF4[12]]])
    np.testing.assert_array_equal(dequantize(codes, scale, "nf4", jnp.float32), expected)


# Half of the widest gap between two numbers of a block whose largest is 1, and what a scale of 8 bits cuts off at its end.
FARTHEST = {"int8": 0.5 / 127, "int4": 0.5 / 7, "nf4": (NF4[1] - NF4[0]) / 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), [((2 * BLOCK, 3, 5), 0), ((3, 24, 7), 1), ((6, BLOCK), 1)])
def test_what_comes_back_is_near_and_comes_back_again(kind, shape, axis):
    weight = RNG.normal(size=shape).astype(np.float32)
    codes, scale = quantize(weight, kind, axis)
    block = shape[axis] // scale.shape[axis]
    assert codes.nbytes == weight.size // (1 if kind == "int8" else 2) and block == np.gcd(shape[axis], BLOCK)
    found = np.asarray(dequantize(codes, scale, kind, jnp.float32))
    largest = np.abs(weight).reshape(*shape[:axis], -1, block, *shape[axis + 1 :]).max(axis + 1)
    assert (np.abs(found - weight) <= (FARTHEST[kind] + 2**-8) * np.repeat(largest, block, axis)).all()
    again = quantize(found, kind, axis)
    np.testing.assert_allclose(dequantize(*again, kind, jnp.float32), found, rtol=2**-6)


def test_blocks_of_zeros_and_of_any_size_have_numbers():
    weight = np.concatenate([np.zeros((BLOCK, 1)), np.full((BLOCK, 1), 1e-30), np.full((BLOCK, 1), -1e30)]).astype(np.float32)
    for kind in KINDS:
        found = np.asarray(dequantize(*quantize(weight, kind, axis=0), kind, jnp.float32))
        np.testing.assert_allclose(found, weight, rtol=2**-7)


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16", "float16"])
def test_a_product_and_its_gradient_are_those_with_the_restored_weight(kind):
    weight, x = (RNG.normal(size=shape).astype(np.float32) for shape in ((8, 3, 4), (5, 8)))
    if kind in KINDS:
        stored = Quantized(kind, (8, 3, 4), 1)
        stored.codes[...], stored.scale[...] = quantize(weight, kind, axis=0)
        whole = dequantize(stored.codes[...], stored.scale[...], kind, jnp.float32)
    else:
        stored = nnx.Param(jnp.asarray(weight, kind))
        whole = stored[...].astype(jnp.float32)
    multiply = lambda x, w: jnp.einsum("TD,DNH->TNH", x, w)  # noqa: E731
    np.testing.assert_array_equal(times(multiply, jnp.asarray(x), stored), multiply(x, whole))
    out, back = jax.vjp(lambda x: times(multiply, x, stored), jnp.asarray(x))
    np.testing.assert_allclose(back(out)[0], jnp.einsum("TNH,DNH->TD", out, whole), rtol=1e-6, atol=1e-5)
    if kind not in KINDS:  # it may be one that trains, in the type that is computed with
        of_weight = jax.grad(lambda w: (times(multiply, jnp.asarray(x), nnx.Param(w)) ** 2).sum())(stored[...])
        np.testing.assert_allclose(of_weight, jax.grad(lambda w: (multiply(x, w) ** 2).sum())(whole), rtol=2**-7)
    else:
        assert times(multiply, jnp.asarray(x, jnp.bfloat16), stored).dtype == jnp.bfloat16


def _loss(block, remat="none", unroll=False):
    graphdef, _ = trees.abstract(lambda: Stack(block, 2, remat=remat, unroll=unroll, rngs=nnx.Rngs(params=0)))
    positions = np.broadcast_to(np.arange(5), (2, 5))
    x = np.random.default_rng(4).normal(size=(2, 5, 16)).astype(np.float32)

    def loss(trained, frozen):
        out, _ = trees.merge(graphdef, trees.combine(trained, frozen))(
            x, mask=causal_mask(np.ones((2, 5), bool)), positions=positions
        )
        return jnp.mean(out**2)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    ("kind", "remat", "unroll"),
    [
        ("nf4", "none", False),
        pytest.param("int8", "dots", True, marks=pytest.mark.slow),
        pytest.param("int4", "full", False, marks=pytest.mark.slow),
    ],
)
def test_adapters_of_codes_learn_as_those_of_the_numbers_that_the_codes_stand_for(drawn, kind, remat, unroll):
    _, plain = drawn(lambda: Stack(BLOCK_OF, 2, rngs=nnx.Rngs(params=0)))
    adapters, rest = trees.partition(trees.match(((r"/lora/", True), (r"", False)), plain), plain)
    flat = {}
    for path, leaf in trees.flatten(rest).items():
        if path.endswith("scale"):
            flat[path] = leaf
        else:
            axis = 2 if path.endswith("/o") else 1
            flat[f"{path}/codes"], flat[f"{path}/scale"] = quantize(leaf, kind, axis)
    codes = trees.unflatten(flat)
    shapes = trees.abstract(lambda: Stack(dataclasses.replace(BLOCK_OF, quantize=kind), 2, rngs=nnx.Rngs(params=0)))[1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), trees.combine(adapters, codes)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    of_codes = _loss(dataclasses.replace(BLOCK_OF, quantize=kind), remat, unroll)(adapters, codes)
    of_numbers = _loss(BLOCK_OF)(adapters, restored(codes, kind, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), of_codes, of_numbers)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(of_codes[1])) > 1e-4


def test_a_restored_weight_is_not_kept_for_the_backward_pass():
    """Of what a scan saves for the backward pass nothing has the size of a restored weight."""
    graphdef, one = nnx.split(Quantized("nf4", (128, 96), 1))
    three = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)

    def layer(x, stored):
        return jnp.tanh(times(jnp.matmul, x, nnx.merge(graphdef, stored)) @ jnp.ones((96, 128))), None

    with_gradient = jax.make_jaxpr(jax.grad(lambda x: jax.lax.scan(layer, x, three)[0].sum()))(jnp.ones((2, 128)))
    scans = [equation for equation in with_gradient.eqns if equation.primitive.name == "scan"]
    saved = [out.aval for out in scans[0].outvars]
    assert len(scans) == 2 and all(aval.shape[-2:] != (128, 96) for aval in saved)


@pytest.mark.parametrize(
    ("kind", "shape", "match"), [("int2", (8, 8), "choose one of int8"), ("int4", (6, 8), "no multiple of 4")]
)
def test_what_cannot_be_quantised_is_refused(kind, shape, match):
    with pytest.raises(ValueError, match=match):
        Quantized(kind, shape, 1)
