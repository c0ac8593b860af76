import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from user_llm.common import trees
from user_llm.nn.experts import Experts, ExpertsConfig

CONFIG = ExpertsConfig(count=5, per_token=2, normalised=True)


@functools.cache
def _split(config=CONFIG):
    return trees.abstract(lambda: Experts(config, 8, 4, activation="silu", rngs=nnx.Rngs(params=0)))


def _drawn():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda like: rng.normal(size=like.shape).astype(np.float32), _split()[1])


@functools.partial(jax.jit, static_argnames="config")
def _run(params, x, config=CONFIG):
    return trees.merge(_split(config)[0], params)(x)


def _every_expert(params, x, config):
    """All experts compute all tokens, and what is not chosen counts 0."""
    chances = jax.nn.softmax(x @ params["gate"])
    kept = jnp.where(chances >= jnp.sort(chances, axis=-1)[..., -config.per_token, None], chances, 0.0)
    if config.normalised:
        kept /= kept.sum(-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("...D,XDF->...XF", x, params["gate_proj"])) * jnp.einsum("...D,XDF->...XF", x, params["up"])
    return jnp.einsum("...XF,XFD,...X->...D", hidden, params["down"], kept)


@pytest.mark.parametrize("normalised", [True, False])
def test_values_and_gradients_are_those_of_computing_every_expert(normalised):
    config = ExpertsConfig(CONFIG.count, CONFIG.per_token, normalised)
    params, x = _drawn(), np.random.default_rng(1).normal(size=(2, 7, 8)).astype(np.float32)
    ours, plain = (
        jax.value_and_grad(lambda *a, of=of: jnp.sum(jnp.sin(of(*a, config))), (0, 1)) for of in (_run, _every_expert)
    )
    (value, grads), (expected, expected_grads) = ours(params, x), jax.jit(plain)(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected_grads)


def test_one_expert_of_two_by_hand():
    """The router sends a positive number to the first expert, which doubles its square, and a negative one to the second, which is 0."""
    config = ExpertsConfig(count=2, per_token=1, normalised=True)
    graphdef, _ = trees.abstract(lambda: Experts(config, 1, 1, activation="relu", rngs=nnx.Rngs(params=0)))
    params = {"gate": [[1.0, -1.0]], "gate_proj": [[[1.0]], [[1.0]]], "up": [[[2.0]], [[5.0]]], "down": [[[1.0]], [[1.0]]]}
    params = jax.tree.map(np.asarray, params, is_leaf=lambda leaf: isinstance(leaf, list))
    np.testing.assert_allclose(trees.merge(graphdef, params)(jnp.array([[3.0], [-2.0]])), [[18.0], [0.0]])


def test_widened_weights_are_not_kept_for_the_backward_pass():
    """Of what a scan over layers saves for the backward pass nothing has the size of the experts' weights."""
    graphdef, params = _split()[0], jax.tree.map(lambda leaf: jnp.stack([jnp.bfloat16(leaf)] * 3), _drawn())

    def layer(x, weights):
        return trees.merge(graphdef, weights)(x), None

    with_gradient = jax.make_jaxpr(jax.grad(lambda x: jax.lax.scan(layer, x, params)[0].sum()))(jnp.ones((7, 8)))
    scans = [equation for equation in with_gradient.eqns if equation.primitive.name == "scan"]
    saved = {out.aval.shape[1:] for out in scans[0].outvars}
    assert len(scans) == 2 and not saved & {leaf.shape for leaf in jax.tree.leaves(_drawn())}


def test_on_a_mesh_it_is_the_same(mesh_of):
    params, x = _drawn(), np.random.default_rng(1).normal(size=(8, 3, 8)).astype(np.float32)
    expected, mesh = np.asarray(_run(params, x)), mesh_of(2, 2, 2)
    specs = {
        "gate": (),
        "gate_proj": (None, "fsdp", "tensor"),
        "up": (None, "fsdp", "tensor"),
        "down": (None, "tensor", "fsdp"),
    }
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
        placed = {name: put(params[name], spec) for name, spec in specs.items()}
        np.testing.assert_allclose(_run(placed, put(x, [("data", "fsdp")])), expected, rtol=1e-4, atol=1e-5)


def test_more_experts_of_a_token_than_there_are_and_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="cannot go through 3 of 2 experts"):
        ExpertsConfig(2, 3, True)
    with pytest.raises(ValueError, match="Unknown activation 'tanh'"):
        Experts(CONFIG, 8, 4, activation="tanh", rngs=nnx.Rngs(params=0))
