"""The user encoder: a transformer over a user's events (section 3 of the paper, "user embedding generation").

An event is the concatenation of its features' embeddings, projected to the model's width. Pretraining predicts items from
states, in one of three ways; contextualization hands all states to the resampler.

    autoregressive  causal; each state predicts the next event. Item vectors are the item table (tied), or a `tower` makes them.
    masked          BERT4Rec: bidirectional; a mask token, put for an event or behind the last one, predicts what it stands for.
    dual            causal; an item's vector is the output of an item tower that reads its features, the user's is the last state.

Whatever the way, the last state of an encoded history is its query: the product with an item's vector is that item's score.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.data.schema import Feature, Schema
from user_llm.models.encoder import Encoded, item_features, item_scores, valid_rows
from user_llm.nn.layers import RMSNorm, dropout, embedding_param, linear_param
from user_llm.nn.transformer import BlockConfig, Stack
from user_llm.nn.visibility import SelfMask, causal_mask, segment_mask

# The vocabulary is padded to a multiple of this, so that the item table divides over any mesh of up to 128 chips.
TABLE_MULTIPLE = 128

OBJECTIVES = ("autoregressive", "masked", "dual")

# An item that came after training has a shorter row than trained ones (`models/content.py`), so that it takes no place of theirs in a
# ranking. The encoder multiplies the row by this number where an event names the item: read short, it would predict worse for the
# users who have had the item. launch/benchmark_items.py measures both.
READ_SCALE = 5.0


def padded_rows(rows: int) -> int:
    """Return the rows of an item table that has at least so many."""
    return -(-rows // TABLE_MULTIPLE) * TABLE_MULTIPLE


@dataclasses.dataclass(frozen=True)
class UserEncoderConfig:
    """Sizes of the user encoder.

    Attributes:
      schema: the features of an event, the item first.
      block, num_layers, unroll, remat: the transformer, `nn.transformer.Stack`.
      objective: one of the module's three; says what a state sees and how items are scored.
      tower: whether an item's vector is the output of an item tower, as in a dual encoder, whatever the objective.
      feature_width: embedding width of each feature other than the item, which has the model's width.
      positions: `rotary` (relative, any length) or `learned` (absolute, up to `max_events`).
      max_events: longest history that is encoded; only `learned` positions are bound to it.
      dropout: on the event embeddings; the blocks have their own.
      heads: features besides the item that pretraining also predicts.
      trained_items: items with higher numbers were added after training, and their rows are read READ_SCALE times longer; 0 if there are
        no such items. Items that a version of this package before READ_SCALE added have lower numbers, and are read as they are.
    """

    kind: ClassVar[str] = "transformer"

    schema: Schema
    block: BlockConfig
    num_layers: int
    objective: str = "autoregressive"
    tower: bool = False
    feature_width: int = 32
    positions: str = "rotary"
    max_events: int = 200
    dropout: float = 0.0
    heads: tuple[str, ...] = ()
    unroll: bool = False
    remat: str = "none"
    trained_items: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Unknown encoder objective {self.objective!r}: choose one of {', '.join(OBJECTIVES)}.")
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"Unknown encoder positions {self.positions!r}: choose rotary or learned.")
        for name in self.heads:
            if self.schema[name].kind not in ("categorical", "ordinal", "multi"):
                raise ValueError(f"No head can predict feature {name!r} of kind {self.schema[name].kind}.")

    @property
    def causal(self) -> bool:
        """Whether a state has seen its own event and those before it alone; else all events of its history."""
        return self.objective != "masked"

    @property
    def has_tower(self) -> bool:
        """Whether item vectors are made of the items' features."""
        return self.tower or self.objective == "dual"

    @property
    def width(self) -> int:
        """Width of states and item vectors."""
        return self.block.width

    @property
    def longest(self) -> int | None:
        """The longest history that can be encoded; None for any."""
        return self.max_events if self.positions == "learned" else None

    @property
    def item_schema(self) -> Schema:
        """What the item tower reads."""
        return item_features(self.schema)

    @property
    def table_rows(self) -> int:
        """Rows of the item table: PAD, the items, and rows that nothing ever uses up to a round number."""
        return padded_rows(self.schema.features[0].size)

    def build(self, rngs: nnx.Rngs, catalogue: Int[np.ndarray, "V X"] | None = None) -> "UserEncoder":
        """Return the encoder with drawn parameters; see `UserEncoder`."""
        return UserEncoder(self, catalogue=catalogue, rngs=rngs)


class UserEncoder(nnx.Module):
    """Parameters: item [V, D], one table per other feature, project [sum of widths, D], stack, norm, heads.

    Further mask_token [D] (masked), and tower (`has_tower`): project, and catalogue int [V, X], the features of each item, which is data
    and never trains. It travels with the parameters, so that an encoder scores its items by itself.
    """

    def __init__(self, config: UserEncoderConfig, *, catalogue: Int[np.ndarray, "V X"] | None = None, rngs: nnx.Rngs):
        c = self.config = config
        width = c.block.width
        others = c.schema.features[1:]
        self.item = embedding_param(rngs, (c.table_rows, width))
        self.features = nnx.data({f.name: embedding_param(rngs, (f.size, c.feature_width)) for f in others})
        total = width + len(others) * c.feature_width
        self.project = linear_param(rngs, (total, width), fan_in=total)
        if c.positions == "learned":
            # A mask token may stand behind the longest history.
            self.position = embedding_param(rngs, (c.max_events + (not c.causal), width))
        block = c.block if c.positions == "rotary" else dataclasses.replace(c.block, rope_theta=None)
        self.stack = Stack(block, c.num_layers, unroll=c.unroll, remat=c.remat, rngs=rngs)
        self.norm = RMSNorm(width, eps=c.block.norm_eps)
        self.heads = nnx.data({name: linear_param(rngs, (width, c.schema[name].size), fan_in=width) for name in c.heads})
        if c.objective == "masked":
            self.mask_token = embedding_param(rngs, (width,))
        if c.has_tower:
            total = width + (len(c.item_schema.features) - 1) * c.feature_width
            if catalogue is None:  # to be loaded
                catalogue = np.zeros((c.table_rows, c.item_schema.width), np.int32)
            self.tower = nnx.data(
                {
                    "project": linear_param(rngs, (total, width), fan_in=total),
                    "catalogue": nnx.Variable(jnp.asarray(catalogue)),
                }
            )

    def embed(self, events: Int[AnyArray, "B E A"]) -> Float[Array, "B E D"]:
        """Embed events by their features; a bag (kind `multi`) is the mean of its members."""
        parts, c = self._embed(self.config.schema, events), self.config
        if c.trained_items:
            longer = (events[..., :1] > c.trained_items) & (np.arange(parts.shape[-1]) < c.width)
            parts = jnp.where(longer, READ_SCALE * parts, parts)
        return parts @ self.project[...]

    def _embed(self, schema: Schema, ids: Int[AnyArray, "... A"]) -> Float[Array, "... W"]:
        parts, column = [], 0
        for feature in schema.features:
            table = self.item if column == 0 else self.features[feature.name]
            parts.append(_embed_feature(feature, table[...], ids[..., column : column + feature.width]))
            column += feature.width
        return jnp.concatenate(parts, axis=-1)

    def __call__(
        self,
        events: Int[AnyArray, "B E A"],
        *,
        mask: Bool[AnyArray, "B E E"] | SelfMask,
        positions: Int[AnyArray, "B E"],
        hidden: Bool[AnyArray, "B E"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B E D"]:
        """Encode events to states; `mask` says who sees whom, and is what makes the encoder causal or not.

        Positions count from 0 within each history. Where `hidden` is True the mask token stands for the event, all its features.
        The dropout key is None for evaluation.
        """
        embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x = self.embed(events)
        if hidden is not None:
            x = jnp.where(hidden[..., None], self.mask_token[...], x)
        if self.config.positions == "learned":
            x += self.position[...][positions]
        x = dropout(x, self.config.dropout, embed_key)
        x, _ = self.stack(x, mask=mask, positions=positions, key=stack_key)
        return self.norm(x)

    def states(
        self,
        events: Int[AnyArray, "B E A"],
        *,
        segments: Int[AnyArray, "B E"],
        positions: Int[AnyArray, "B E"],
        key: Array | None = None,
    ) -> Float[Array, "B E D"]:
        """Return the states of packed histories, each of which has seen its own event and those before it in its history."""
        return self(events, mask=segment_mask(segments), positions=positions, key=key)

    def encode(self, events: Int[AnyArray, "B E A"], ends: Int[AnyArray, "B J"], *, key: Array | None = None) -> Encoded:
        """Encode histories as they were after the first `ends` events; nothing at or behind an end reaches what it sees.

        A causal encoder runs once for all ends of a history. One that sees both ways runs once for each, at J times the cost, and
        reads a mask token behind the last event.
        """
        if self.config.causal:
            positions = jnp.broadcast_to(jnp.arange(events.shape[1]), events.shape[:2])
            mask = causal_mask(positions < ends.max(1, keepdims=True))
            return Encoded(self(events, mask=mask, positions=positions, key=key), ends)
        # Shared states would tell an early end what came after it.
        events, ends = jnp.repeat(events, ends.shape[1], axis=0), ends.reshape(-1, 1)
        events = jnp.pad(events, ((0, 0), (0, 1), (0, 0)))
        positions = jnp.broadcast_to(jnp.arange(events.shape[1]), events.shape[:2])
        mask = segment_mask((positions <= ends).astype(jnp.int32), causal=False)
        states = self(events, mask=mask, positions=positions, hidden=positions == ends, key=key)
        return Encoded(states, jnp.where(ends > 0, ends + 1, 0))

    def item_vectors(self, items: Int[AnyArray, " Q"] | None = None) -> Float[Array, "Q D"]:
        """Return the output vectors of items, or of every row of the item table."""
        if not self.config.has_tower:
            return self.item[...] if items is None else self.item[...][items]
        features = self.tower["catalogue"][...] if items is None else self.tower["catalogue"][...][items]
        return self._embed(self.config.item_schema, features) @ self.tower["project"][...]

    def valid_items(self) -> Bool[Array, " V"]:
        """Return True at the rows of the item table that are items."""
        return valid_rows(self.config.table_rows, self.config.schema.num_items)

    def score(self, states: Float[AnyArray, "B D"]) -> Float[Array, "B V"]:
        """Score all items by queries; PAD and unused rows get -inf."""
        return item_scores(states, self.item_vectors(), self.valid_items())


def _embed_feature(feature: Feature, table: Float[Array, "V W"], ids: Int[AnyArray, "... X"]) -> Float[Array, "... W"]:
    if feature.width == 1:
        return table[ids[..., 0]]
    real = (ids > 0)[..., None]
    return jnp.where(real, table[ids], 0.0).sum(-2) / jnp.maximum(real.sum(-2), 1).astype(table.dtype)
