import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from user_llm.ahead.flops import count_flops

A, B, C = jnp.zeros((3, 4)), jnp.zeros((4, 5)), jnp.zeros((4, 4))
PRODUCT = 2 * 3 * 4 * 5


def _count(function, *args):
    return count_flops(jax.jit(function).trace(*args).jaxpr.jaxpr)


def test_products_by_hand():
    assert _count(lambda a, b: a @ b, A, B) == PRODUCT
    assert _count(lambda a, b: jnp.exp(a) @ b + 1, A, B) == PRODUCT  # what is no product is not counted
    batched = jnp.zeros((7, 3, 4)), jnp.zeros((7, 5, 4))
    assert _count(lambda a, b: jnp.einsum("nij,nkj->nik", a, b), *batched) == 7 * PRODUCT


def test_what_nothing_comes_of_does_not_count():
    """The gradient of a frozen table, which a scan carries along, is dropped from the compiled program."""

    def step(a, b):
        def chunk(carry, _):
            a, table = carry
            return (jnp.tanh(a), table + a.T @ a), a @ b

        (_, table), out = jax.lax.scan(chunk, (a, C), length=6)
        return out, table

    assert _count(step, A, B) == 6 * (PRODUCT + 2 * 4 * 3 * 4)
    assert _count(lambda a, b: step(a, b)[0], A, B) == 6 * PRODUCT


def test_a_gradient_is_two_more_products():
    assert _count(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), (0, 1)), A, B) == 3 * PRODUCT


def test_a_scanned_body_counts_as_often_as_it_runs():
    def outer(a, _):
        return jax.lax.scan(lambda a, _: (a @ C, None), a, length=6)[0], None

    assert _count(lambda a: jax.lax.scan(outer, a, length=10)[0], A) == 60 * 2 * 3 * 4 * 4


def test_the_dearer_branch_counts():
    assert _count(lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: (a @ b).sum(), lambda: 0.0), A, B) == PRODUCT


def test_a_shard_is_counted_on_every_device(mesh_of):
    mesh = mesh_of(8)
    rows = PartitionSpec("data")

    def shared(a, b):
        return jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)(a, b)

    assert _count(shared, jnp.zeros((24, 4)), B) == 8 * PRODUCT


def test_a_loop_of_unknown_length_is_refused_or_counted_as_often_as_is_said():
    unknown = lambda a: jax.lax.while_loop(lambda a: a.sum() > 0, lambda a: a @ C, a)  # noqa: E731
    with pytest.raises(ValueError, match="unknown length"):
        _count(unknown, A)
    assert count_flops(jax.make_jaxpr(unknown)(A).jaxpr, turns=5) == 5 * _count(lambda a: a @ C, A)
    assert _count(lambda a: jax.lax.while_loop(lambda a: a.sum() > 0, lambda a: a - 1, a), A) == 0


def test_a_loop_counts_as_often_as_its_condition_allows():
    def turned(a):
        going = lambda state: (state[0] < 7) & (state[1].sum() > 0)  # noqa: E731
        return jax.lax.while_loop(going, lambda state: (state[0] + 1, state[1] @ C), (0, a))[1]

    product = _count(lambda a: a @ C, A)
    assert _count(turned, A) == 7 * product
    assert [count_flops(jax.make_jaxpr(turned)(A).jaxpr, turns=n) for n in (5, 9)] == [5 * product, 7 * product]


def test_what_a_loop_carries_for_nothing_does_not_count():
    """A result that is not read counts where the next turn's others come of it."""

    def last(step):
        return lambda a: jax.lax.while_loop(
            lambda state: state[0] < 7, lambda state: (state[0] + 1, *step(*state[1:])), (0, a, a)
        )[2]

    product = _count(lambda a: a @ C, A)
    assert _count(last(lambda a, b: (a @ C, b @ C)), A) == 7 * product
    assert _count(last(lambda a, b: (a @ C, a + b)), A) == 7 * product
    assert _count(last(lambda a, b: (a @ C, a @ C)), A) == 14 * product
