import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from user_llm.nn.columns import Columns, Targets, packed
from user_llm.nn.losses import (
    chunked_cross_entropy,
    draw_items,
    in_batch_cross_entropy,
    sampled_cross_entropy,
    soft_cross_entropy,
)

ROWS, WIDTH, ITEMS = 10, 4, 7
_rng = np.random.default_rng(0)
HIDDEN = _rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
TABLE = _rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
VALID = np.array([False, True, True, True, True, False, False])  # PAD in front, spare rows behind
TARGETS = np.array([1, 2, 3, 4, 1, 0, 2, 3, 0, 4])
WEIGHTS = np.array([1, 0.5, 2, 0, 1, 0, 1, 1, 0, 3], np.float32)  # 0 where the target is PAD, and once besides


@functools.partial(jax.jit, static_argnames="softcap")
def _plain(hidden, table, softcap=None):
    logits = hidden @ table.T if softcap is None else softcap * jnp.tanh(hidden @ table.T / softcap)
    log_probs = jax.nn.log_softmax(jnp.where(VALID, logits, -jnp.inf))
    losses = -jnp.take_along_axis(log_probs, TARGETS[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(WEIGHTS > 0, WEIGHTS * losses, 0.0))


_plain_and_grads = jax.value_and_grad(_plain, (0, 1))
_chunked = jax.jit(chunked_cross_entropy, static_argnums=(5, 6))
_chunked_and_grads = jax.jit(jax.value_and_grad(chunked_cross_entropy, (0, 1)), static_argnums=5)
_sampled_and_grad = jax.jit(jax.value_and_grad(sampled_cross_entropy, 1))


@pytest.mark.parametrize(("chunk", "softcap"), [(1, None), (4, None), (10, None), (64, None), (4, 1.5)])
def test_chunked_equals_the_plain_softmax(chunk, softcap):
    """Value and both gradients, scaled by what comes after; 4 does not divide the rows, 64 exceeds them."""

    def chunked(hidden, table):
        return 2.5 * chunked_cross_entropy(hidden, table, TARGETS, WEIGHTS, VALID, chunk, softcap)

    value, grads = jax.device_get(jax.jit(jax.value_and_grad(chunked, (0, 1)))(HIDDEN, TABLE))
    expected, expected_grads = _plain_and_grads(HIDDEN, TABLE, softcap)
    np.testing.assert_allclose(value, 2.5 * expected, rtol=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, 2.5 * wanted, atol=1e-5)
    np.testing.assert_array_equal(grads[0][WEIGHTS == 0], 0)
    np.testing.assert_array_equal(grads[1][~VALID], 0)
    # Without a gradient another path computes the value.
    np.testing.assert_allclose(_chunked(HIDDEN, TABLE, TARGETS, WEIGHTS, VALID, chunk, softcap), expected, rtol=1e-6)


OF_ROW = np.array([0, 1, 2, 3, 1, 0, 1, 2, 0, 3])
COLUMNS = Columns(
    OF_ROW,
    masks=packed(np.array([[False, True, True, True, True, False, False], [True, True, True, False, False, False, True]])),
    first=np.array([0, 2, 3]),
    listed=np.array([6, 3, 4]),
)
AMONG = np.array([[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]], bool)[OF_ROW]


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def _plain_among(hidden, table):
    log_probs = jax.nn.log_softmax(jnp.where(AMONG, hidden @ table.T, -jnp.inf))
    losses = -jnp.take_along_axis(log_probs, TARGETS[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(WEIGHTS > 0, WEIGHTS * losses, 0.0))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_each_row_has_columns_of_its_own(chunk):
    """As masks and as lists; the last list is the target alone, whose row neither loses nor learns."""
    value, grads = _chunked_and_grads(HIDDEN, TABLE, TARGETS, WEIGHTS, COLUMNS, chunk)
    expected, expected_grads = _plain_among(HIDDEN, TABLE)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-5)
    assert not np.any(grads[0][9]) and np.any(grads[0][7])
    np.testing.assert_allclose(_chunked(HIDDEN, TABLE, TARGETS, WEIGHTS, COLUMNS, chunk), expected, rtol=1e-6)


MIXED = Targets(
    np.array([[1, 1, 4], [2, 0, 2], [6, 3, 6], [4, 4, 4], [1, 0, 0]] * 2), np.tile([[0.2, 0.5, 0.3]], (ROWS, 1)).astype("f4")
)


@pytest.mark.parametrize(("chunk", "sizes"), [(4, None), (64, None), (2, (2, 2, 2))], ids=str)
def test_a_target_is_a_distribution(mesh_of, chunk, sizes):
    """A column may be named twice; rows of a chunk, and columns of several devices. Gradients are those of the plain softmax."""
    table = np.concatenate([TABLE, TABLE[:1]])  # 8 columns, of which two devices have 4 each
    among = np.pad(AMONG, ((0, 0), (0, 1))) | np.asarray(MIXED.over(8) > 0)

    def plain(hidden, table):
        log_probs = jax.nn.log_softmax(jnp.where(among, hidden @ table.T, -1e30))
        return -jnp.sum(WEIGHTS[:, None] * MIXED.shares * jnp.take_along_axis(log_probs, MIXED.columns, axis=1))

    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(HIDDEN, table)
    of_all = Columns(np.arange(ROWS), packed(among), np.zeros(1, np.int32), np.zeros(0, np.int32))
    with jax.set_mesh(mesh_of(*(sizes or ()))):
        value, grads = jax.jit(_chunked_and_grads, static_argnums=5)(HIDDEN, table, MIXED, WEIGHTS, of_all, chunk)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_each_row_has_columns_of_its_own_on_a_mesh(mesh_of, sizes):
    """A table of 16 rows of which each device has a part, and no list names a column of every part."""
    table = np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)
    masks = packed(np.arange(16)[None] < np.array([[14], [9]]))
    columns = Columns(OF_ROW, masks, np.array([0, 2, 5]), np.array([15, 3, 4, 12, 7]))
    expected, expected_grads = _chunked_and_grads(HIDDEN, table, TARGETS, WEIGHTS, columns, 1)
    with jax.set_mesh(mesh_of(*sizes)):
        value, grads = jax.jit(_chunked_and_grads, static_argnums=5)(HIDDEN, table, TARGETS, WEIGHTS, columns, 1)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-5)


def test_rows_of_weight_0_are_computed_only_where_they_fill_up_a_chunk():
    """Seven rows count; no number would come of the others' logits."""
    hidden = np.where(WEIGHTS[:, None] > 0, HIDDEN, np.nan)
    grad_fn = _chunked_and_grads
    value, grads = grad_fn(hidden, TABLE, TARGETS, WEIGHTS, VALID, 7)
    expected, expected_grads = _plain_and_grads(HIDDEN, TABLE)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(_chunked(hidden, TABLE, TARGETS, WEIGHTS, VALID, 7), value)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-5)
    assert np.isnan(grad_fn(hidden, TABLE, TARGETS, WEIGHTS, VALID, 8)[0])  # one of them in the second chunk
    assert not any(np.any(a) for a in jax.tree.leaves(jax.device_get(grad_fn(HIDDEN, TABLE, TARGETS, 0 * WEIGHTS, VALID, 7))))


def test_chunked_survives_large_logits():
    value, (grad, _) = _chunked_and_grads(200 * HIDDEN, TABLE, TARGETS, WEIGHTS, VALID, 4)
    np.testing.assert_allclose(value, _plain(200 * HIDDEN, TABLE), rtol=1e-5)
    assert np.isfinite(grad).all()


def test_chunked_in_bfloat16_is_close():
    """Sums and softmax stay float32; gradients come back in the dtype of their arguments."""
    low = HIDDEN.astype(jnp.bfloat16), TABLE.astype(jnp.bfloat16)
    value, grads = _chunked_and_grads(*low, TARGETS, WEIGHTS, VALID, 4)
    expected, expected_grads = _plain_and_grads(*(a.astype(np.float32) for a in low))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(grad, np.float32), wanted, atol=0.05)


def _temporary_bytes(loss, rows, items, *more):
    """Temporary memory of a loss with both gradients, beyond arguments and results."""
    shapes = [((rows, 8), "f4"), ((items, 8), "f4"), ((rows,), "i4"), ((rows,), "f4"), *more]
    args = [jax.ShapeDtypeStruct(*like) for like in shapes]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile().memory_analysis().temp_size_in_bytes


def _chunked_bytes(rows, items, chunk):
    return _temporary_bytes(lambda *a: chunked_cross_entropy(*a, chunk), rows, items, ((items,), "?"))


def test_memory_grows_with_the_chunk_not_with_the_rows():
    """At 4096 rows and items the logits alone would be 64 MiB; a chunk of them is 1 MiB."""
    few, many = _chunked_bytes(256, 4096, 64), _chunked_bytes(4096, 4096, 64)
    assert many < few + 4 * 4096 * 8 * 4  # a few copies of the hidden states
    assert many < 4 * 2**20
    assert _chunked_bytes(4096, 4096, 512) > 4 * many


def test_memory_of_the_sampled_loss_does_not_know_the_catalogue():
    """Ten times as many items: the table and its gradient, an argument and a result, are ten times as large, and nothing else.

    What the negatives are drawn by is a number an item, like one more column of the table.
    """
    shape, drawn, q, log_q = (1024, 8), 512, ((512,), "i4"), lambda items: ((items,), "f4")
    some, many = (_temporary_bytes(sampled_cross_entropy, shape[0], v, q, log_q(v)) for v in (100_000, 1_000_000))
    assert some > shape[0] * drawn * 4  # the logits are among it
    assert many < 1.2 * some
    draw = jax.jit(lambda key: draw_items(key, np.zeros(1_000_000, np.float32), drawn))
    assert draw.lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes < 2 * 1_000_000 * 4


def test_memory_of_the_chunked_loss_is_that_of_a_few_chunks_of_logits():
    """It grows with the catalogue at a given chunk, and not where the chunk shrinks as the catalogue grows."""
    some, many, short = (
        _chunked_bytes(1024, 100_000, 80),
        _chunked_bytes(1024, 1_000_000, 80),
        _chunked_bytes(1024, 1_000_000, 8),
    )
    assert many == pytest.approx(10 * some, rel=0.02)
    assert short < 1.2 * some
    assert 1 < many / (80 * 1_000_000 * 4) < 4


SOFTCAPS = {16: None, 7: 1.5}  # by the number of items


@functools.cache
def _on_one_device(items):
    """A table; the loss, 2.5 times, with both gradients, as a function of states and table; and what it returns of them."""
    table, valid = np.random.default_rng(1).normal(size=(items, WIDTH)).astype(np.float32), np.arange(items) > 0
    loss = lambda h, t: 2.5 * chunked_cross_entropy(h, t, TARGETS, WEIGHTS, valid, 1, SOFTCAPS[items])  # noqa: E731
    grad_fn = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return table, grad_fn, jax.device_get(grad_fn(HIDDEN, table))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("items", [16, 7])  # which the axes divide, and which they do not: a width of 4 is divided by 2 alone
def test_shared_out_over_a_mesh_it_is_the_same(mesh_of, sizes, items):
    """Value and both gradients, sharded as the arguments are; 10 rows are no multiple of any part."""
    table, grad_fn, (expected, expected_grads) = _on_one_device(items)
    valid = np.arange(items) > 0
    mesh = mesh_of(*sizes)
    fits = [axis if dim % mesh.shape[axis] == 0 else None for axis, dim in zip(("tensor", "fsdp"), table.shape, strict=True)]
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, NamedSharding(mesh, PartitionSpec(*fits)))
        value, grads = grad_fn(HIDDEN, placed)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(grad, wanted, atol=1e-5)
        assert grads[1].sharding.is_equivalent_to(placed.sharding, 2)
        np.testing.assert_allclose(
            _chunked(HIDDEN, placed, TARGETS, WEIGHTS, valid, 1, SOFTCAPS[items]),
            expected / 2.5,
            rtol=1e-6,
        )


def _compiled(mesh, rows, items):
    """The loss with both gradients on `mesh`, its rows shared out over `data` and `fsdp`, its table as config rules say."""
    specs = [["fsdp"], ["tensor", "fsdp"], ["fsdp"], ["fsdp"], [None]]
    shapes = [((rows, 32), "f4"), ((items, 32), "f4"), ((rows,), "i4"), ((rows,), "f4"), ((items,), "?")]
    args = [
        jax.ShapeDtypeStruct(*like, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for like, spec in zip(shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(lambda *a: chunked_cross_entropy(*a, 64), (0, 1))).lower(*args).compile()


def test_devices_share_the_work(mesh_of):
    """Of every chunk by rows, of every row by the catalogue (a count of a loop's body, on either side)."""
    whole = _compiled(mesh_of(1), 512, 256)
    assert _compiled(mesh_of(1, 1, 8), 512, 256).cost_analysis()["flops"] < whole.cost_analysis()["flops"] / 4
    # 64 rows a chunk: as many FLOPs in a body, which runs an eighth as often.
    assert "f32[8,64,32]" in whole.as_text()
    assert "f32[8,64,32]" not in _compiled(mesh_of(1, 8, 1), 512, 256).as_text()


def test_no_device_holds_the_whole_catalogue(mesh_of):
    """Shared out over 8 devices, a catalogue of 8 times as many items takes each about the memory of one device."""
    one = _compiled(mesh_of(1), 256, 4096).memory_analysis()
    eight = _compiled(mesh_of(1, 1, 8), 256, 8 * 4096).memory_analysis()
    for name in ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes"):
        assert getattr(eight, name) < 1.3 * getattr(one, name)


def test_items_are_drawn_by_their_probability_and_others_never():
    log_q = np.float32([-1e9, np.log(8 / 9), np.log(1 / 9), -1e9, -1e9])
    drawn = np.asarray(jax.jit(lambda key: draw_items(key, log_q, 90_000))(jax.random.key(0)))
    counts = np.bincount(drawn, minlength=5)
    assert counts.sum() == 90_000 and not counts[[0, 3, 4]].any()
    assert abs(counts[1] - 80_000) < 5 * (90_000 * 8 / 81) ** 0.5  # five standard deviations


@pytest.mark.parametrize(("bits", "item"), [(0, 1), (2**31 - 2, 1), (2**31, 2), (2**32 - 1, 2)])
def test_the_ends_of_the_draw_are_items(bits, item, monkeypatch):
    """Two items of a half each, and rows around them that are none."""
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, bits, dtype))
    assert draw_items(jax.random.key(0), np.array([-1e9, 0, 0, -1e9], np.float32), 1).tolist() == [item]


def test_sampled_by_hand():
    """One row: target 3 against negatives 1, 3 (the target itself, left out) and 4."""
    hidden = np.array([[1.0, 2.0]])
    table = np.array([[9.0, 9.0], [1.0, 0.0], [5.0, 5.0], [0.0, 1.0], [1.0, 1.0]])
    log_q = np.log(np.array([1.0, 0.1, 0.2, 0.3, 0.4]))
    value, _ = _sampled_and_grad(hidden, table, np.array([3]), np.array([2.0]), np.array([1, 3, 4]), log_q)
    # Scores 2 (target), 1 and 3, of the negatives each divided by its expected count among three.
    target, one, four = np.exp(2), np.exp(1) / 0.3, np.exp(3) / 1.2
    np.testing.assert_allclose(value, -2 * np.log(target / (target + one + four)), rtol=1e-6)


def test_an_accidental_hit_gets_no_gradient_as_a_negative():
    """A batch whose only negative is one row's target: that row has loss 0, and nothing pushes its item down."""
    targets, negatives, log_q = np.array([2, 1]), np.array([2]), np.zeros(ITEMS)

    value, grad = jax.device_get(_sampled_and_grad(HIDDEN[:2], TABLE, targets, np.array([1.0, 0.0]), negatives, log_q))
    assert value == 0 and not np.any(grad)
    value, grad = jax.device_get(_sampled_and_grad(HIDDEN[:2], TABLE, targets, np.array([0.0, 1.0]), negatives, log_q))
    assert value > 0 and np.any(grad[2]) and np.any(grad[1])


def test_sampling_every_item_once_is_the_full_softmax():
    kept = np.flatnonzero(VALID)
    value, _ = _sampled_and_grad(HIDDEN, TABLE, TARGETS, WEIGHTS, np.asarray(kept), np.full(ITEMS, -np.log(len(kept))))
    np.testing.assert_allclose(value, _plain(HIDDEN, TABLE), rtol=1e-6)


def test_in_batch_by_hand():
    """Targets 3, 1, 3 of rows that count and 4 of one that does not: the softmax is over items 1 and 3, each once.

    Items 1 and 3 have half and an eighth of all training events: one of three targets is item 1 with probability 7/8.
    """
    hidden = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    table = np.array([[9.0, 9.0], [1.0, 0.0], [5.0, 5.0], [0.0, 2.0], [7.0, 7.0]], np.float32)
    share = jnp.array([0, 1 / 2, 1 / 4, 1 / 8, 1 / 8])
    weights = np.array([1.0, 2.0, 0.5, 0.0], np.float32)
    one, three = 7 / 8, 1 - (7 / 8) ** 3

    @jax.jit
    @jax.value_and_grad
    def loss(table):
        return in_batch_cross_entropy(hidden, lambda items: table[items], np.array([3, 1, 3, 4]), weights, share, 3)

    value, grad = jax.device_get(loss(table))
    expected = 0.0
    for row, item, weight in ((0, 3, 1.0), (1, 1, 2.0), (2, 3, 0.5)):
        odds = {1: np.exp(hidden[row] @ table[1]) / one, 3: np.exp(hidden[row] @ table[3]) / three}
        expected -= weight * np.log(odds[item] / (odds[1] + odds[3]))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert {item for item in range(5) if np.any(grad[item])} == {1, 3}


def test_in_batch_with_every_item_among_the_targets_is_the_full_softmax_of_corrected_logits():
    """More rows than items, all of them targets of a batch so large that each is certain to be among it."""
    targets = np.tile([1, 2, 3, 4], 30)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(120, WIDTH)).astype(np.float32))
    weights, share = np.ones(120, np.float32), jnp.array([0, *[0.25] * 4, 0, 0])
    loss = jax.jit(lambda table: in_batch_cross_entropy(hidden, lambda items: table[items], targets, weights, share, 64))
    full = jax.jit(lambda table: chunked_cross_entropy(hidden, table, targets, weights, VALID, 64))
    np.testing.assert_allclose(loss(TABLE), full(TABLE), rtol=1e-5)


def test_soft_by_hand():
    """Probabilities 1/2, 1/4, 1/4; bags {1}, {1, 2}, {} and, with weight 0, {2}."""
    logits = np.log(np.array([[0.5, 0.25, 0.25]] * 4))
    labels = np.array([[1, 0], [1, 2], [0, 0], [2, 0]])
    weights = np.array([1.0, 3.0, 5.0, 0.0])
    soft = jax.jit(soft_cross_entropy)
    np.testing.assert_allclose(soft(logits, labels, weights), (1 + 3) * np.log(4), rtol=1e-6)
    # Twice the odds of class 2 in the second row: 2/5, 1/5, 2/5.
    logits[1, 2] += np.log(2)
    np.testing.assert_allclose(soft(logits, labels, weights), np.log(4) - 3 * np.log(1 / 5 * 2 / 5) / 2, rtol=1e-6)
