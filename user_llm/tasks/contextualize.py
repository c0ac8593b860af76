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
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig, UserKV
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.losses import chunked_cross_entropy
from user_llm.nn.resampler import ResamplerConfig
from user_llm.tasks import general_text
from user_llm.tasks.context import Context
from user_llm.tasks.pretrain_encoder import encoder_config, encoder_section, encoder_source
from user_llm.tasks.pretrain_lm import text_loss
from user_llm.training.task import Batch, Task


def model_config(config: ConfigDict, name: str, context: Context, base: DecoderConfig) -> UserLLMConfig:
    """Put the parts together: with an encoder if the phase encodes events, else for text prompts alone.

    The LLM gets adapters if the phase's strategy trains them.
    """
    phase = config[name]
    lora = LoRAConfig(**config.lora) if config.strategies[phase.strategy].adapters else None
    base = dataclasses.replace(base, block=dataclasses.replace(base.block, lora=lora))
    encoder = encoder_config(encoder_section(config, phase.encoder), context.timelines.schema)
    shared: dict[str, Any] = {
        "num_items": encoder.schema.num_items,
        "table_rows": encoder.table_rows,
        "item_width": encoder.block.width,
    }
    if not phase.examples.max_events:
        return UserLLMConfig(decoder=base, **shared)
    cross = CrossAttentionConfig(user_width=encoder.block.width, **phase.cross)
    return UserLLMConfig(
        decoder=dataclasses.replace(base, cross=cross),
        encoder=encoder,
        resampler=ResamplerConfig(input_width=encoder.block.width, **phase.resampler),
        **shared,
    )


def contextual_loss(
    model: UserLLM, batch: Batch, key: Array | None, *, catalogue: float, text: float, align: float, chunk: int
) -> tuple[Array, dict[str, Array]]:
    """Return the weighted sum of three losses.

    `catalogue`: cross entropy of the items at the answer positions. `text`: cross entropy of what follows the first answer
    position. `align`, with an encoder only: mean squared distance of the LLM's item query from the encoder's own, its last state:
    that of the last event, or of the mask token behind it. Both are in the space of the encoder's item vectors, by which the LLM
    ranks too. The pretrained encoder knows what every event taught it, and its state tells the LLM more than the one next item
    does; one from scratch knows nothing, and `encoder_source` refuses to be drawn to it.
    """
    encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
    tokens = batch["text"].reshape(-1, batch["text"].shape[-1])
    lengths, answers, items = (batch[k].reshape(len(tokens), -1) for k in ("text_lengths", "answers", "items"))
    user = None
    if model.config.encoder is not None:
        encoded = model.encode(batch["events"], batch["prefix"], key=encoder_key)
        user = model.user_kv(encoded)
    hidden = model.hidden(tokens, lengths[:, 0], user=user, key=decoder_key)

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
        last = encoded.last().reshape(query.shape)
        known = wanted * (batch["prefix"] > 0).reshape(-1)
        scalars["align_loss"] = jnp.sum(known * jnp.mean(jnp.square(query - jax.lax.stop_gradient(last)), axis=-1))
        total += align * scalars["align_loss"]
        gates = jnp.tanh(model.decoder.stack.cross.gate[...])
        scalars |= {f"gate/{layer}": gates[layer] for layer in range(gates.shape[0])}
    return total, scalars


@functools.partial(jax.jit, static_argnums=0)
def user_kv(graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, "B"]):
    """Return the user K/V of whole histories: what a server stores per user."""
    model = trees.merge(graphdef, params)
    return model.user_kv(model.encode(events, lengths[:, None]))


@functools.partial(jax.jit, static_argnums=0)
def score_catalogue(graphdef: nnx.GraphDef, params: Params, text: Array, lengths: Array, user=None) -> Float[Array, "B V"]:
    """Score all items at the end of each right-padded prompt."""
    model = trees.merge(graphdef, params)
    hidden = model.hidden(text, lengths, user=user)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.score(model.item_query(last))


@dataclasses.dataclass(frozen=True)
class Ranker:
    """Ranks a split part with a contextualized LLM, by catalogue or by writing titles."""

    graphdef: nnx.GraphDef
    context: Context
    prompts: NextItemPrompts
    examples: ExampleConfig
    batch_size: int

    def prompt_batch(self, batch: HistoryBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return right-padded prompts and their lengths; the padded length is the same for a given number of titles."""
        count = self.examples.text_items
        histories = [seen[max(p - count, 0) : p] for seen, p in zip(batch.seen, batch.positions, strict=True)]
        rows = [self.prompts.prompt(history.tolist()) for history in histories]
        lengths = np.array([len(row) for row in rows], np.int32)
        longest = self.prompts.max_tokens if count else int(lengths.max())
        return pad_rows(rows, min(longest, -(-int(lengths.max()) // 64) * 64)), lengths

    def user(self, params: Params, batch: HistoryBatch) -> UserKV | None:
        """Return the K/V of the batch's users, or None without an encoder."""
        if not self.examples.max_events:
            return None
        return user_kv(self.graphdef, params, batch.events, batch.lengths)

    def users(self, params: Params, count: int) -> UserKV | None:
        """Return the K/V of the first `count` test users, over again where there are fewer."""
        users, positions = (np.resize(part, count) for part in self.context.split.targets["test"])
        batches = history_batches(
            self.context.timelines, users, positions, max_events=max(self.examples.max_events, 1), batch_size=count
        )
        return self.user(params, next(batches)[1])

    def by_catalogue(self, params: Params, part: str, limit: int | None = None) -> Ranks:
        """Rank by the item head."""

        def score(batch: HistoryBatch) -> Array:
            text, lengths = self.prompt_batch(batch)
            return score_catalogue(self.graphdef, params, text, lengths, self.user(params, batch))

        return rank_targets(
            score, self.context.timelines, self.context.split, part,
            max_events=max(self.examples.max_events, 1), batch_size=self.batch_size, limit=limit,
        )  # fmt: skip

    def by_generation(self, params: Params, part: str, *, beams: int, limit: int | None) -> Ranks:
        """Rank by beam search over the titles of the catalogue; what is not among the beams is not found."""
        trie = Trie.build(self.prompts.targets())

        def propose(batch: HistoryBatch) -> np.ndarray:
            text, lengths = self.prompt_batch(batch)
            decoder_def, decoder_params = trees.split(trees.merge(self.graphdef, params).decoder)
            items, _ = beam_search(decoder_def, decoder_params, text, lengths, trie, beams=beams, user=self.user(params, batch))
            return np.asarray(items)

        return rank_listed(
            propose, self.context.timelines, self.context.split, part,
            max_events=max(self.examples.max_events, 1), batch_size=self.batch_size, limit=limit,
        )  # fmt: skip


def build(config: ConfigDict, name: str, context: Context) -> Task:
    """Build the task of phase `name`."""
    phase = config[name]
    tokenizer = context.tokenizer()
    timelines = context.timelines.select(tuple(encoder_section(config, phase.encoder).features))
    context = dataclasses.replace(context, timelines=timelines)
    examples = ExampleConfig(**phase.examples)
    windows = Windows(context.split.train_stop, examples.max_events or examples.text_items, context.seed)
    prompts = NextItemPrompts(tokenizer, timelines.catalogue.titles, **phase.prompt)
    full = model_config(config, name, context, context.decoder_config(tokenizer.vocab_size))
    create = lambda: UserLLM(full, rngs=nnx.Rngs(params=context.seed))  # noqa: E731
    graphdef, _ = trees.abstract(create)
    ranker = Ranker(graphdef, context, prompts, examples, phase.eval.batch_size)
    load = phase.load
    if examples.max_events:
        load = ((r"^encoder/", encoder_source(config, name)), *load)

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
        init=lambda place: context.init(create, load, place),
        loss=lambda params, batch, key: contextual_loss(trees.merge(graphdef, params), batch, key, **phase.loss),
        train_data=contextual_examples(
            timelines, context.split.train_stop, prompts, examples,
            batch_size=phase.batch_size, seed=context.seed, process=context.process,
        ),
        steps_per_epoch=len(windows) / (phase.batch_size * context.process[1]),
        count_events=lambda batch: int((batch["items"] > 0).sum()),
        evaluate=lambda params: ranker.by_catalogue(params, "validation", phase.eval.validation_users).metrics(),
        results=results,
    )  # fmt: skip
