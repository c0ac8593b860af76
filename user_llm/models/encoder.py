"""What the rest of the package needs of a user encoder: protocols that `UserEncoder` satisfies, and that your own may.

An encoder is described by a dataclass of its sizes, `EncoderConfig`, which builds the module, `Encoder`. Both stand in for ours where
`encoder.kind` of a config names them and `user_llm.run(..., encoders={...})` gives them. The rule lists of a config (what trains, how
fast, what decays, how it is sharded) must cover the names of the parameters: `item`, `project`, `stack/...`, `norm/scale` and others
are covered; for further names add rules to `strategies`, `optimizer.lr_multiplier`, `optimizer.decay` and `loop.sharding`.

Axis letters: B histories, E events of a history, A event features, J ends of a history, R rows, X ends of a row, D width of the
encoder, V rows of the item table, Q any number of items.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.data.schema import Schema


class Encoded(NamedTuple):
    """The states of B histories, each read at J ends.

    A causal encoder reads a history once: one row (R = B) with its J ends (X = J). One that sees both ways reads it once for each
    end: R = B J rows with X = 1.

    Attributes:
      states: the states of events.
      seen: how many of its row's states each end sees, from the first on; 0 for a user without events.
    """

    states: Float[Array, "R E D"]
    seen: Int[AnyArray, "R X"]

    def last(self) -> Float[Array, "R X D"]:
        """Return the state that each end sees last. A user without events gets the first state of the row, which means nothing."""
        return jnp.take_along_axis(self.states, jnp.maximum(self.seen - 1, 0)[..., None], axis=1)


@runtime_checkable
class Encoder(Protocol):
    """A Flax module that turns events into states, and whose last state ranks items.

    Attributes:
      config: its sizes.
      heads: the weights [D, values] by which pretraining predicts features of the next event besides its item. An encoder of
        your own has none: an empty dict.
    """

    config: Any
    heads: Mapping[str, Any]

    def states(
        self,
        events: Int[AnyArray, "B E A"],
        *,
        segments: Int[AnyArray, "B E"],
        positions: Int[AnyArray, "B E"],
        key: Array | None = None,
    ) -> Float[Array, "B E D"]:
        """Return a state for each event of packed histories, from which pretraining predicts the next event.

        Args:
          segments: which history of its row an event belongs to, from 1; 0 for padding. An event must see no other history, and none
            of the events behind it.
          positions: the place of each event in its history, from 0.
          key: for dropout; None for evaluation.
        """

    def encode(self, events: Int[AnyArray, "B E A"], ends: Int[AnyArray, "B J"], *, key: Array | None = None) -> Encoded:
        """Encode right-padded histories as they were after the first `ends` events; nothing behind an end may reach what it sees."""

    def item_vectors(self, items: Int[Array, " Q"] | None = None) -> Float[Array, "Q D"]:
        """Return the vectors of items, or of every row of the item table; the product with a state is an item's score."""

    def valid_items(self) -> Bool[Array, " V"]:
        """Return True at the rows of the item table that are items."""

    def score(self, states: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Return the score of every item for each state; -inf for rows that are no items."""


@runtime_checkable
class EncoderConfig(Protocol):
    """The sizes of an encoder: a frozen dataclass whose fields besides `schema` are the keys of `encoder.options` in a config.

    Attributes:
      kind: the name by which configs and model directories know it.
      schema: the features of an event, the item first.
      objective: how it is pretrained. An encoder of your own has `autoregressive`: every state predicts the next event.
      causal: whether a state has seen its own event and those before it alone. It is True for an encoder of your own.
      width: D, the width of states and item vectors.
      table_rows: V, the rows of the item table; more than there are items, as row 0 is padding.
      longest: the longest history that it can read; None for any.
    """

    kind: ClassVar[str]

    @property
    def schema(self) -> Schema: ...

    @property
    def objective(self) -> str: ...

    @property
    def causal(self) -> bool: ...

    @property
    def width(self) -> int: ...

    @property
    def table_rows(self) -> int: ...

    @property
    def longest(self) -> int | None: ...

    def build(self, rngs: nnx.Rngs, catalogue: Int[np.ndarray, "V X"] | None = None) -> Any:
        """Return an `Encoder` with drawn parameters.

        Args:
          catalogue: the features of every item that are its own and not an event's (`item_features`); None where parameters are to
            be loaded.
        """


def item_features(schema: Schema) -> Schema:
    """Return the features of a schema that are an item's own: its id and its bags."""
    return Schema(tuple(feature for feature in schema if feature.kind in ("item", "multi")))


def valid_rows(rows: int, items: int) -> Bool[Array, " V"]:
    """Return True at the rows of an item table that are items: all from 1 on, as row 0 is PAD, up to their number."""
    row = jnp.arange(rows)
    return (row > 0) & (row <= items)


def item_scores(queries: Float[AnyArray, "B D"], vectors: Float[Array, "V D"], valid: Bool[Array, " V"]) -> Float[Array, "B V"]:
    """Return the products of queries with the vectors of all items, summed in float32; -inf for rows that are no items."""
    scores = jnp.einsum("BD,VD->BV", queries, vectors, preferred_element_type=jnp.float32)
    return jnp.where(valid, scores, -jnp.inf)
