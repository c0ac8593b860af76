"""What the section of a phase says, by its task: each key with its type and its range or choices.

The functions of `config/defaults.py` return sections of this form.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from user_llm.config.records import Encoder
from user_llm.config.values import (
    CHANGES,
    Count,
    CountOrZero,
    Injection,
    Moment,
    Positive,
    Probability,
    Regex,
    Seat,
    Share,
    Sides,
    Text,
    Weight,
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon, and the schedule (`training/optimizer.py`)."""

    learning_rate: Positive
    warmup_steps: CountOrZero
    schedule: Literal["constant", "cosine"]
    weight_decay: Weight
    clip_norm: Positive
    b1: Share
    b2: Share
    first_moment: Moment
    second_moment: Moment | Literal["factored"]
    muon: bool
    matrices: tuple[tuple[Regex, Sides], ...]
    lr_multiplier: tuple[tuple[Regex, Weight], ...]
    decay: tuple[tuple[Regex, bool], ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long a phase trains and how often it looks."""

    total_steps: CountOrZero
    total_epochs: Weight
    eval_steps: Count
    save_steps: Count
    log_steps: Count
    monitor: Text
    mode: Literal["min", "max"]
    patience_evals: CountOrZero
    keep: Literal["best", "last"]
    dtype: Literal["float32", "bfloat16"]
    accumulation_steps: Count
    sharding: tuple[tuple[Regex, tuple[Literal["data", "fsdp", "tensor"] | None, ...]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase(abc.ABC):
    """What all phases have.

    Attributes:
      task: what the phase does: `pretrain_lm`, `pretrain_encoder` or `contextualize`.
    """

    task: str
    strategy: Text
    optimizer: Optimizer
    loop: Loop

    @property
    @abc.abstractmethod
    def rows(self) -> tuple[str, int]:
        """The key that says how many rows a batch has, and its value."""


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Rows of packed lines."""

    rows: Count
    row_length: Count


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """The loss of a language model."""

    chunk: Count


@dataclasses.dataclass(frozen=True)
class TextEval:
    """Validation of a language model."""

    batches: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainLM(Phase):
    """Phase 0."""

    task: Literal["pretrain_lm"]
    batch: TextBatch
    loss: TextLoss
    eval: TextEval

    @property
    def rows(self) -> tuple[str, int]:
        return "batch.rows", self.batch.rows


@dataclasses.dataclass(frozen=True)
class EventBatch:
    """Rows of packed histories."""

    window: Count
    rows: Count
    row_length: Count


@dataclasses.dataclass(frozen=True)
class EncoderLoss:
    """The loss of the encoder.

    Attributes:
      in_batch: whether an item's negatives are the other targets of its batch, as a dual encoder's always are.
    """

    head_weights: dict[str, Weight]
    negatives: CountOrZero
    in_batch: bool
    chunk: Count
    mask_probability: Probability
    last_only: Probability


@dataclasses.dataclass(frozen=True)
class EncoderEval:
    """Validation and test of the encoder."""

    max_events: Count
    batch_size: Count
    validation_users: Count
    pad_whole: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainEncoder(Phase):
    """Phase 1.

    Attributes:
      transitions: the weights to try for the logarithm of the transitions' scores (`models/transitions.py`), which is added to the
        encoder's scores. Validation chooses one by NDCG@10. The sum is measured on test, as the method's name and `+transitions`.
        If it chooses 0, or has nothing to choose from, nothing is added, and there is no such row.
    """

    task: Literal["pretrain_encoder"]
    method: Text
    encoder: Annotated[dict[str, Any], CHANGES, Encoder]
    batch: EventBatch
    loss: EncoderLoss
    transitions: tuple[Weight, ...]
    eval: EncoderEval

    @property
    def rows(self) -> tuple[str, int]:
        return "batch.rows", self.batch.rows


@dataclasses.dataclass(frozen=True)
class Examples:
    """How histories become examples."""

    max_events: CountOrZero
    targets_per_history: Count
    text_items: CountOrZero
    history: Literal["titles", "summary"]


@dataclasses.dataclass(frozen=True)
class NextItem:
    """The prompt of the next item."""

    instruction: str
    max_tokens: Count
    weight: Weight
    text: Weight


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt that is answered by a text."""

    instruction: str
    weight: Weight
    text: Weight
    question: str
    max_tokens: Count
    max_target_tokens: Count


@dataclasses.dataclass(frozen=True)
class Review(Question):
    """The prompt of a review."""

    column: Text


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a phase asks the LLM.

    Attributes:
      max_title_tokens: the most tokens of a title in prompts and training targets.
      tasks: the settings of each task that the section names, by the task's name. They have at least a `weight`, the share of
        batches in training, 0 for a task that is not asked; and `text`, the weight of the loss of its target's tokens.
    """

    max_title_tokens: Count
    tasks: Mapping[str, Any]

    @property
    def asked(self) -> dict[str, Any]:
        """The tasks that are asked, in the order of the tasks that the run knows; a phase monitors the first."""
        return {name: settings for name, settings in self.tasks.items() if settings.weight}


# The settings of each task, by its name. Callers of `user_llm.run` may give further ones.
TASKS: dict[str, type] = {"next_item": NextItem, "favorite": Question, "favorite_future": Question, "review": Review}


@dataclasses.dataclass(frozen=True)
class Cross:
    """Gated cross-attention."""

    every: Count
    heads: Count
    head_dim: Count
    seat: Seat


@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """Where user tokens stand in a prompt."""

    after_instruction: bool


@dataclasses.dataclass(frozen=True)
class Resampler:
    """From events to user tokens."""

    kind: Literal["perceiver", "none"]
    num_latents: Count
    heads: Count
    head_dim: Count
    mlp_width: Count
    num_layers: Count
    recency_buckets: CountOrZero


@dataclasses.dataclass(frozen=True)
class Pack:
    """Several prompts in one row.

    Attributes:
      histories: from how many histories, on average, prompts are packed together; 0 for a row for each prompt.
      room: how many of the longest prompts a row has room for.
    """

    histories: CountOrZero
    room: Count


@dataclasses.dataclass(frozen=True)
class ContextualLoss:
    """Weights of the losses of contextualization.

    Attributes:
      trie_softmax: whether an item's title is written by choosing each token among those that the catalogue's titles go on with, in
        training and in beam search; otherwise among all tokens. The two keys below compute nothing then.
      teacher: how much of what a title's token is to be comes from the pretrained encoder's likeliest items; the rest is the title that
        came next.
      all_words: the share of titles whose tokens are chosen among all tokens nevertheless.
    """

    catalogue: Weight
    align: Weight
    trie_softmax: bool
    teacher: Probability
    all_words: Probability
    chunk: Count


@dataclasses.dataclass(frozen=True)
class ContextualEval:
    """Validation and test of a contextualized LLM.

    Attributes:
      generate_users: for how many test users titles are written by beam search.
      guide: the weights of the item head's scores, beside the titles' log-probabilities, in a beam search that both of them guide; the
        weight that is best on as many validation users is measured. Empty for no such search.
      rerank: how many titles are written for the item head to rank them; 0 for none.
      bert_score: the name or directory of the model by which BERTScore compares reviews; empty for no BERTScore.
      control_users: how many test users are asked again with another user's history and with none; 0 for none of them.
    """

    batch_size: Count
    validation_users: Count
    generate_users: CountOrZero
    beams: Count
    guide: tuple[Probability, ...]
    rerank: CountOrZero
    review_users: Count
    bert_score: str
    control_users: CountOrZero
    samples: CountOrZero
    pad_whole: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contextualize(Phase):
    """Phase 2, and the text-prompt baselines.

    Attributes:
      encoder_init: `pretrained` and `frozen` start from the weights of the phase `encoder`, `scratch` from its shape alone. A `frozen`
        encoder does not train, whatever the strategy says.
      residual: whether items are ranked by the sum of the encoder's query and the LLM's, which starts at zero.
      transitions: as in `PretrainEncoder`, beside the scores of the item head. The model directory holds the transitions with the weight
        that validation chose, and ranks by the sum. A weight of 0 adds nothing, and neither does a phase without an item head that ranks
        the next item.
    """

    task: Literal["contextualize"]
    method: Text
    encoder: Text
    encoder_init: Literal["pretrained", "frozen", "scratch"]
    batch_size: Count
    examples: Examples
    pack: Pack
    prompts: Prompts
    injection: Injection
    residual: bool
    cross: Cross
    soft_prompt: SoftPrompt
    resampler: Resampler
    load: tuple[tuple[Regex, Text], ...]
    loss: ContextualLoss
    transitions: tuple[Weight, ...]
    eval: ContextualEval

    @property
    def taught_by(self) -> str:
        """The phase whose encoder this one starts from; empty for a text prompt, and for an encoder from scratch."""
        return self.encoder if self.examples.max_events and self.encoder_init != "scratch" else ""

    @property
    def rows(self) -> tuple[str, int]:
        if self.pack.histories:
            return "batch_size, over pack.histories", self.batch_size // self.pack.histories
        return "batch_size", self.batch_size


PHASES: dict[str, type[Phase]] = {
    "pretrain_lm": PretrainLM,
    "pretrain_encoder": PretrainEncoder,
    "contextualize": Contextualize,
}
