import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.lora import LoRA, LoRAConfig, merge_lora
from user_llm.nn.transformer import BlockConfig, Stack
from user_llm.nn.visibility import causal_mask

PLAIN = BlockConfig(width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24)
LORA = LoRAConfig(rank=3, alpha=6.0, dropout=0.0, targets="attn/(q|k|v|o)|mlp/.*")
ADAPTED = dataclasses.replace(PLAIN, lora=LORA)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32))


@functools.cache
def _compiled(block):
    graphdef, _ = trees.abstract(lambda: Stack(block, 2, rngs=nnx.Rngs(params=0)))
    positions = np.broadcast_to(np.arange(5), (2, 5))

    @jax.jit
    def run(params, key):
        stack = trees.merge(graphdef, params)
        return stack(X, mask=causal_mask(np.ones((2, 5), bool)), positions=positions, key=key)[0]

    return run


def _run(block, params, key=None):
    return np.asarray(_compiled(block)(params, key))


def _without_adapters(params):
    return trees.unflatten({path: leaf for path, leaf in trees.flatten(params).items() if "/lora/" not in path})


def test_an_adapter_by_hand():
    """W x + alpha / rank * B A x of one weight, in numbers."""
    lora = LoRA(LoRAConfig(rank=1, alpha=2.0, dropout=0.0, targets="attn/q"), "attn",
                {"q": (nnx.Param(np.zeros((2, 1, 2))), 1), "k": (nnx.Param(np.zeros((2, 1, 2))), 1)}, rngs=nnx.Rngs(params=0))  # fmt: skip
    lora.q["a"][...] = np.array([[1.0], [3.0]])
    lora.q["b"][...] = np.array([[[10.0, 100.0]]])
    np.testing.assert_allclose(lora("q", jnp.array([[2.0, 1.0]]), None), [[[100.0, 1000.0]]])
    assert lora("k", jnp.ones((1, 2)), None) == 0.0


def test_a_fresh_adapter_changes_nothing_bit_for_bit():
    params = trees.init(lambda: Stack(ADAPTED, 2, rngs=nnx.Rngs(params=0)), lambda shapes: None)
    assert sum("/lora/" in path for path in trees.flatten(params)) == 2 * 7
    np.testing.assert_array_equal(_run(ADAPTED, params), _run(PLAIN, _without_adapters(params)))


@pytest.mark.parametrize("targets", [LORA.targets, "attn/(q|v)", "attn/o", "mlp/down"])
def test_merged_equals_unmerged(drawn, targets):
    lora = dataclasses.replace(LORA, targets=targets)
    block = dataclasses.replace(PLAIN, lora=lora)
    _, params = drawn(lambda: Stack(block, 2, rngs=nnx.Rngs(params=0)))
    merged = merge_lora(params, lora)
    assert set(trees.flatten(merged)) == set(trees.flatten(_without_adapters(params)))
    expected = _run(block, params)
    assert np.abs(expected - _run(PLAIN, _without_adapters(params))).max() > 1e-2
    np.testing.assert_allclose(_run(PLAIN, merged), expected, atol=1e-5)


def test_the_structure_of_an_adapted_model_is_hashable():
    """Or no compiled function could take it as a static argument."""
    graphdef, _ = trees.abstract(lambda: Stack(ADAPTED, 2, rngs=nnx.Rngs(params=0)))
    assert hash(graphdef) == hash(trees.abstract(lambda: Stack(ADAPTED, 2, rngs=nnx.Rngs(params=0)))[0])


def test_only_targets_have_adapters():
    block = dataclasses.replace(PLAIN, lora=dataclasses.replace(LORA, targets="attn/(q|v)"))
    _, params = trees.abstract(lambda: Stack(block, 2, rngs=nnx.Rngs(params=0)))
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items() if "/lora/" in path}
    assert shapes == {
        "blocks/attn/lora/q/a": (2, 16, 3), "blocks/attn/lora/q/b": (2, 3, 4, 8),
        "blocks/attn/lora/v/a": (2, 16, 3), "blocks/attn/lora/v/b": (2, 3, 2, 8),
    }  # fmt: skip


def test_dropout_is_on_the_adapters_input_alone(drawn):
    block = dataclasses.replace(PLAIN, lora=dataclasses.replace(LORA, dropout=0.5))
    _, params = drawn(lambda: Stack(block, 2, rngs=nnx.Rngs(params=0)))
    first, second = (_run(block, params, jax.random.key(i)) for i in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(_run(block, params), _run(ADAPTED, params))
    flat = trees.flatten(params)
    shut = trees.unflatten({path: np.asarray(leaf) * np.float32(not path.endswith("/b")) for path, leaf in flat.items()})
    np.testing.assert_array_equal(_run(block, shut, jax.random.key(0)), _run(PLAIN, _without_adapters(params)))


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rank of at least 1"):
        LoRAConfig(rank=0, alpha=1.0, dropout=0.0, targets="attn/q")
