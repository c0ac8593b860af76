"""The user encoder: a causal transformer over a user's events (section 3 of the paper, "user embedding generation").

An event is the concatenation of its features' embeddings, projected to the model's width; the state at each event has seen
that event and all before it. Pretraining predicts the next event's features from each state; contextualization hands all
states to the resampler. The item head is tied to the item table, so an item's embedding is also its output vector.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.data.schema import Feature, Schema
from user_llm.nn.layers import RMSNorm, dropout, embedding_param, linear_param
from user_llm.nn.transformer import BlockConfig, Stack

# The vocabulary is padded to a multiple of this, so that the item table divides over any mesh of up to 128 chips.
TABLE_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class UserEncoderConfig:
    """Sizes of the user encoder.

    Attributes:
      schema: the features of an event, the item first.
      block, num_layers, unroll: the transformer.
      feature_width: embedding width of each feature other than the item, which has the model's width.
      positions: `rotary` (relative, any length) or `learned` (absolute, up to `max_events`).
      max_events: longest history that is encoded; only `learned` positions are bound to it.
      dropout: on the event embeddings; the blocks have their own.
      heads: features besides the item that pretraining also predicts.
    """

    schema: Schema
    block: BlockConfig
    num_layers: int
    feature_width: int = 32
    positions: str = "rotary"
    max_events: int = 200
    dropout: float = 0.0
    heads: tuple[str, ...] = ()
    unroll: bool = False

    def __post_init__(self):
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"Unknown encoder positions {self.positions!r}: choose rotary or learned.")
        for name in self.heads:
            if self.schema[name].kind not in ("categorical", "ordinal", "multi"):
                raise ValueError(f"No head can predict feature {name!r} of kind {self.schema[name].kind}.")

    @property
    def table_rows(self) -> int:
        """Rows of the item table: PAD, the items, and rows that nothing ever uses up to a round number."""
        return -(-self.schema.features[0].size // TABLE_MULTIPLE) * TABLE_MULTIPLE


class UserEncoder(nnx.Module):
    """Parameters: item [V, D], one table per other feature, project [sum of widths, D], stack, norm, heads."""

    def __init__(self, config: UserEncoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        width = c.block.width
        others = c.schema.features[1:]
        self.item = embedding_param(rngs, (c.table_rows, width))
        self.features = nnx.data({f.name: embedding_param(rngs, (f.size, c.feature_width)) for f in others})
        total = width + len(others) * c.feature_width
        self.project = linear_param(rngs, (total, width), fan_in=total)
        if c.positions == "learned":
            self.position = embedding_param(rngs, (c.max_events, width))
        block = c.block if c.positions == "rotary" else dataclasses.replace(c.block, rope_theta=None)
        self.stack = Stack(block, c.num_layers, unroll=c.unroll, rngs=rngs)
        self.norm = RMSNorm(width, eps=c.block.norm_eps)
        self.heads = nnx.data({name: linear_param(rngs, (width, c.schema[name].size), fan_in=width) for name in c.heads})

    def embed(self, events: Int[Array, "B E A"]) -> Float[Array, "B E D"]:
        """Embed events by their features; a bag (kind `multi`) is the mean of its members."""
        parts, column = [], 0
        for feature in self.config.schema.features:
            ids = events[..., column : column + feature.width]
            column += feature.width
            table = self.item if column == 1 else self.features[feature.name]
            parts.append(_embed_feature(feature, table[...], ids))
        return jnp.concatenate(parts, axis=-1) @ self.project[...]

    def __call__(
        self,
        events: Int[Array, "B E A"],
        *,
        mask: Bool[Array, "B E E"],
        positions: Int[Array, "B E"],
        key: Array | None = None,
    ) -> Float[Array, "B E D"]:
        """Encode events to states; `mask` from `causal_mask` or, for packed rows, `segment_mask`.

        Positions count from 0 within each history. The dropout key is None for evaluation.
        """
        embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x = self.embed(events)
        if self.config.positions == "learned":
            x += self.position[...][positions]
        x = dropout(x, self.config.dropout, embed_key)
        x, _ = self.stack(x, mask=mask, positions=positions, key=stack_key)
        return self.norm(x)

    def valid_items(self) -> Bool[Array, "V"]:
        """Return True at the rows of the item table that are items."""
        row = jnp.arange(self.config.table_rows)
        return (row > 0) & (row <= self.config.schema.num_items)

    def score(self, states: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Score all items as what follows each state; PAD and unused rows get -inf."""
        scores = jnp.einsum("BD,VD->BV", states, self.item[...], preferred_element_type=jnp.float32)
        return jnp.where(self.valid_items(), scores, -jnp.inf)


def _embed_feature(feature: Feature, table: Float[Array, "V W"], ids: Int[Array, "B E X"]) -> Float[Array, "B E W"]:
    if feature.width == 1:
        return table[ids[..., 0]]
    real = (ids > 0)[..., None]
    return jnp.where(real, table[ids], 0.0).sum(-2) / jnp.maximum(real.sum(-2), 1).astype(table.dtype)
