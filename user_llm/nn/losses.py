"""Cross entropies over large catalogues.

Up to some 50,000 items the softmax is exact and computed in chunks: the logits of all positions are never in memory at once,
and each chunk's logits are computed once, for the loss and its gradient together. Above, softmax over sampled negatives with
log-Q correction (Yi et al. 2019; TRON and eSASRec show that it keeps the accuracy of the full softmax). Where output vectors are
computed from an item's features, over the other targets of the batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _chunk_rows(rows: int, chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Pad arrays [R, ...] and split them to [R / chunk, chunk, ...].

    Every n-th row goes to the same chunk, so that devices which share the rows also share each chunk.
    """
    chunk = min(chunk, rows)
    padded = (jnp.pad(a, [(0, -rows % chunk)] + [(0, 0)] * (a.ndim - 1)) for a in arrays)
    return tuple(a.reshape(chunk, -1, *a.shape[1:]).swapaxes(0, 1) for a in padded)


def _chunk_logits(hidden: Array, table: Array, valid: Array) -> Array:
    logits = jnp.einsum("RD,VD->RV", hidden, table, preferred_element_type=jnp.float32)
    return jnp.where(valid, logits, -1e30)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunked_cross_entropy(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "R"],
    weights: Float[Array, "R"],
    valid: Bool[Array, "V"],
    chunk: int,
) -> Float[Array, ""]:
    """Return the sum over rows of weight * -log softmax(hidden table^T)[target], the softmax over `valid` columns.

    Gradients flow to `hidden` and `table` and are computed in the forward pass, chunk by chunk of `chunk` rows; peak memory is
    O(chunk V). Rows of weight 0 count for nothing, whatever their target.
    """

    def step(total, rows):
        hidden, targets, weights = rows
        logits = _chunk_logits(hidden, table, valid)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return total + jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - picked)), None

    rows = _chunk_rows(hidden.shape[0], chunk, hidden, targets, weights)
    return jax.lax.scan(step, jnp.zeros((), jnp.float32), rows)[0]


def _chunked_forward(hidden, table, targets, weights, valid, chunk):
    def step(carry, rows):
        total, table_grad = carry
        hidden, targets, weights = rows
        logits = _chunk_logits(hidden, table, valid)
        peak = logits.max(axis=1, keepdims=True)
        exp = jnp.exp(logits - peak)
        sums = exp.sum(axis=1)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        total += jnp.sum(weights * (jnp.log(sums) + peak[:, 0] - picked))
        hit = jnp.arange(table.shape[0]) == targets[:, None]
        grad = (exp * (weights / sums)[:, None] - jnp.where(hit, weights[:, None], 0.0)).astype(table.dtype)
        hidden_grad = jnp.einsum("RV,VD->RD", grad, table, preferred_element_type=jnp.float32)
        table_grad += jnp.einsum("RV,RD->VD", grad, hidden, preferred_element_type=jnp.float32)
        return (total, table_grad), hidden_grad.astype(hidden.dtype)

    rows = _chunk_rows(hidden.shape[0], chunk, hidden, targets, weights)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (total, table_grad), hidden_grad = jax.lax.scan(step, start, rows)
    hidden_grad = hidden_grad.swapaxes(0, 1).reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (hidden_grad, table_grad.astype(table.dtype))


def _chunked_backward(chunk, grads, cotangent):
    hidden_grad, table_grad = grads
    return (hidden_grad * cotangent).astype(hidden_grad.dtype), (table_grad * cotangent).astype(table_grad.dtype), *(None,) * 3


chunked_cross_entropy.defvjp(_chunked_forward, _chunked_backward)


def sampled_cross_entropy(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "R"],
    weights: Float[Array, "R"],
    negatives: Int[Array, "Q"],
    log_q: Float[Array, "V"],
) -> Float[Array, ""]:
    """Return the weighted sum of -log softmax over each row's target and `negatives`, which all rows share.

    Logits are corrected by `log_q`, the log of each item's expected count among the negatives; a negative that is the row's
    target is left out, so that no item is pushed up and down at once.
    """
    positive = jnp.einsum("RD,RD->R", hidden, table[targets], preferred_element_type=jnp.float32)
    logits = jnp.einsum("RD,QD->RQ", hidden, table[negatives], preferred_element_type=jnp.float32) - log_q[negatives]
    logits = jnp.where(negatives == targets[:, None], -1e30, logits)
    positive = (positive - log_q[targets])[:, None]
    losses = jax.nn.logsumexp(jnp.concatenate([positive, logits], axis=1), axis=1) - positive[:, 0]
    return jnp.sum(weights * losses)


def in_batch_cross_entropy(
    hidden: Float[Array, "R D"],
    vectors: Callable[[Int[Array, "Q"]], Float[Array, "Q D"]],
    targets: Int[Array, "R"],
    weights: Float[Array, "R"],
    share: Float[Array, "V"],
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


def soft_cross_entropy(logits: Float[Array, "R C"], labels: Int[Array, "R W"], weights: Float[Array, "R"]) -> Float[Array, ""]:
    """Return the weighted sum of cross entropies against the uniform distribution over each row's bag of labels.

    Label 0 is padding of the bag; a row with an empty bag counts for nothing. One label a row is the usual cross entropy.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    real = labels > 0
    picked = jnp.where(real, jnp.take_along_axis(log_probs, labels, axis=-1), 0.0).sum(-1)
    return -jnp.sum(weights * picked / jnp.maximum(real.sum(-1), 1))
