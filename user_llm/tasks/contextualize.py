"""Phase 2: contextualize the LLM with user tokens, and its text-prompt baseline (sections 3 and 4 of the paper).

One loss for all variants: at each answer position the next item is ranked against the full catalogue (`catalogue`), and its
title is written token by token (`text`). What differs is in the config: an encoder or none, how many titles the prompt holds,
which parameters train.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from user_llm.common import trees
from user_llm.common.trees import Params
from user_llm.data.pipeline import ExampleConfig, HistoryBatch, Windows, contextual_examples, history_batches
from user_llm.data.prompts import NextItemPrompts, pad_rows
from user_llm.evals.evaluator import rank_listed, rank_targets
from user_llm.evals.ranking import Ranks, result_rows
from user_llm.models.beam_search import beam_search
from user_llm.models.decoder import DecoderConfig
from user_llm.models.trie import Trie
from user_llm.models.user import User, embed_prompts
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.losses import chunked_cross_entropy
from user_llm.nn.resampler import ResamplerConfig
from user_llm.tasks import general_text
from user_llm.tasks.context import Context
from user_llm.tasks.pretrain_encoder import encoder_config
from user_llm.tasks.pretrain_lm import text_loss
from user_llm.training.task import Batch, Task

INJECTIONS = ("cross_attention", "soft_prompt", "both")
RESAMPLERS = ("perceiver", "none")


def model_config(config: ConfigDict, name: str, context: Context, base: DecoderConfig) -> UserLLMConfig:
    """Put the parts together: with an encoder if the phase encodes events, else for text prompts alone.

    The LLM gets adapters if the phase's strategy trains them.
    """
    phase = config[name]
    lora = LoRAConfig(**config.lora) if config.strategies[phase.strategy].adapters else None
    base = dataclasses.replace(base, block=dataclasses.replace(base.block, lora=lora))
    encoder = encoder_config(config.encoder, context.timelines.schema)
    shared: dict[str, Any] = {
        "num_items": encoder.schema.num_items,
        "table_rows": encoder.table_rows,
        "item_width": encoder.block.width,
    }
    if not phase.examples.max_events:
        return UserLLMConfig(decoder=base, **shared)
    return UserLLMConfig(
        decoder=dataclasses.replace(base, cross=cross_config(phase, encoder.block.width)),
        encoder=encoder,
        resampler=resampler_config(phase, encoder.block.width),
        soft_prompt=phase.injection != "cross_attention",
        **shared,
    )


def cross_config(phase: ConfigDict, user_width: int) -> CrossAttentionConfig | None:
    """Return the cross-attention of a phase that has it.

    Raises:
      ValueError: no such injection or seat.
    """
    if phase.injection not in INJECTIONS:
        raise ValueError(f"Unknown injection {phase.injection!r}: choose one of {', '.join(INJECTIONS)}.")
    return None if phase.injection == "soft_prompt" else CrossAttentionConfig(user_width=user_width, **phase.cross)


def resampler_config(phase: ConfigDict, input_width: int) -> ResamplerConfig | None:
    """Return the resampler of a phase that has one.

    Raises:
      ValueError: no such kind.
    """
    kind, sizes = phase.resampler.kind, {name: size for name, size in phase.resampler.items() if name != "kind"}
    if kind not in RESAMPLERS:
        raise ValueError(f"Unknown resampler {kind!r}: choose one of {', '.join(RESAMPLERS)}.")
    return None if kind == "none" else ResamplerConfig(input_width=input_width, **sizes)


def contextual_loss(
    model: UserLLM,
    batch: Batch,
    key: Array | None,
    *,
    catalogue: float,
    text: float,
    align: float,
    chunk: int,
    leading: int = 0,
) -> tuple[Array, dict[str, Array]]:
    """Return the weighted sum of three losses.

    `catalogue`: cross entropy of the items at the answer positions. `text`: cross entropy of what follows the first answer
    position. `align`, with an encoder only: mean squared distance of the LLM's item query from the encoder's own, its last state.
    The pretrained encoder knows what every event taught it, and its state tells the LLM more than the one next item does.
    `leading` tokens of the text stand in front of a soft prompt, at most those before the first answer position.
    """
    encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
    tokens = batch["text"].reshape(-1, batch["text"].shape[-1])
    lengths, answers, items = (batch[k].reshape(len(tokens), -1) for k in ("text_lengths", "answers", "items"))
    user = None
    if model.config.encoder is not None:
        states = model.encode(batch["events"], batch["lengths"], key=encoder_key)
        user = model.user(states, batch["prefix"])
    hidden = model.hidden(tokens, lengths[:, 0], user=user, leading=leading, key=decoder_key)

    query = model.item_query(jnp.take_along_axis(hidden, answers[..., None], axis=1))
    wanted = (items > 0).reshape(-1).astype(jnp.float32)
    wanted /= jnp.maximum(wanted.sum(), 1)
    query = query.reshape(-1, query.shape[-1])
    item_loss = chunked_cross_entropy(query, model.item_table, items.reshape(-1), wanted, model.valid_items(), chunk)

    position = jnp.arange(tokens.shape[1] - 1)
    predicted = (position >= answers[:, :1]) & (position + 1 < lengths) & (items[:, :1] > 0)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    token_loss = text_loss(model.decoder, rows, tokens[:, 1:].reshape(-1), predicted.reshape(-1).astype(jnp.float32), chunk)
    total = catalogue * item_loss + text * token_loss
    scalars = {"item_loss": item_loss, "text_loss": token_loss}
    if model.config.encoder is not None:
        last = jnp.take_along_axis(states, jnp.maximum(batch["prefix"] - 1, 0)[..., None], axis=1).reshape(query.shape)
        known = wanted * (batch["prefix"] > 0).reshape(-1)
        scalars["align_loss"] = jnp.sum(known * jnp.mean(jnp.square(query - jax.lax.stop_gradient(last)), axis=-1))
        total += align * scalars["align_loss"]
    if model.config.decoder.cross is not None:
        gates = jnp.tanh(model.decoder.stack.cross.gate[...])
        scalars |= {f"gate/{layer}": gates[layer] for layer in range(gates.shape[0])}
    return total, scalars


@functools.partial(jax.jit, static_argnums=0)
def encode_users(graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, "B"]) -> User:
    """Return the users of whole histories: what a server stores of them."""
    model = trees.merge(graphdef, params)
    return model.user(model.encode(events, lengths), lengths[:, None])


@functools.partial(jax.jit, static_argnums=0)
def score_catalogue(
    graphdef: nnx.GraphDef, params: Params, text: Array, lengths: Array, user: User | None = None, leading: int = 0
) -> Float[Array, "B V"]:
    """Score all items at the end of each right-padded prompt."""
    model = trees.merge(graphdef, params)
    hidden = model.hidden(text, lengths, user=user, leading=leading)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.score(model.item_query(last))


@dataclasses.dataclass(frozen=True)
class Ranker:
    """Ranks a split part with a contextualized LLM, by catalogue or by writing titles.

    Attributes:
      leading: tokens of a prompt in front of a soft prompt.
    """

    graphdef: nnx.GraphDef
    context: Context
    prompts: NextItemPrompts
    examples: ExampleConfig
    batch_size: int
    leading: int

    def prompt_batch(self, batch: HistoryBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return right-padded prompts and their lengths; the padded length is the same for a given number of titles."""
        count = self.examples.text_items
        histories = [seen[max(p - count, 0) : p] for seen, p in zip(batch.seen, batch.positions, strict=True)]
        rows = [self.prompts.prompt(history.tolist()) for history in histories]
        lengths = np.array([len(row) for row in rows], np.int32)
        longest = self.prompts.max_tokens if count else int(lengths.max())
        return pad_rows(rows, min(longest, -(-int(lengths.max()) // 64) * 64)), lengths

    def user(self, params: Params, batch: HistoryBatch) -> User | None:
        """Return the batch's users, or None without an encoder."""
        if not self.examples.max_events:
            return None
        return encode_users(self.graphdef, params, batch.events, batch.lengths)

    def users(self, params: Params, count: int) -> User | None:
        """Return the first `count` test users, over again where there are fewer."""
        users, positions = (np.resize(part, count) for part in self.context.split.targets["test"])
        batches = history_batches(
            self.context.timelines, users, positions, max_events=max(self.examples.max_events, 1), batch_size=count
        )
        return self.user(params, next(batches)[1])

    def by_catalogue(self, params: Params, part: str, limit: int | None = None) -> Ranks:
        """Rank by the item head."""

        def score(batch: HistoryBatch) -> Array:
            text, lengths = self.prompt_batch(batch)
            return score_catalogue(self.graphdef, params, text, lengths, self.user(params, batch), self.leading)

        return rank_targets(
            score, self.context.timelines, self.context.split, part,
            max_events=max(self.examples.max_events, 1), batch_size=self.batch_size, limit=limit,
        )  # fmt: skip

    def by_generation(self, params: Params, part: str, *, beams: int, limit: int | None) -> Ranks:
        """Rank by beam search over the titles of the catalogue; what is not among the beams is not found."""
        trie = Trie.build(self.prompts.targets())

        def propose(batch: HistoryBatch) -> np.ndarray:
            text, lengths = self.prompt_batch(batch)
            decoder, user = trees.split(trees.merge(self.graphdef, params).decoder), self.user(params, batch)
            prompts, sizes = embed_prompts(*decoder, text, lengths, user=user, leading=self.leading)
            items, _ = beam_search(*decoder, prompts, sizes, trie, beams=beams, user=user and user.kv)
            return np.asarray(items)

        return rank_listed(
            propose, self.context.timelines, self.context.split, part,
            max_events=max(self.examples.max_events, 1), batch_size=self.batch_size, limit=limit,
        )  # fmt: skip


def build(config: ConfigDict, name: str, context: Context) -> Task:
    """Build the task of phase `name`."""
    phase = config[name]
    tokenizer = context.tokenizer()
    timelines = context.timelines.select(tuple(config.encoder.features))
    context = dataclasses.replace(context, timelines=timelines)
    examples = ExampleConfig(**phase.examples)
    windows = Windows(context.split.train_stop, examples.max_events or examples.text_items, context.seed)
    prompts = NextItemPrompts(tokenizer, timelines.catalogue.titles, **phase.prompt)
    full = model_config(config, name, context, context.decoder_config(tokenizer.vocab_size))
    create = lambda: UserLLM(full, rngs=nnx.Rngs(params=context.seed))  # noqa: E731
    graphdef, _ = trees.abstract(create)
    # The last token of the instruction is the first answer position, which must see the soft prompt.
    leading = len(prompts.instruction) - 1 if phase.soft_prompt.after_instruction else 0
    ranker = Ranker(graphdef, context, prompts, examples, phase.eval.batch_size, leading)

    def results(params: Params) -> list[dict]:
        ranks = ranker.by_catalogue(params, "test")
        context.save_breakdown(name, phase.method, ranks)
        rows = result_rows(ranks.metrics(), len(ranks), **context.row_facts, method=phase.method)
        if phase.eval.generate_users:
            written = ranker.by_generation(params, "test", beams=phase.eval.beams, limit=phase.eval.generate_users)
            rows += result_rows(written.metrics(), len(written), **context.row_facts, method=f"{phase.method}/generate")
        if config.llm.checkpoint:
            decoder = trees.split(trees.merge(graphdef, params).decoder)
            rows += general_text.tuned(context, phase.method, *decoder, lambda count: ranker.users(params, count))
        return rows

    return Task(
        name=name,
        init=lambda place: context.init(create, phase.load, place),
        loss=lambda params, batch, key: contextual_loss(trees.merge(graphdef, params), batch, key, leading=leading, **phase.loss),
        train_data=contextual_examples(
            timelines, context.split.train_stop, prompts, examples,
            batch_size=phase.batch_size, seed=context.seed, process=context.process,
        ),
        steps_per_epoch=len(windows) / (phase.batch_size * context.process[1]),
        count_events=lambda batch: int((batch["items"] > 0).sum()),
        evaluate=lambda params: ranker.by_catalogue(params, "validation", phase.eval.validation_users).metrics(),
        results=results,
    )  # fmt: skip
