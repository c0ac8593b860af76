"""Phase 1: pretrain the user encoder (section 3 of the paper: autoregressive, BERT4Rec and dual encoder).

`models/user_encoder.py` says what the three objectives are. Autoregressive and dual, every position of every history predicts the
next event; masked, the hidden events are predicted, of the same histories. The loss is the weighted sum of the cross entropies
of the item and of the chosen features of that event. Validation and test rank the full catalogue.

BERT4Rec learns from a fraction of the events at a time, and late: Petrov and Macdonald (2022, "A systematic review and
replicability study of BERT4Rec") needed up to 30 times the training of common defaults for its published figures.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.errors import naming
from user_llm.common.trees import Params
from user_llm.config.phases import PretrainEncoder
from user_llm.config.reader import read_options
from user_llm.config.records import Encoder
from user_llm.data.dataset import Dataset
from user_llm.data.pipeline import BUCKET, HistoryBatch, packed_windows
from user_llm.data.schema import Schema
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.evals.evaluator import rank_each
from user_llm.evals.ranking import RANKING, Ranks
from user_llm.evals.transitions import TOGETHER, weighted_transitions
from user_llm.models.encoder import EncoderConfig
from user_llm.models.item_rows import features_of
from user_llm.models.transitions import Transitions, last_items
from user_llm.models.user_encoder import UserEncoder, UserEncoderConfig
from user_llm.nn.losses import (
    Whole,
    chunked_cross_entropy,
    draw_items,
    in_batch_cross_entropy,
    sampled_cross_entropy,
    soft_cross_entropy,
    whole_count,
)
from user_llm.nn.masking import choose_masked
from user_llm.nn.transformer import BlockConfig
from user_llm.nn.visibility import segment_mask
from user_llm.phases.run import Run
from user_llm.training.task import Batch, Program, Task


def encoder_config(section: Encoder, schema: Schema, kinds: Mapping[str, Any]) -> EncoderConfig:
    """Turn a config's `encoder` section into the model's own; features are chosen and ordered by `features`, () for all.

    Args:
      kinds: the encoders besides ours that `encoder.kind` may name.

    Raises:
      ValueError: an option of such an encoder that is unknown, missing or wrong.
    """
    chosen = Schema(tuple(schema[name] for name in section.features or schema.names))
    if section.kind in kinds:
        if section.objective != "autoregressive":
            raise ValueError(
                f"encoder.objective={section.objective!r}: the encoder {section.kind} has no objective but its own."
            )
        return kinds[section.kind](schema=chosen, **read_options(kinds[section.kind], section.options, "encoder.options"))
    block = BlockConfig(**vars(section.block), attention_kernel=section.attention_kernel)
    own = ("kind", "options", "features", "block", "attention_kernel")
    return UserEncoderConfig(
        schema=chosen, block=block, **{name: value for name, value in vars(section).items() if name not in own}
    )


def check_longest(encoder: EncoderConfig, events: Mapping[str, int]) -> None:
    """See that an encoder can read histories that are as long as settings ask for.

    Args:
      events: how many events are asked for, by the setting's key.

    Raises:
      ValueError: more than it can read.
    """
    for key, most in events.items():
        if encoder.longest is not None and most > encoder.longest:
            raise ValueError(f"{key}={most}: the encoder {encoder.kind} reads at most {encoder.longest} events.")


@dataclasses.dataclass(frozen=True)
class EncoderLoss:
    """The pretraining loss.

    Attributes:
      head_weights: weight of each feature head next to the item's 1.
      negatives: 0 for the exact softmax, else how many sampled negatives a step.
      chunk: rows of logits in memory at once in the exact softmax.
      log_q: log of each item's probability in a draw of a negative, by train frequency ^ 0.75.
      share: each item's share of all training events. It corrects the logits where the negatives are those of the batch.
      mask_probability, last_only: of `choose_masked`, for the masked objective.
      in_batch: whether the negatives are the other targets of the batch, as those of a dual encoder always are.
    """

    head_weights: dict[str, float]
    negatives: int
    chunk: int
    log_q: Float[np.ndarray, " V"]
    share: Float[np.ndarray, " V"]
    mask_probability: float
    last_only: float
    in_batch: bool = False

    def __call__(
        self, encoder: UserEncoder, batch: Batch, key: Array, whole: Whole | None = None
    ) -> tuple[Array, dict[str, Array]]:
        dropout_key, draw_key = jax.random.split(key)
        predict = self._next if encoder.config.causal else self._hidden
        states, labels, real = predict(encoder, batch, dropout_key, draw_key)
        rows = states.reshape(-1, states.shape[-1])
        labels = labels.reshape(rows.shape[0], -1)
        weights = real.reshape(-1).astype(jnp.float32)
        weights /= whole_count(weights, whole, "events")
        item = self._item_loss(encoder, rows, labels[:, 0], weights, draw_key)
        total, scalars, column = item, {"item_loss": item}, 1
        for feature in encoder.config.schema.features[1:]:
            if feature.name in encoder.heads:
                logits = rows @ encoder.heads[feature.name][...]
                loss = soft_cross_entropy(logits, labels[:, column : column + feature.width], weights)
                scalars[f"{feature.name}_loss"] = loss
                total += self.head_weights[feature.name] * loss
            column += feature.width
        return total, scalars

    def _next(self, encoder: UserEncoder, batch: Batch, dropout_key: Array, draw_key: Array) -> tuple[Array, Array, Array]:
        """Return all states, the event that follows each, and which are real."""
        states = encoder.states(batch["events"], segments=batch["segments"], positions=batch["positions"], key=dropout_key)
        return states, batch["next"], batch["segments"] > 0

    def _hidden(self, encoder: UserEncoder, batch: Batch, dropout_key: Array, draw_key: Array) -> tuple[Array, Array, Array]:
        """Return the states of hidden events, the events themselves, and which are real.

        The histories are those of the `next` events: an epoch has the very targets of the autoregressive objective.
        """
        events, segments = batch["next"], batch["segments"]
        places, real = choose_masked(
            jax.random.fold_in(draw_key, 1), segments, probability=self.mask_probability, last_only=self.last_only
        )
        rows = jnp.arange(len(segments))[:, None]
        hidden = jnp.zeros(segments.shape, bool).at[rows, places].set(real)
        mask = segment_mask(segments, causal=False)
        states = encoder(events, mask=mask, positions=batch["positions"], hidden=hidden, key=dropout_key)
        return states[rows, places], events[rows, places], real

    def _item_loss(self, encoder: UserEncoder, rows: Array, targets: Int[Array, " R"], weights: Array, key: Array) -> Array:
        if self.in_batch or encoder.config.objective == "dual":
            return in_batch_cross_entropy(rows, encoder.item_vectors, targets, weights, jnp.asarray(self.share), self.chunk)
        table = encoder.item_vectors()
        if not self.negatives:
            return chunked_cross_entropy(rows, table, targets, weights, encoder.valid_items(), self.chunk)
        negatives = draw_items(key, self.log_q, self.negatives)
        return sampled_cross_entropy(rows, table, targets, weights, negatives, jnp.asarray(self.log_q))


def negative_log_q(counts: Int[np.ndarray, " I"], rows: int) -> Float[np.ndarray, " V"]:
    """Return log q of a draw by train frequency ^ 0.75 (word2vec's exponent); never-seen items, PAD and spare rows get -inf-like."""
    weight = np.zeros(rows)
    weight[1 : len(counts)] = counts[1:] ** 0.75
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(weight / weight.sum()), -1e9).astype(np.float32)


def item_share(counts: Int[np.ndarray, " I"], rows: int) -> Float[np.ndarray, " V"]:
    """Return each item's share of all training events, 0 for spare rows."""
    return np.pad(counts / counts.sum(), (0, rows - len(counts))).astype(np.float32)


def item_catalogue(timelines: Timelines, config: EncoderConfig) -> Int[np.ndarray, "V X"]:
    """Return the features of every item that an item tower reads, 0 for PAD and spare rows."""
    table = features_of(config.schema, timelines.catalogue)
    return np.pad(table, ((0, config.table_rows - len(table)), (0, 0)))


@functools.partial(jax.jit, static_argnums=0)
def score_next(graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, " B"]) -> Array:
    """Score all items [B, V] as what follows right-padded histories; a history of length 0 gives scores of its padding."""
    encoder = trees.merge(graphdef, params)
    return encoder.score(encoder.encode(events, lengths[:, None]).last()[:, 0])


def check_targets(split: Split) -> None:
    """See that both parts of a split have targets.

    Raises:
      ValueError: one that has none.
    """
    for part, (users, _) in split.targets.items():
        if not len(users):
            raise ValueError(f"no user of the {part} part has a next item: change data.split, or take more data.")


def build(name: str, run: Run, data: Dataset) -> Task:
    """Build the task of phase `name`."""
    phase = run.config.sections[name]
    assert isinstance(phase, PretrainEncoder)
    section = run.config.encoder_of(name)
    with naming("encoder"):
        data = data.select(section.features)
        model_config = encoder_config(section, data.timelines.schema, run.kinds.encoders)
    check_longest(model_config, {"batch.window": phase.batch.window, "eval.max_events": phase.eval.max_events})
    timelines, split = data.timelines, data.split
    catalogue = item_catalogue(timelines, model_config)
    create = lambda: model_config.build(nnx.Rngs(params=run.seed), catalogue)  # noqa: E731
    graphdef, shapes = trees.abstract(create)
    batch, counts = phase.batch, data.train_counts
    loss = EncoderLoss(
        log_q=negative_log_q(counts, model_config.table_rows),
        share=item_share(counts, model_config.table_rows),
        **vars(phase.loss),
    )

    def rank(
        params: Params, part: str, limit: int | None = None, graph: Transitions | None = None, weights: Sequence[float] = (0.0,)
    ) -> list[Ranks]:
        def score(batch: HistoryBatch) -> Sequence[Array | np.ndarray]:
            scores = score_next(graphdef, params, *meshes.put_rows((batch.events, batch.lengths), run.mesh))
            if graph is None:
                return [scores]
            return graph.sums(meshes.fetch(scores), last_items(timelines, batch.users, batch.positions), weights)

        return rank_each(
            score, len(weights), timelines, split, part, max_events=phase.eval.max_events, limit=limit,
            bucket=phase.eval.max_events if phase.eval.pad_whole else BUCKET,
            batch_size=meshes.even_rows(phase.eval.batch_size, run.mesh),
        )  # fmt: skip

    def programs(params: Params) -> dict[str, Program]:
        rows = meshes.even_rows(phase.eval.batch_size, run.mesh)
        shapes = ((rows, phase.eval.max_events, timelines.schema.width), (rows,))
        histories = meshes.rows_like([jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes], run.mesh)
        return {"score": (score_next, (graphdef, params, *histories))}

    def results(params: Params) -> list[dict]:
        record = lambda method, ranks: run.record(name, data, "next_item", method, ranks.measured())  # noqa: E731
        known = functools.partial(rank, params, "validation", phase.eval.validation_users)
        graph = weighted_transitions(known, timelines, split, phase.transitions)
        if graph is None:
            return record(phase.method, rank(params, "test")[0])
        alone, both = rank(params, "test", None, graph, (0.0, graph.weight))
        return record(phase.method, alone) + record(phase.method + TOGETHER, both)

    return Task(
        name=name,
        shapes=shapes,
        load=((r".*", "fresh"),),
        init=lambda place: trees.init(create, place),
        loss=lambda params, batch, key, whole: loss(trees.merge(graphdef, params), batch, key, whole),
        # How many events a part of a batch hides is drawn there.
        counts=lambda batch: {"events": (batch["segments"] > 0).sum()} if model_config.causal else {},
        train_data=run.streams(
            lambda stream, rows: packed_windows(
                timelines, split.train_stop, window=batch.window, rows=rows, row_length=batch.row_length, seed=run.seed,
                stream=stream,
            ),
            batch.rows,
        ),
        steps_per_epoch=np.maximum(split.train_stop - 1, 0).sum() / (batch.rows * batch.row_length),
        work=trees.count(shapes) * batch.rows * batch.row_length,
        count_events=lambda batch: int((batch["segments"] > 0).sum()),
        metrics=RANKING,
        check=lambda: check_targets(split),
        evaluate=lambda params: rank(params, "validation", phase.eval.validation_users)[0].metrics(),
        results=results,
        programs=programs,
    )  # fmt: skip
