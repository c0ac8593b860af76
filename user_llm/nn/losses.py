"""Cross entropies over large catalogues.

Up to some 50,000 items the softmax is exact and computed in chunks: the logits of all positions are never in memory at once,
each chunk's logits are computed once, for the loss and its gradient together, and those of positions that count for nothing, as most
of a prompt do, hardly ever. Above, softmax over sampled negatives with
log-Q correction (Yi et al. 2019; TRON and eSASRec show that it keeps the accuracy of the full softmax). Where output vectors are
computed from an item's features, over the other targets of the batch.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from user_llm.common.arrays import AnyArray
from user_llm.common.mesh import BATCH_AXES
from user_llm.nn.columns import Columns, Targets
from user_llm.nn.layers import capped

Whole = Mapping[str, Array]  # of a batch: its counts by name, and `parts`, into how many it is split


def whole_count(weights: Float[AnyArray, " R"], whole: Whole | None, name: str) -> Num[Array, ""]:
    """Return by what the mean over rows of weight 1 divides, at least 1: their number, or `whole[name]` where the rows are part of a batch.

    What only the part itself can tell, such as how many events it hides, is taken to be as many in each part.
    """
    count = weights.sum()
    if whole is not None:
        count = whole[name] if name in whole else count * whole["parts"]
    return jnp.maximum(count, 1)


class Axes(NamedTuple):
    """The mesh axes that share out rows, the catalogue and the width; () and None outside a mesh.

    Each device gathers the width of its part of the catalogue once, works on rows of its own, and sums up the gradient of the
    table once. Left to itself, XLA does both for every chunk.
    """

    rows: tuple[str, ...]
    catalogue: str | None
    width: str | None

    def sum(self, x: Array) -> Array:
        """Sum over the catalogue."""
        return x if self.catalogue is None else jax.lax.psum(x, self.catalogue)

    def max(self, x: Array) -> Array:
        """Return the maximum over the catalogue."""
        return x if self.catalogue is None else jax.lax.pmax(x, self.catalogue)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def chunked_cross_entropy(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V D"],
    targets: Int[AnyArray, " R"] | Targets,
    weights: Float[AnyArray, " R"],
    valid: Bool[AnyArray, " V"] | Columns,
    chunk: int,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Return the sum over rows of weight * -log softmax(hidden table^T)[target], the softmax over `valid` columns.

    All rows may share their columns, or each row has its own. A row's target must be one of its columns, or several of them, whose
    -log softmax is then averaged by their shares. Logits are bent to stay below `softcap`, as `layers.capped` does; None for no cap.

    Gradients flow to `hidden` and `table`. They are computed in the forward pass, chunk by chunk of `chunk` rows; peak memory is
    O(chunk V). Rows of weight 0 count for nothing, whatever their target, and their logits are computed only where they fill up a
    chunk. Within `jax.set_mesh` rows are shared out over `data` and `fsdp`, each device taking `chunk` of its own at a time, and the
    catalogue over `tensor`.
    """
    return _over_mesh(_loss, hidden, table, targets, weights, valid, chunk, softcap)[0]


def _over_mesh(body: Callable[..., tuple], hidden, table, targets, weights, valid, chunk: int, softcap: float | None) -> tuple:
    """Run `body(axes, chunk, softcap, ...)` on every device's part of the arrays; a dimension that its axis does not divide stays whole."""
    targets = targets if isinstance(targets, Targets) else Targets.single(targets)
    of_row, *sets = valid if isinstance(valid, Columns) else Columns.same(valid, len(hidden))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return body(Axes((), None, None), chunk, softcap, hidden, table, targets, weights, of_row, *sets)
    shards, rows = mesh.shape["data"] * mesh.shape["fsdp"], hidden.shape[0]
    fits = [axis if dim % mesh.shape[axis] == 0 else None for axis, dim in zip(("tensor", "fsdp"), table.shape, strict=True)]
    hidden, targets, weights, of_row = _padded((hidden, targets, weights, of_row), shards)
    by_row, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    of_table = PartitionSpec(*fits)
    found = jax.shard_map(
        functools.partial(body, Axes(BATCH_AXES, *fits), chunk, softcap),
        in_specs=(by_row, of_table, by_row, by_row, by_row, *[whole] * len(sets)),
        out_specs=(whole,) if body is _loss else (whole, by_row, of_table),
        check_vma=False,  # sums over axes are written out below
    )(hidden, table, targets, weights, of_row, *sets)
    return found if body is _loss else (found[0], found[1][:rows], found[2])


def _padded(by_rows: tuple, multiple: int) -> tuple:
    """Return arrays with as many zero rows behind them as make their number a multiple."""
    return jax.tree.map(lambda a: jnp.pad(a, [(0, -len(a) % multiple)] + [(0, 0)] * (a.ndim - 1)), by_rows)


class _Chunk(NamedTuple):
    """A chunk's softmax over this device's part of the catalogue, and its targets.

    Attributes:
      wanted: the targets' shares of each column.
      bend: the derivative of the capped logits by the uncapped ones; 1 without a cap.
    """

    exp: Float[Array, "c v"]
    sums: Float[Array, " c"]
    losses: Float[Array, " c"]
    wanted: Float[Array, "c v"]
    bend: Float[Array, "c v"] | float


def _softmax(axes: Axes, softcap: float | None, hidden: Array, table: Array, targets: Targets, columns: Columns) -> _Chunk:
    logits = capped(jnp.einsum("RD,VD->RV", hidden, table, preferred_element_type=jnp.float32), softcap)
    bend = 1.0 if softcap is None else 1 - jnp.square(logits / softcap)
    first = 0 if axes.catalogue is None else jax.lax.axis_index(axes.catalogue) * table.shape[0]
    logits = jnp.where(columns.valid(table.shape[0], first), logits, -1e30)
    wanted = targets.over(table.shape[0], first)
    peak = axes.max(jax.lax.stop_gradient(logits.max(axis=1)))
    exp = jnp.exp(logits - peak[:, None])
    sums = axes.sum(exp.sum(axis=1))
    picked = axes.sum((wanted * logits).sum(axis=1))
    return _Chunk(exp, sums, jnp.log(sums) + peak - picked, wanted, bend)


def _whole_width(axes: Axes, table: Array) -> Array:
    return table if axes.width is None else jax.lax.all_gather(table, axes.width, axis=1, tiled=True)


def _over_chunks(
    axes: Axes,
    chunk: int,
    step: Callable[..., tuple[Any, Array]],
    start: Any,
    hidden: Array,
    targets: Targets,
    weights: AnyArray,
    of_row: AnyArray,
) -> tuple[Any, Array]:
    """Return the last carry of carry, out = step(carry, hidden, targets, weights, of_row) over chunks of rows, and all `out` [R, D].

    Of several chunks, rows of weight 0 come behind all others, and no step is made for a chunk of them alone: their `out` is 0.
    """
    rows = len(hidden)
    if rows <= chunk:  # a loop, even of one step, would have `start` and the sum in memory side by side
        return step(start, hidden, targets, weights, of_row)
    order = jnp.argsort(weights == 0, stable=True)
    # Behind the last row, and of weight 0, those that fill up the last chunk.
    by_rows = (hidden, targets, weights, of_row)
    filled = _padded(jax.tree.map(lambda a: jnp.take(a, order, axis=0, mode="clip"), by_rows), chunk)
    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), filled)
    most, counting = len(chunks[0]), (weights != 0).sum()
    if axes.catalogue:  # its parts are summed up within a step: all devices make as many
        counting = jax.lax.pmax(counting, axes.rows)

    def advance(state):
        number, carry, outs = state
        carry, out = step(carry, *jax.tree.map(lambda a: a[number], chunks))
        return number + 1, carry, outs.at[number].set(out)

    # No scan with a condition in its body: what all chunks share, such as the table turned around, is made once for a loop. `most` says
    # nothing that `counting` does not, but to those who count FLOPs and collectives.
    begin = jnp.int32(0), start, jnp.zeros_like(chunks[0])
    going = lambda state: (state[0] < most) & (state[0] * chunk < counting)  # noqa: E731
    _, carry, outs = jax.lax.while_loop(going, advance, begin)
    return carry, outs.reshape(-1, hidden.shape[1])[jnp.argsort(order)]


def _loss(axes: Axes, chunk: int, softcap: float | None, hidden, table, targets, weights, of_row, *sets) -> tuple[Array]:
    table = _whole_width(axes, table)

    def step(total, hidden, targets, weights, of_row):
        found = _softmax(axes, softcap, hidden, table, targets, Columns(of_row, *sets))
        return total + jnp.sum(weights * found.losses), jnp.zeros_like(hidden)

    total, _ = _over_chunks(axes, chunk, step, jnp.zeros((), jnp.float32), hidden, targets, weights, of_row)
    return (jax.lax.psum(total, axes.rows) if axes.rows else total,)


def _loss_and_gradients(
    axes: Axes, chunk: int, softcap: float | None, hidden, table, targets, weights, of_row, *sets
) -> tuple[Array, Array, Array]:
    table = _whole_width(axes, table)

    def step(carry, hidden, targets, weights, of_row):
        total, table_grad = carry
        found = _softmax(axes, softcap, hidden, table, targets, Columns(of_row, *sets))
        total += jnp.sum(weights * found.losses)
        grad = found.exp * (weights / found.sums)[:, None] - found.wanted * weights[:, None]
        grad = (grad * found.bend).astype(table.dtype)
        hidden_grad = axes.sum(jnp.einsum("RV,VD->RD", grad, table, preferred_element_type=jnp.float32))
        table_grad += jnp.einsum("RV,RD->VD", grad, hidden, preferred_element_type=jnp.float32)
        return (total, table_grad), hidden_grad.astype(hidden.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (total, table_grad), hidden_grad = _over_chunks(axes, chunk, step, start, hidden, targets, weights, of_row)
    if axes.rows:
        total = jax.lax.psum(total, axes.rows)
        if axes.width:
            table_grad = jax.lax.psum_scatter(table_grad, axes.width, scatter_dimension=1, tiled=True)
        table_grad = jax.lax.psum(table_grad, tuple(axis for axis in axes.rows if axis != axes.width))
    return total, hidden_grad, table_grad.astype(table.dtype)


def _chunked_forward(hidden, table, targets, weights, valid, chunk, softcap):
    total, *gradients = _over_mesh(_loss_and_gradients, hidden, table, targets, weights, valid, chunk, softcap)
    return total, tuple(gradients)


def _chunked_backward(chunk, softcap, grads, cotangent):
    hidden_grad, table_grad = grads
    return (hidden_grad * cotangent).astype(hidden_grad.dtype), (table_grad * cotangent).astype(table_grad.dtype), *(None,) * 3


chunked_cross_entropy.defvjp(_chunked_forward, _chunked_backward)


def draw_items(key: Array, log_q: Float[np.ndarray, " V"], count: int) -> Int[Array, " Q"]:
    """Draw `count` items, one perhaps more than once, by probabilities in proportion to exp(log_q), known before tracing.

    By the inverse of their cumulative sum, in steps of 2^-32: memory is O(V + Q), where `jax.random.categorical` takes Q V.
    """
    cumulated = np.cumsum(np.exp(np.asarray(log_q, np.float64)))
    steps = (cumulated / cumulated[-1] * (2**32 - 1)).astype(np.uint32)
    bits = jnp.minimum(jax.random.bits(key, (count,), jnp.uint32), np.uint32(2**32 - 2))  # always below the last step
    return jnp.searchsorted(jnp.asarray(steps), bits, side="right")


def sampled_cross_entropy(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V D"],
    targets: Int[AnyArray, " R"],
    weights: Float[AnyArray, " R"],
    negatives: Int[AnyArray, " Q"],
    log_q: Float[AnyArray, " V"],
) -> Float[Array, ""]:
    """Return the weighted sum of -log softmax, its denominator estimated from `negatives`, which all rows share.

    By importance sampling (Bengio and Senécal 2008): each negative stands for as many items as the inverse of its expected count
    among the Q drawn, and the row's own target, which is no draw, for itself alone; where it is drawn it is left out. With ever more
    negatives it comes to the exact softmax over the items that can be drawn.

    Args:
      log_q: log of each item's probability in a draw.
    """
    positive = jnp.einsum("RD,RD->R", hidden, table[targets], preferred_element_type=jnp.float32)[:, None]
    logits = jnp.einsum("RD,QD->RQ", hidden, table[negatives], preferred_element_type=jnp.float32)
    logits -= log_q[negatives] + math.log(len(negatives))
    logits = jnp.where(negatives == targets[:, None], -1e30, logits)
    losses = jax.nn.logsumexp(jnp.concatenate([positive, logits], axis=1), axis=1) - positive[:, 0]
    return jnp.sum(weights * losses)


def in_batch_cross_entropy(
    hidden: Float[Array, "R D"],
    vectors: Callable[[Int[Array, " Q"]], Float[Array, "Q D"]],
    targets: Int[AnyArray, " R"],
    weights: Float[AnyArray, " R"],
    share: Float[AnyArray, " V"],
    chunk: int,
) -> Float[Array, ""]:
    """Return the weighted sum of -log softmax over the distinct targets of the batch: each row's negatives are the others' targets.

    Logits are corrected by log q, where q = 1 - (1 - share)^n is the probability of an item to be among the batch's n targets:
    without that popular items, which are negatives most often, would be pushed down for it (Yi et al. 2019). Distinct, so that
    no item is pushed up and down at once and there are never more logits than items.

    Args:
      vectors: ids -> output vectors, computed for the items of the batch alone.
      targets: ids; those of rows of weight 0 are no one's negatives.
      share: of each item among all targets of training; positive for every target.
      chunk: rows of logits in memory at once.
    """
    real = weights > 0
    items, place = jnp.unique(
        jnp.where(real, targets, 0), size=min(targets.shape[0], share.shape[0]), fill_value=0, return_inverse=True
    )
    log_q = jnp.where(items > 0, jnp.log(-jnp.expm1(real.sum() * jnp.log1p(-share[items]))), 0.0)
    # The correction as one more product: 1 * -log q.
    hidden = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1)
    table = vectors(items)
    table = jnp.concatenate([table, -log_q[:, None].astype(table.dtype)], axis=1)
    return chunked_cross_entropy(hidden, table, place, weights, items > 0, chunk)


def soft_cross_entropy(
    logits: Float[Array, "R C"], labels: Int[AnyArray, "R W"], weights: Float[AnyArray, " R"]
) -> Float[Array, ""]:
    """Return the weighted sum of cross entropies against the uniform distribution over each row's bag of labels.

    Label 0 is padding of the bag; a row with an empty bag counts for nothing. One label a row is the usual cross entropy.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    real = labels > 0
    picked = jnp.where(real, jnp.take_along_axis(log_probs, labels, axis=-1), 0.0).sum(-1)
    return -jnp.sum(weights * picked / jnp.maximum(real.sum(-1), 1))
