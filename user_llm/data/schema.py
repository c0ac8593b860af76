"""What an event consists of: its features, their kinds and sizes (section 3 of the paper, "user interaction data")."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

PAD_ID = 0  # in every vocabulary; real ids start at 1

Kind = Literal["item", "categorical", "multi", "ordinal", "time", "text"]


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of an event.

    Attributes:
      kind: `item`, `categorical`, `multi` (a bag, such as genres), `ordinal` (a rating), `time` (log-bucketed gap to the event
        before) or `text` (token ids).
      size: number of ids, PAD included.
      width: columns that the feature takes in an array of events: the largest bag of `multi`, the token count of `text`, else 1.
    """

    name: str
    kind: Kind
    size: int
    width: int = 1

    def __post_init__(self):
        if self.size < 2 or self.width < 1:
            raise ValueError(f"Feature {self.name!r} needs at least one id besides PAD and one column.")
        if self.width > 1 and self.kind not in ("multi", "text"):
            raise ValueError(f"Feature {self.name!r} of kind {self.kind} has one column, not {self.width}.")


@dataclasses.dataclass(frozen=True)
class Schema:
    """The features of an event in the order of their columns; the item comes first.

    Raises:
      ValueError: no item in front, or two features of one name.
    """

    features: tuple[Feature, ...]

    def __post_init__(self):
        kinds = [feature.kind for feature in self.features]
        if not kinds or kinds[0] != "item" or kinds.count("item") != 1:
            raise ValueError(f"A schema starts with its one item feature; these kinds do not: {kinds}.")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"Feature names must differ: {self.names}.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.features)

    @property
    def num_items(self) -> int:
        return self.features[0].size - 1

    def with_items(self, count: int) -> "Schema":
        """Return the schema of the same features for another number of items."""
        first, *others = self.features
        return Schema((dataclasses.replace(first, size=count + 1), *others))

    @property
    def width(self) -> int:
        """Columns of an array of events: A."""
        return sum(feature.width for feature in self.features)

    def __iter__(self) -> Iterator[Feature]:
        return iter(self.features)

    def __getitem__(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise ValueError(f"No feature {name!r}: the dataset has {', '.join(self.names)}.")

    def columns(self, name: str) -> slice:
        """Return the columns that a feature takes."""
        wanted = self[name]
        start = sum(feature.width for feature in self.features[: self.features.index(wanted)])
        return slice(start, start + wanted.width)
