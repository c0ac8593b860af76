"""What the sections of a config say that all phases share: each key with its type and its range or choices.

The records have the form of `user_llm/config/defaults.py`: a section is a record, a key is a field, and the field's annotation says which
values the key takes. The phases are in `config/phases.py`.
"""

import dataclasses
from typing import Annotated, Any, Literal

from user_llm.config.values import (
    Activation,
    Axis,
    Count,
    CountOrZero,
    Kernel,
    Layout,
    Must,
    Names,
    Objective,
    Positive,
    Quantization,
    Regex,
    Remat,
    Share,
    Text,
)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters, of strategies that have them."""

    rank: Count
    alpha: Positive
    dropout: Share
    targets: Regex


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are laid out."""

    data: Axis
    fsdp: Axis
    tensor: Axis


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column of your own events holds what; empty for none."""

    user: Text
    item: Text
    time: str
    order: str
    title: str
    categories: Names
    numbers: Names
    texts: Names
    time_unit: Literal["", "s", "ms", "us", "ns", "YYYYMMDD", "YYYYMMDDHHMMSS"]


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """The generated world."""

    layout: Layout
    num_users: Count
    num_items: Count
    events_per_user: Count


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the events come from and how they are split.

    Attributes:
      source: one of `values.SOURCES`, or the name of a dataset that the caller of `user_llm.run` gives.
    """

    source: Text
    streams: CountOrZero
    dir: str
    category: str
    states: Names
    name: Text
    columns: Columns
    bad_rows: Literal["refuse", "skip"]
    catalogue_items: Count
    ties: Literal["hashed", "file"]
    min_events: Count
    split: Literal["leave_last_out", "global_time"]
    withhold: Share
    accept_changes: bool
    synthetic: Synthetic


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes among which a favourite is."""

    feature: str
    whole: bool


@dataclasses.dataclass(frozen=True)
class Block:
    """One transformer layer."""

    width: Count
    heads: Count
    kv_heads: Count
    head_dim: Annotated[int, Must("even and 2 or more, for rotary positions", lambda n: n >= 2 and n % 2 == 0)]
    mlp_width: Count
    rope_theta: Positive
    activation: Activation
    norm_eps: Positive
    qk_norm: bool
    residual_gate: bool
    dropout: Share


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The user encoder.

    Attributes:
      kind: `transformer`, or the name of an encoder that the caller of `user_llm.run` gives. Such an encoder takes `features` and
        `options` alone.
      options: the settings of an encoder of the caller's.
      tower: whether item vectors are made of the items' features, as those of a dual encoder are whatever is set here.
    """

    kind: Text
    options: dict[str, Any]
    objective: Objective
    tower: bool
    features: Names
    feature_width: Count
    positions: Literal["rotary", "learned"]
    max_events: Count
    num_layers: Count
    dropout: Share
    heads: Names
    unroll: bool
    remat: Remat
    attention_kernel: Kernel
    block: Block


@dataclasses.dataclass(frozen=True)
class GeneralText:
    """The text on which forgetting is measured."""

    file: str
    windows: Count
    window: Count


@dataclasses.dataclass(frozen=True)
class LLM:
    """The decoder."""

    checkpoint: str
    published: dict[str, Any]
    quantize: Quantization
    vocab_size: Annotated[int, Must("259 or more, to hold every byte and the special tokens", lambda n: n >= 259)]
    num_layers: Count
    unroll: bool
    remat: Remat
    attention_kernel: Kernel
    block: Block


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What a phase trains."""

    adapters: bool
    trainable: tuple[tuple[Regex, bool], ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A phase that differs in a few keys from another one, `like`; it exists in a run that names it.

    Attributes:
      changes: the keys that differ, nested as in a section.
    """

    like: Text
    changes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shared:
    """All of a config but the sections of its phases.

    Attributes:
      phases: the phases that run, in order: names of sections or of variants.
    """

    seed: CountOrZero
    phases: Names
    variants: dict[str, Variant]
    reuse: str
    strategies: dict[str, Strategy]
    lora: LoRA
    mesh: Mesh
    data: Data
    labels: Labels
    encoder: Encoder
    general_text: GeneralText
    llm: LLM
