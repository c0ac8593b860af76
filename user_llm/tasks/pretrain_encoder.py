"""Phase 1: pretrain the user encoder to predict each next event (section 3 of the paper, autoregressive variant).

Every position of every history is trained; the loss is the weighted sum of the cross entropies of the next item and of the
chosen features of the next event. Validation and test rank the full catalogue.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from user_llm.common import trees
from user_llm.common.trees import Params
from user_llm.data.pipeline import HistoryBatch, packed_windows
from user_llm.data.schema import Schema
from user_llm.evals.evaluator import rank_targets, train_counts
from user_llm.evals.ranking import result_rows
from user_llm.models.user_encoder import UserEncoder, UserEncoderConfig
from user_llm.nn.attention import causal_mask, segment_mask
from user_llm.nn.losses import chunked_cross_entropy, sampled_cross_entropy, soft_cross_entropy
from user_llm.nn.transformer import BlockConfig
from user_llm.tasks.context import Context
from user_llm.training.task import Batch, Task


def encoder_config(config: ConfigDict, schema: Schema) -> UserEncoderConfig:
    """Turn a config's `encoder` section into the model's own; features are chosen and ordered by `features`, () for all."""
    chosen = Schema(tuple(schema[name] for name in config.features or schema.names))
    block = BlockConfig(**config.block)
    rest = {name: value for name, value in config.items() if name not in ("features", "block", "heads")}
    return UserEncoderConfig(schema=chosen, block=block, heads=tuple(config.heads), **rest)


@dataclasses.dataclass(frozen=True)
class EncoderLoss:
    """The pretraining loss.

    Attributes:
      head_weights: weight of each feature head next to the item's 1.
      negatives: 0 for the exact softmax, else how many sampled negatives a step.
      chunk: rows of logits in memory at once in the exact softmax.
      log_q: log of each item's expected count among the negatives, which are drawn by train frequency ^ 0.75.
    """

    head_weights: dict[str, float]
    negatives: int
    chunk: int
    log_q: Float[np.ndarray, "V"]

    def __call__(self, encoder: UserEncoder, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        dropout_key, negatives_key = jax.random.split(key)
        states = encoder(batch["events"], mask=segment_mask(batch["segments"]), positions=batch["positions"], key=dropout_key)
        rows = states.reshape(-1, states.shape[-1])
        labels = batch["next"].reshape(rows.shape[0], -1)
        weights = (batch["segments"] > 0).reshape(-1).astype(jnp.float32)
        weights /= jnp.maximum(weights.sum(), 1)
        item = self._item_loss(encoder, rows, labels[:, 0], weights, negatives_key)
        total, scalars, column = item, {"item_loss": item}, 1
        for feature in encoder.config.schema.features[1:]:
            if feature.name in encoder.heads:
                logits = rows @ encoder.heads[feature.name][...]
                loss = soft_cross_entropy(logits, labels[:, column : column + feature.width], weights)
                scalars[f"{feature.name}_loss"] = loss
                total += self.head_weights[feature.name] * loss
            column += feature.width
        return total, scalars

    def _item_loss(self, encoder: UserEncoder, rows: Array, targets: Int[Array, "R"], weights: Array, key: Array) -> Array:
        table = encoder.item[...]
        if not self.negatives:
            return chunked_cross_entropy(rows, table, targets, weights, encoder.valid_items(), self.chunk)
        negatives = jax.random.categorical(key, jnp.asarray(self.log_q), shape=(self.negatives,))
        return sampled_cross_entropy(rows, table, targets, weights, negatives, jnp.asarray(self.log_q))


def negative_log_q(counts: Int[np.ndarray, "I"], rows: int) -> Float[np.ndarray, "V"]:
    """Return log q of a draw by train frequency ^ 0.75 (word2vec's exponent); never-seen items, PAD and spare rows get -inf-like."""
    weight = np.zeros(rows)
    weight[1 : len(counts)] = counts[1:] ** 0.75
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(weight / weight.sum()), -1e9).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def encode_last(graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, "B"]) -> Array:
    """Score all items [B, V] as what follows right-padded histories; a history of length 0 gives scores of its padding."""
    encoder = trees.merge(graphdef, params)
    valid = jnp.arange(events.shape[1]) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(events.shape[1]), valid.shape)
    states = encoder(events, mask=causal_mask(valid), positions=positions)
    last = jnp.take_along_axis(states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return encoder.score(last)


def build(config: ConfigDict, name: str, context: Context) -> Task:
    """Build the task of phase `name`."""
    phase = config[name]
    timelines = context.timelines.select(tuple(config.encoder.features))
    split = context.split
    model_config = encoder_config(config.encoder, timelines.schema)
    create = lambda: UserEncoder(model_config, rngs=nnx.Rngs(params=context.seed))  # noqa: E731
    graphdef, _ = trees.abstract(create)
    data = phase.batch
    loss = EncoderLoss(
        head_weights=dict(phase.loss.head_weights),
        negatives=phase.loss.negatives,
        chunk=phase.loss.chunk,
        log_q=negative_log_q(train_counts(timelines, split), model_config.table_rows),
    )

    def rank(params: Params, part: str, limit: int | None = None):
        def score(batch: HistoryBatch) -> Array:
            return encode_last(graphdef, params, batch.events, batch.lengths)

        return rank_targets(
            score, timelines, split, part, max_events=phase.eval.max_events, batch_size=phase.eval.batch_size, limit=limit
        )

    def results(params: Params) -> list[dict]:
        ranks = rank(params, "test")
        context.save_breakdown(name, "encoder", ranks)
        return result_rows(ranks.metrics(), len(ranks), **context.row_facts, method="encoder")

    return Task(
        name=name,
        init=lambda place: trees.init(create, place),
        loss=lambda params, batch, key: loss(trees.merge(graphdef, params), batch, key),
        train_data=packed_windows(
            timelines, split.train_stop, window=data.window, rows=data.rows, row_length=data.row_length,
            seed=context.seed, process=context.process,
        ),
        steps_per_epoch=np.maximum(split.train_stop - 1, 0).sum() / (data.rows * data.row_length * context.process[1]),
        count_events=lambda batch: int((batch["segments"] > 0).sum()),
        evaluate=lambda params: rank(params, "validation", phase.eval.validation_users).metrics(),
        results=results,
    )  # fmt: skip
