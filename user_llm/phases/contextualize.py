"""Phase 2: contextualize the LLM with user tokens, and its text-prompt baseline (sections 3 and 4 of the paper).

One loss for all tasks and variants: what follows an answer position is written token by token (`text`), and where it is an item's
title, the item is ranked against the full catalogue (`catalogue`). What differs is in the config: which tasks and how often,
an encoder or none, how many titles the prompt holds, which parameters train. Tasks take turns batch by batch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.errors import naming
from user_llm.common.files import write_json
from user_llm.common.trees import Params
from user_llm.config.phases import Contextualize
from user_llm.data.dataset import Dataset
from user_llm.data.pipeline import ExampleConfig, Windows, contextual_examples
from user_llm.data.prompts.base import Examples, Lines
from user_llm.models.choices import Choices
from user_llm.models.decoder import DecoderConfig
from user_llm.models.encoder import Encoded
from user_llm.models.trie import Trie
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.losses import Whole, chunked_cross_entropy, whole_count
from user_llm.nn.resampler import ResamplerConfig
from user_llm.phases import general_text, starting
from user_llm.phases.leaving import card_rows, leave
from user_llm.phases.llm import decoder_config, tokenizer
from user_llm.phases.pretrain_encoder import check_longest, encoder_config
from user_llm.phases.pretrain_lm import text_loss
from user_llm.phases.run import Run
from user_llm.phases.samples import draw_samples
from user_llm.serving.predictor import Predictor
from user_llm.serving.settings import kind_of
from user_llm.tasks.asking import Asking
from user_llm.tasks.controls import measure_controls
from user_llm.training.task import Batch, Task


def model_config(name: str, run: Run, data: Dataset, base: DecoderConfig) -> UserLLMConfig:
    """Put the parts together: with an encoder if the phase encodes events, else for text prompts alone.

    The LLM gets adapters if the phase's strategy trains them.
    """
    config, phase = run.config, run.config.contextual(name)
    lora = LoRAConfig(**vars(config.lora)) if config.strategies[phase.strategy].adapters else None
    base = dataclasses.replace(base, block=dataclasses.replace(base.block, lora=lora))
    encoder = encoder_config(config.encoder_of(phase.encoder), data.timelines.schema, run.kinds.encoders)
    shared: dict[str, Any] = {
        "num_items": encoder.schema.num_items,
        "table_rows": encoder.table_rows,
        "item_width": encoder.width,
    }
    if not phase.examples.max_events:
        return UserLLMConfig(decoder=base, **shared)
    check_longest(encoder, {"examples.max_events": phase.examples.max_events})
    return UserLLMConfig(
        decoder=dataclasses.replace(base, cross=cross_config(phase, encoder.width)),
        encoder=encoder,
        resampler=resampler_config(phase, encoder.width),
        soft_prompt=phase.injection != "cross_attention",
        **shared,
    )


def cross_config(phase: Contextualize, user_width: int) -> CrossAttentionConfig | None:
    """Return the cross-attention of a phase that has it."""
    if phase.injection == "soft_prompt":
        return None
    buckets = phase.resampler.recency_buckets if phase.resampler.kind == "none" else 0
    return CrossAttentionConfig(user_width=user_width, recency_buckets=buckets, **vars(phase.cross))


def resampler_config(phase: Contextualize, input_width: int) -> ResamplerConfig | None:
    """Return the resampler of a phase that has one."""
    sizes = {name: size for name, size in vars(phase.resampler).items() if name != "kind"}
    return None if phase.resampler.kind == "none" else ResamplerConfig(input_width=input_width, **sizes)


def contextual_loss(
    model: UserLLM,
    batch: Batch,
    key: Array | None,
    *,
    catalogue: float,
    align: float,
    chunk: int,
    leading: Mapping[str, int],
    whole: Whole | None = None,
    choices: Choices | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Return the weighted sum of three losses.

    `text`, weighted by the batch itself: cross entropy of what follows the first answer position; with `choices`, the tokens of a title
    are predicted among those that titles can go on with. `catalogue`, where there are
    items to rank: their cross entropy at the answer positions. `align`, with an encoder only: mean squared distance of the LLM's
    item query from the encoder's own, its last state: that of the last event, or of the mask token behind it. Both are in the
    space of the encoder's item vectors, by which the LLM ranks too. The pretrained encoder knows what every event taught it, and its
    state tells the LLM more than the one next item does; one from scratch knows nothing, and `encoder_source` refuses to be
    drawn to it.

    `leading` tokens of each task's rows stand in front of a soft prompt, at most those before the first answer position.
    """
    [(task, weight)] = batch["text_weight"].items()
    encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
    tokens = batch["text"].reshape(-1, batch["text"].shape[-1])
    lengths, answers = (batch[k].reshape(len(tokens), -1) for k in ("text_lengths", "answers"))
    predicted, sets = predicted_tokens(batch, choices)
    user, encoded = None, None
    if model.config.encoder is not None:
        encoded = model.encode(batch["events"], batch["prefix"], key=encoder_key)
        user = model.user(encoded)
    hidden = model.hidden(tokens, lengths[:, 0], user=user, leading=leading[task], key=decoder_key)

    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    among = None if choices is None or sets is None else choices.columns(sets.reshape(-1))
    weights = predicted.reshape(-1).astype(jnp.float32)
    token_loss = text_loss(model.decoder, rows, tokens[:, 1:].reshape(-1), weights, chunk, whole, among)
    total, scalars = weight[0] * token_loss, {f"{task}/text_loss": token_loss}
    if "items" in batch:
        ranked, found = _ranking_losses(model, batch, hidden, answers, encoded, chunk, whole)
        scalars |= found
        total = catalogue * ranked + total + (align * found["align_loss"] if encoded is not None else 0.0)
    if model.config.decoder.cross is not None:
        gates = jnp.tanh(model.decoder.stack.cross.gate[...])
        scalars |= {f"gate/{layer}": gates[layer] for layer in range(gates.shape[0])}
    return total, scalars


def predicted_tokens(batch: Batch, choices: Choices | None = None) -> tuple[Bool[Array, "R T"], Int[Array, "R T"] | None]:
    """Return which tokens the text loss asks for, by the place before each: those behind the first answer position.

    With `choices` and items to rank, tokens that alone can follow are not asked for, and the second array is the number of the set
    that each token is chosen from; otherwise it is None.
    """
    tokens = batch["text"].reshape(-1, batch["text"].shape[-1])
    lengths, answers = (batch[k].reshape(len(tokens), -1) for k in ("text_lengths", "answers"))
    position = jnp.arange(tokens.shape[1] - 1)
    predicted = (position >= answers[:, :1]) & (position + 1 < lengths) & (answers[:, :1] > 0)
    if choices is None or "items" not in batch:
        return predicted, None
    sets = choices.at(answers, batch["items"].reshape(answers.shape), len(position))
    return predicted & (sets >= 0), sets


def contextual_counts(batch: Batch, choices: Choices | None = None) -> dict[str, Array]:
    """Return by what the means of `contextual_loss` divide."""
    counts = {"tokens": predicted_tokens(batch, choices)[0].sum()}
    return counts | ({"items": (batch["items"] > 0).sum()} if "items" in batch else {})


def _ranking_losses(
    model: UserLLM, batch: Batch, hidden: Array, answers: Array, encoded: Encoded | None, chunk: int, whole: Whole | None
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of ranking the items at the answer positions, and the scalars to log, `align_loss` among them."""
    items = batch["items"].reshape(answers.shape)
    query = model.item_query(jnp.take_along_axis(hidden, answers[..., None], axis=1))
    wanted = (items > 0).reshape(-1).astype(jnp.float32)
    wanted /= whole_count(wanted, whole, "items")
    query = query.reshape(-1, query.shape[-1])
    item_loss = chunked_cross_entropy(query, model.item_table, items.reshape(-1), wanted, model.valid_items(), chunk)
    scalars = {"item_loss": item_loss}
    if encoded is not None:
        last = encoded.last().reshape(query.shape)
        known = wanted * (batch["prefix"] > 0).reshape(-1)
        scalars["align_loss"] = jnp.sum(known * jnp.mean(jnp.square(query - jax.lax.stop_gradient(last)), axis=-1))
    return item_loss, scalars


def _work(shapes: Params, examples: ExampleConfig, max_tokens: int) -> float:
    """Return about how much one example computes (see `Task.work`): the LLM for each end of a history, the user's side once."""
    llm = trees.count(shapes["decoder"])
    ends = examples.targets_per_history if examples.max_events else 1
    return llm * ends * max_tokens + (trees.count(shapes) - llm) * examples.max_events


def build_examples(name: str, run: Run, data: Dataset) -> dict[str, Examples]:
    """Return the questions of each task that a phase asks; the phase monitors the first.

    Raises:
      ValueError: a task that this dataset has not what it takes for, or a template that does not fit.
    """
    phase = run.config.contextual(name)
    lines = Lines(
        tokenizer(run, data), data.timelines.catalogue, max_title_tokens=phase.prompts.max_title_tokens,
        history=phase.examples.history, text_items=phase.examples.text_items,
    )  # fmt: skip
    found = {}
    for task, settings in phase.prompts.asked.items():
        with naming(f"prompts.{task}"):
            found[task] = run.kinds.tasks[task].examples(lines, data, settings, run.config)
    return found


def title_choices(asked: Mapping[str, Examples], vocab_size: int) -> Choices | None:
    """Return what the titles of the items that are ranked can go on with; None if no task ranks items."""
    for task, examples in asked.items():
        if examples.ranks:
            lines = examples.template.lines
            with naming(f"prompts.{task}"):
                return Choices.build(Trie.build(lines.titles_as_targets()), vocab_size, lines.max_title_tokens)
    return None


def encoder_source(phase: Contextualize) -> str:
    """Return where a phase has its encoder's weights from: the phase that pretrains it, or `fresh`."""
    return phase.encoder if phase.encoder_init == "pretrained" else "fresh"


def check_answers(name: str, run: Run, asked: Mapping[str, Examples]) -> None:
    """See that each task of a phase has whom to ask, that its prompts have room, and that its answers can be told apart.

    Raises:
      ValueError: what is wrong, beginning with the key of the task.
    """
    for number, (task, examples) in enumerate(asked.items()):
        with naming(f"prompts.{task}"):
            kind_of(examples.template)  # refuses what the model directory could not hold
            run.kinds.tasks[task].check(examples, run.config.contextual(name).eval)
            for part in ("test", "validation") if number == 0 else ("test",):  # the first is monitored
                if not len(examples.targets(part)[0]):
                    raise ValueError(
                        f"no user of the {part} part has what it asks for: set its weight to 0 to leave the task out."
                    )


def build(name: str, run: Run, data: Dataset) -> Task:
    """Build the task of phase `name`.

    Raises:
      ValueError: a task without what it needs in this dataset, or no task at all.
    """
    phase, kinds = run.config.contextual(name), run.kinds.tasks
    data = data.select(run.config.encoder_of(phase.encoder).features)
    examples = ExampleConfig(**vars(phase.examples))
    asked = build_examples(name, run, data)
    full = model_config(name, run, data, decoder_config(run, tokenizer(run, data).vocab_size))
    create = lambda: UserLLM(full, rngs=nnx.Rngs(params=run.seed))  # noqa: E731
    graphdef, shapes = trees.abstract(create)
    load = ((r"^encoder/", encoder_source(phase)), *phase.load) if examples.max_events else phase.load
    monitored = next(iter(asked))
    predictor = Predictor(
        full, graphdef, shapes, run.mesh, {task: of.template for task, of in asked.items()},
        max_events=examples.max_events, batch_size=meshes.even_rows(phase.eval.batch_size, run.mesh), beams=phase.eval.beams,
        after_instruction=phase.soft_prompt.after_instruction, ranks=phase.loss.catalogue > 0, trie_softmax=phase.loss.trie_softmax,
        pad_whole=phase.eval.pad_whole,
    )  # fmt: skip
    asking = Asking(predictor, data, asked)
    weights = vars(phase.loss) | {"leading": {task: predictor.leading(task) for task in asked}}
    choices = title_choices(asked, full.decoder.vocab_size) if weights.pop("trie_softmax") else None

    def evaluate(params: Params) -> dict[str, float]:
        """Return the metrics of the first task, which the phase monitors."""
        answers, limit = asking.of(predictor.of(params)), phase.eval.validation_users
        return kinds[monitored].measure(answers, monitored, "validation", limit, phase.eval)[0].measured.metrics

    def results(params: Params) -> list[dict]:
        rows, card, answers = [], [], asking.of(predictor.of(params))
        for task in asked:
            own = kinds[task].measure(answers, task, "test", None, phase.eval)
            for found in own:
                method = phase.method + found.suffix
                rows += run.record(name, data, task, method, found.measured, together=found.together)
                card += card_rows(task, method, found.measured)
            for found in measure_controls(kinds[task], answers, task, own, phase.eval, run.seed):
                rows += run.record(name, data, task, phase.method + found.suffix, found.measured, controls=True)
        samples = draw_samples(answers, kinds, phase.method, phase.eval.samples)
        write_json(run.workdir / name / "samples.json", samples)
        if run.config.llm.checkpoint:
            decoder = trees.split(trees.merge(graphdef, params).decoder)
            rows += general_text.tuned(name, run, data, phase.method, *decoder, answers.test_users)
        leave(name, run, load, answers, card)
        return rows

    def stream(number: tuple[int, int], rows: int) -> grain.IterDataset:
        of_tasks = [
            contextual_examples(
                data.timelines, data.split.train_stop, of, examples, batch_size=rows, seed=run.seed, stream=number,
                task=task, text_weight=phase.prompts.tasks[task].text,
            )
            for task, of in asked.items()
        ]  # fmt: skip
        weights = [phase.prompts.tasks[task].weight for task in asked]
        return of_tasks[0] if len(of_tasks) == 1 else grain.IterDataset.mix(of_tasks, weights)

    windows = Windows(data.split.train_stop, examples.window, run.seed)
    return Task(
        name=name,
        shapes=shapes,
        load=load,
        init=lambda place: starting.init(run, create, load, place),
        loss=lambda params, batch, key, whole: contextual_loss(
            trees.merge(graphdef, params), batch, key, whole=whole, choices=choices, **weights
        ),
        counts=functools.partial(contextual_counts, choices=choices),
        train_data=run.streams(stream, phase.batch_size),
        steps_per_epoch=len(windows) / phase.batch_size,
        work=phase.batch_size * _work(shapes, examples, max(of.template.max_tokens for of in asked.values())),
        count_events=lambda batch: int((batch["answers"] > 0).sum()),
        metrics=kinds[monitored].metrics,
        check=lambda: check_answers(name, run, asked),
        evaluate=evaluate,
        results=results,
        programs=predictor.programs,
        taught_by=(phase.encoder,) if examples.max_events and phase.encoder_init == "pretrained" else (),
    )
