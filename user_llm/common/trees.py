"""Parameter trees and the one rule form of the project.

A module is split once into `graphdef, params`; `params` is a nested dict of arrays, and everything above the models sees only
that. Rules are an ordered list of `(regex, value)` over paths such as `encoder/stack/blocks/attn/q`: the first regex found in
the path wins, and a parameter that no rule covers is an error (the form of google-research/big_vision). Rules say what is
trainable, its learning-rate multiplier and weight decay, how it is sharded, and what to load from a checkpoint.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util

Params = dict[str, Any]
Rules = Sequence[tuple[str, Any]]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Split a module into its static structure and its parameters."""
    graphdef, state = nnx.split(module)
    return graphdef, jax.tree.map(lambda a: a, nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """Put `params` back into the module that `split` took apart."""
    return nnx.merge(graphdef, params)


def init(create: Callable[[], nnx.Module], place: Callable[[Params], Params], wanted: Params | None = None) -> Params:
    """Draw the parameters of a module in one compiled program, each in its sharding.

    Args:
      place: maps a tree of shapes to one of shardings.
      wanted: a tree of booleans; parameters that are False there are left out, and never drawn.
    """

    def draw() -> Params:
        params = split(create())[1]
        return params if wanted is None else partition(wanted, params)[0]

    options: dict[str, Any] = {}
    if jax.default_backend() == "cpu":
        # It runs once: without LLVM's optimisations random initialisers compile far sooner.
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(draw, out_shardings=place(jax.eval_shape(draw)), compiler_options=options)()


def abstract(create: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """Return the structure and the shapes of a module without computing a single weight."""
    return split(nnx.eval_shape(create))


def flatten(tree: Params) -> dict[str, Any]:
    """Return {"a/b/c": leaf} in a stable order."""
    flat = {"/".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}
    return dict(sorted(flat.items()))


def unflatten(flat: dict[str, Any]) -> Params:
    """Undo `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def match(rules: Rules, tree: Params) -> Params:
    """Return a tree of the same form holding, for each leaf, the value of the first rule found in its path.

    Raises:
      ValueError: a parameter that no rule covers, or a rule that is no valid regex.
    """

    def value(path: tuple) -> Any:
        name = "/".join(map(str, path))
        for pattern, found in rules:
            if re.search(pattern, name):
                return found
        raise ValueError(f"No rule covers parameter {name!r}; rules: {[pattern for pattern, _ in rules]}.")

    return traverse_util.unflatten_dict({path: value(path) for path in traverse_util.flatten_dict(tree)})


def partition(mask: Params, tree: Params) -> tuple[Params, Params]:
    """Split a tree in two by a tree of booleans: what is True there, and the rest; `combine` undoes it."""
    flat_mask = traverse_util.flatten_dict(mask)
    flat = traverse_util.flatten_dict(tree)
    chosen = {path: leaf for path, leaf in flat.items() if flat_mask[path]}
    rest = {path: leaf for path, leaf in flat.items() if not flat_mask[path]}
    return traverse_util.unflatten_dict(chosen), traverse_util.unflatten_dict(rest)


def combine(first: Params, second: Params) -> Params:
    """Merge two trees with no leaf in common."""
    return traverse_util.unflatten_dict({**traverse_util.flatten_dict(first), **traverse_util.flatten_dict(second)})


def replace(tree: Params, leaves: dict[str, Any]) -> Params:
    """Return `tree` with the leaves at the given paths replaced; what `flatten` returns of a part of it fits."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get("/".join(str(entry.key) for entry in path), leaf), tree
    )


def in_type(shapes: Params, dtype: np.dtype) -> Params:
    """Return shapes of arrays with those in float32 in another type; codes and their scales are never in float32."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype if a.dtype == np.float32 else a.dtype), shapes)


def count(tree: Params) -> int:
    """Return the number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
