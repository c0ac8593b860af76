import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.nn.layers import RMSNorm
from user_llm.nn.mlp import MLP

TREE = {"encoder": {"stack": {"q": 1, "o": 2}, "item": 3}, "layers": {0: {"q": 4}, 1: {"q": 5}}}


class Two(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([MLP(2, 3, activation="silu", rngs=rngs) for _ in range(2)])
        self.norm = RMSNorm(2)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


def _two():
    return Two(rngs=nnx.Rngs(params=0))


def test_split_gives_a_dict_of_arrays_that_merge_takes():
    module = _two()
    graphdef, params = trees.split(module)
    assert isinstance(params, dict) and isinstance(params["norm"]["scale"], jax.Array)
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(trees.merge(graphdef, params)(x), module(x))
    doubled = jax.tree.map(lambda a: 2 * a, params)
    np.testing.assert_array_equal(trees.merge(graphdef, doubled).norm.scale[...], [2.0, 2.0])


def test_abstract_has_the_shapes_and_structure_of_the_module():
    graphdef, params = trees.split(_two())
    abstract_def, shapes = trees.abstract(_two)
    assert abstract_def == graphdef
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda like: like.shape, shapes)
    assert trees.count(shapes) == trees.count(params) == 2 * 3 * 6 + 2


def test_flatten_names_paths_in_a_stable_order():
    flat = {"encoder/item": 3, "encoder/stack/o": 2, "encoder/stack/q": 1, "layers/0/q": 4, "layers/1/q": 5}
    assert list(trees.flatten(TREE).items()) == list(flat.items())
    assert list(trees.flatten(trees.split(_two())[1])) == [
        *(f"layers/{i}/{name}" for i in (0, 1) for name in ("down", "gate_proj", "up")),
        "norm/scale",
    ]


def test_the_first_rule_found_anywhere_in_a_path_wins():
    rules = ((r"stack/q$", "a"), (r"q$", "b"), (r"^encoder/", "c"))
    assert trees.match(rules, TREE) == {
        "encoder": {"stack": {"q": "a", "o": "c"}, "item": "c"},
        "layers": {0: {"q": "b"}, 1: {"q": "b"}},
    }


def test_an_uncovered_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match="No rule covers parameter 'encoder/item'"):
        trees.match(((r"[qo]$", True),), TREE)


def test_partition_and_combine_undo_each_other():
    mask = trees.match(((r"q$", True), (r".*", False)), TREE)
    chosen, rest = trees.partition(mask, TREE)
    assert chosen == {"encoder": {"stack": {"q": 1}}, "layers": {0: {"q": 4}, 1: {"q": 5}}}
    assert rest == {"encoder": {"stack": {"o": 2}, "item": 3}}
    assert trees.combine(chosen, rest) == TREE == trees.combine(rest, chosen)
    everything, nothing = trees.partition(jax.tree.map(lambda _: True, TREE), TREE)
    assert everything == TREE and nothing == {}


def test_replace_changes_only_what_it_names():
    changed = trees.replace(TREE, {"layers/1/q": 50, "encoder/item": 30})
    assert changed == {"encoder": {"stack": {"q": 1, "o": 2}, "item": 30}, "layers": {0: {"q": 4}, 1: {"q": 50}}}
