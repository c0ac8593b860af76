"""The kernels of `attention` against its reference: splash interpreted on CPU, and cuDNN's arguments given to XLA.

Neither has run on the accelerator that it is for.
"""

import dataclasses
import functools
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from user_llm.ahead.chips import find_topology
from user_llm.ahead.flops import count_flops
from user_llm.common import trees
from user_llm.common.mesh import make_mesh
from user_llm.nn.attention import KVCache, attention
from user_llm.nn.kernels import choose, fused
from user_llm.nn.transformer import BlockConfig, Stack
from user_llm.nn.visibility import SelfMask, cache_mask, causal_mask, segment_mask

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[tpu]"')


def _qkv(length, heads=4, kv_heads=2, dim=8, dtype=jnp.float32):
    shapes = (2, length, heads, dim), (2, kv_heads, length, dim), (2, kv_heads, length, dim)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def _packed(length):
    """Two rows of segments: 1 .. 1 2 .. 2 3 .. 3 and some padding; one segment and much padding."""
    ends = np.cumsum([length // 2, length // 4, length // 8])
    first = np.append([1, 2, 3], 0)[np.searchsorted(ends, np.arange(length), side="right")]
    return jnp.asarray(np.stack([first, np.arange(length) < length // 3]).astype(np.int32))


@functools.partial(jax.jit, static_argnames=("kernel", "scale", "softcap"))
def _values_and_gradients(q, k, v, mask, weights, *, kernel, scale=None, softcap=None):
    """Of the reference, or of a kernel even where `choose` would not take it."""

    def loss(q, k, v):
        if kernel == "reference":
            out = attention(q, k, v, mask=mask, scale=scale, softcap=softcap, kernel=kernel)
        else:
            out = fused(kernel, q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def _assert_equal_reference(kernel, mask, qkv, **how):
    """In float32, values and gradients within 2e-6 of the largest; padding exactly 0 in all of them."""
    weights = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    found, wanted = (
        jax.device_get(_values_and_gradients(*qkv, mask, weights, kernel=name, **how)) for name in (kernel, "reference")
    )
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
    if mask.segments is not None:
        padding = np.asarray(mask.segments == 0)
        of_queries, of_keys = found[:2], [a.swapaxes(1, 2) for a in found[2:]]
        assert padding.any() and all((np.asarray(a)[padding] == 0).all() for a in (*of_queries, *of_keys))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MASKS = {
    "causal": lambda length: SelfMask(),
    "both_ways": lambda length: SelfMask(causal=False),
    "padded": lambda length: causal_mask(_packed(length) == 1),
    "packed": lambda length: segment_mask(_packed(length)),
    "packed_both_ways": lambda length: segment_mask(_packed(length), causal=False),
    "window": lambda length: SelfMask(window=5),
    "packed_window": lambda length: SelfMask(_packed(length), window=5),
}


@pytest.mark.parametrize(
    "mask", ["causal", slow("both_ways"), slow("padded"), "packed", slow("packed_both_ways"), slow("window"), "packed_window"]
)
def test_splash_equals_the_reference(mask):
    """40 positions, which are filled up to a block."""
    _assert_equal_reference("splash", MASKS[mask](40), _qkv(40))


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "packed", "packed_both_ways", "packed_window"])
def test_splash_equals_the_reference_over_many_blocks(mask):
    """1100 positions are 3 x 3 blocks of 384, of which causality and the window leave out some."""
    _assert_equal_reference("splash", MASKS[mask](1100), _qkv(1100, heads=2, kv_heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_splash_with_one_or_all_key_heads_and_a_scale(kv_heads):
    _assert_equal_reference("splash", segment_mask(_packed(40)), _qkv(40, kv_heads=kv_heads), scale=0.7)


def test_splash_caps_scores_as_the_reference_does():
    qkv, mask = _qkv(40), segment_mask(_packed(40))
    _assert_equal_reference("splash", mask, qkv, softcap=0.5)
    plain, bent = (_values_and_gradients(*qkv, mask, 1.0, kernel="reference", softcap=cap)[0] for cap in (None, 0.5))
    assert np.abs(plain - bent).max() > 0.1
    with pytest.raises(ValueError, match="cuDNN's attention has no soft cap"):
        _values_and_gradients(*qkv, mask, 1.0, kernel="cudnn", softcap=0.5)


def test_scores_with_a_cap_go_to_no_kernel_that_does_not_know_it():
    by = {"length": 512, "head_dim": 64, "dtype": jnp.bfloat16, "biased": False}
    for kernel, capped_by in (("cudnn", "reference"), ("splash", "splash")):
        assert choose(kernel, SelfMask(), **by) == kernel
        assert choose(kernel, SelfMask(), **by, capped=True) == capped_by


@pytest.mark.parametrize(
    "mask", ["causal", slow("both_ways"), slow("padded"), "packed", "packed_both_ways", slow("window"), "packed_window"]
)
def test_cudnn_is_asked_for_what_the_reference_does(mask):
    """XLA answers in its place."""
    _assert_equal_reference("cudnn", MASKS[mask](40), _qkv(40), scale=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_in_bfloat16_a_kernel_is_as_near_to_the_float32_answer_as_the_reference(kernel):
    mask, wide = segment_mask(_packed(40)), _qkv(40)
    narrow = [a.astype(jnp.bfloat16) for a in wide]
    weights = jax.random.normal(jax.random.key(1), wide[0].shape)
    exact = _values_and_gradients(*(a.astype(jnp.float32) for a in narrow), mask, weights, kernel="reference")
    ours, reference = (_values_and_gradients(*narrow, mask, weights, kernel=name) for name in (kernel, "reference"))
    for our, its, true in zip(ours, reference, exact, strict=True):
        assert our.dtype == jnp.bfloat16
        error, allowed = (np.abs(np.asarray(a, np.float32) - true).max() for a in (our, its))
        assert error < 2 * allowed < 0.05 * np.abs(true).max()


@pytest.mark.parametrize("kernel", [slow("splash"), "cudnn"])
@pytest.mark.parametrize("windowed", [False, True])
def test_a_layer_is_told_as_it_runs_whether_its_window_holds(kernel, windowed):
    qkv, mask = _qkv(24), SelfMask(_packed(24), window=5)
    run = jax.jit(lambda told: fused(kernel, *qkv, dataclasses.replace(mask, windowed=told), 8**-0.5))
    same = mask if windowed else dataclasses.replace(mask, window=None)
    wanted = jax.jit(functools.partial(attention, kernel="reference"))(*qkv, mask=same)
    np.testing.assert_allclose(run(windowed), wanted, atol=2e-6)


# --- which computes ---


def _choose(kernel, mask=SelfMask(), length=512, head_dim=64, dtype=jnp.bfloat16, biased=False):  # noqa: B008, a frozen value
    return choose(kernel, mask, length=length, head_dim=head_dim, dtype=dtype, biased=biased)


def test_what_a_kernel_cannot_do_the_reference_does():
    assert _choose("auto") == "reference"  # a CPU
    assert _choose("splash") == "splash" and _choose("cudnn") == "cudnn"
    assert _choose("splash", biased=True) == _choose("cudnn", biased=True) == "reference"
    assert _choose("splash", dtype=jnp.float32, head_dim=100, length=1, mask=SelfMask(causal=False, window=3)) == "splash"
    for unfit in (
        {"dtype": jnp.float32}, {"head_dim": 100}, {"head_dim": 256}, {"length": 511}, {"mask": SelfMask(causal=False, window=3)},
    ):  # fmt: skip
        assert _choose("cudnn", **unfit) == "reference"
    with pytest.raises(ValueError, match="Unknown attention_kernel 'flash': choose one of auto, reference, splash, cudnn"):
        _choose("flash")


@pytest.mark.parametrize(("kind", "taken"), [("TPU v5 lite", "splash"), ("NVIDIA H100", "cudnn"), ("AMD MI300", "reference")])
def test_auto_goes_by_the_devices_of_the_mesh(monkeypatch, kind, taken):
    """They are but described: what is compiled for need not be what compiles."""
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(device_kind=kind))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert _choose("auto") == taken
    assert _choose("auto", length=128) == (taken if taken == "cudnn" else "reference")  # one block


# --- in a mesh, in a stack, for a TPU ---


@pytest.mark.parametrize("kernel", [slow("splash"), "cudnn"])
@pytest.mark.parametrize("sizes", [(2, 1, 2), slow((1, 2, 4))])
def test_kernels_are_shared_out_over_the_mesh(mesh_of, kernel, sizes):
    """Two key heads go to two devices and not to four."""
    mask, qkv = segment_mask(_packed(24)), _qkv(24)
    weights = jax.random.normal(jax.random.key(1), qkv[0].shape)
    wanted = _values_and_gradients(*qkv, mask, weights, kernel="reference")
    with jax.set_mesh(mesh_of(*sizes)):
        found = _values_and_gradients(*qkv, mask, weights, kernel=kernel)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


BLOCK = BlockConfig(16, 4, 2, 8, 24, window=5, window_rope_theta=100.0, attention_kernel="splash")
REFERENCE = dataclasses.replace(BLOCK, attention_kernel="reference")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"unroll": True}], ids=["scanned", "remat", "unrolled"])
def test_a_stack_of_both_kinds_of_layers_trains_alike(drawn, options):
    x, segments = jnp.asarray(np.random.default_rng(2).normal(size=(2, 24, 16)), jnp.float32), _packed(24)

    def gradients(block):
        graphdef, params = drawn(lambda: Stack(block, 3, windowed=(True, False, True), rngs=nnx.Rngs(params=0), **options))
        positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
        run = lambda p: trees.merge(graphdef, p)(x, mask=segment_mask(segments), positions=positions)[0]  # noqa: E731
        return jax.jit(jax.grad(lambda p: jnp.sum(run(p) ** 2)))(params)

    for ours, theirs in zip(*(jax.tree.leaves(gradients(block)) for block in (BLOCK, REFERENCE)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("block", [slow(BLOCK), REFERENCE], ids=["splash", "reference"])
def test_a_prompt_is_read_as_if_it_looked_into_its_cache(drawn, block):
    graphdef, params = drawn(lambda: Stack(block, 2, windowed=(True, False), rngs=nnx.Rngs(params=0)))
    x, positions = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9, 16)), jnp.float32), jnp.arange(9)[None]
    cache = KVCache(*(jnp.zeros((2, 1, 2, 9, 8)) for _ in range(2)))
    run = jax.jit(lambda mask: trees.merge(graphdef, params)(x, mask=mask, positions=positions, cache=cache))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run(SelfMask()), run(cache_mask(positions, 9)))


def test_products_within_a_kernel_are_counted():
    """Of 3 x 3 blocks of 384: forward QK and PV; backward QK, dP and dQ in one kernel, QK, dP, dV and dK in the other; and O dO."""
    qkv = _qkv(1152, heads=2, kv_heads=1)
    count = lambda f: count_flops(jax.jit(f).trace(*qkv).jaxpr.jaxpr)  # noqa: E731
    attend = lambda *qkv: attention(*qkv, mask=SelfMask(), kernel="splash").sum()  # noqa: E731
    product = 2 * (2 * 2 * 1152 * 1152 * 8)  # rows, heads
    assert count(attend) == 2 * product
    assert count(jax.grad(attend, (0, 1, 2))) == (2 + 3 + 4) * product + product // 1152


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_train_step_for_a_tpu_holds_the_kernels(drawn, kernel):
    """Two kinds of layers, each forward, forward again for the backward pass, and two backward."""
    _, devices = find_topology("v5e:2x4")
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
    block = dataclasses.replace(BLOCK, width=256, head_dim=64, window=128, attention_kernel=kernel)
    graphdef, params = trees.abstract(
        lambda: Stack(block, 4, windowed=(True, False) * 2, remat="full", rngs=nnx.Rngs(params=0))
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((8, 512, 256), jnp.bfloat16, sharding=rows)
    segments = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=rows)
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=whole), params)

    def loss(params, x, segments):
        out, _ = trees.merge(graphdef, params)(x, mask=segment_mask(segments), positions=segments)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, x, segments).compile().as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert len(calls) == (8 if kernel == "auto" else 0)
    assert all("splash_mha" in line for line in calls)
