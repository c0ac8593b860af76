"""Phase 2: contextualize the LLM with user tokens, and its text-prompt baseline (sections 3 and 4 of the paper).

One loss for all tasks and variants: what follows an answer position is written token by token (`text`), and where it is an item's
title, the item is ranked against the full catalogue (`catalogue`). What differs is in the config: which tasks and how often,
an encoder or none, how many titles the prompt holds, which parameters train. Tasks take turns batch by batch.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import grain
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.errors import naming
from user_llm.common.files import write_json
from user_llm.common.trees import Params
from user_llm.config.phases import Contextualize
from user_llm.data.dataset import Dataset
from user_llm.data.packing import PackedExamples, Packing, settle
from user_llm.data.pipeline import ExampleConfig, Windows, contextual_batches, contextual_examples
from user_llm.data.prompts.base import Examples, Lines
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.streams import Streams
from user_llm.models.choices import Choices
from user_llm.models.decoder import DecoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.phases import general_text, starting
from user_llm.phases.contextual_loss import contextual_counts, contextual_loss, task_of
from user_llm.phases.leaving import card_rows, leave
from user_llm.phases.llm import decoder_config, tokenizer
from user_llm.phases.pretrain_encoder import check_longest, encoder_config
from user_llm.phases.run import Run
from user_llm.phases.samples import draw_samples
from user_llm.serving.predictor import Predictor
from user_llm.serving.ranking import RANKING
from user_llm.serving.settings import kind_of
from user_llm.tasks.asking import Asking, title_trie
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
        residual=phase.residual,
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


def _work(shapes: Params, phase: Contextualize, max_tokens: int, packings: Iterable[Packing | None]) -> float:
    """Return about how much one step computes (see `Task.work`): the LLM on all rows of text, the user's side on each history once."""
    llm, ends = trees.count(shapes["decoder"]), phase.examples.targets_per_history if phase.examples.max_events else 1
    tokens, histories = phase.batch_size * ends * max_tokens, phase.batch_size
    if settled := [packing for packing in packings if packing is not None]:
        tokens, histories = (
            phase.rows[1] * max(each) for each in zip(*((p.rows * p.row_length, p.histories) for p in settled), strict=True)
        )
    return llm * tokens + (trees.count(shapes) - llm) * histories * phase.examples.max_events


def settled_packing(
    phase: Contextualize, examples: grain.IterDataset, max_tokens: int, soft: int, leading: int
) -> Packing | None:
    """Return how the prompts of a task are packed, or None where each has a row of its own."""
    if not phase.pack.histories:
        return None
    found = settle(examples, phase.pack.histories, phase.pack.room * (max_tokens + soft), soft=soft, leading=leading)
    logging.info(
        "packed: %d prompts of at most %d histories in %d rows of %d tokens",
        found.prompts,
        found.histories,
        found.rows,
        found.row_length,
    )
    return found


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


def title_choices(asked: Mapping[str, Examples], vocab_size: int) -> dict[str, Choices]:
    """Return the tokens that each beginning of a title can go on with, for each task whose targets are titles of ranked items."""
    found = {}
    for task, examples in asked.items():
        if examples.ranks and isinstance(examples.template, NextItem):  # as in decoding: what others write may be no title
            lines = examples.template.lines
            with naming(f"prompts.{task}"):
                found[task] = Choices.build(title_trie(lines), vocab_size, lines.max_title_tokens)
    return found


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
            if run.config.contextual(name).eval.control_users:
                user, end = (int(part[0]) for part in examples.targets("test"))
                try:
                    examples.prompt(user, end, (user, 0))
                except TypeError as error:
                    raise ValueError(
                        f"its prompt(user, end, whose) takes whose history the prompt holds, for the controls ({error}): write it so, "
                        "or set eval.control_users=0."
                    ) from error


def _train_data(
    phase: Contextualize, run: Run, data: Dataset, asked: Mapping[str, Examples], soft: int, leading: Mapping[str, int]
) -> tuple[Streams, dict[str, Packing | None]]:
    """Return the batches of a phase, whose tasks take turns, and how the prompts of each task are packed.

    Args:
      soft: the most tokens of a soft prompt; 0 for none.
      leading: tokens of each task's prompts before it.

    Raises:
      ValueError: prompts that are to be packed of a task that has none in training.
    """
    sizes = ExampleConfig(**vars(phase.examples))

    def of_task(task: str, number: tuple[int, int], epochs: int | None = None) -> grain.IterDataset:
        return contextual_examples(
            data.timelines, data.split.train_stop, asked[task], sizes, seed=run.seed, stream=number,
            task=task, text_weight=phase.prompts.tasks[task].text, epochs=epochs,
        )  # fmt: skip

    packings = dict[str, Packing | None]()
    for task, of in asked.items():
        with naming(f"prompts.{task}"):
            packings[task] = settled_packing(
                phase, of_task(task, (0, 1), epochs=1), of.template.max_tokens, soft, leading[task]
            )

    def stream(number: tuple[int, int], rows: int) -> grain.IterDataset:
        of_tasks = []
        for task, packing in packings.items():
            each = of_task(task, number)
            of_tasks.append(contextual_batches(PackedExamples(each, packing) if packing else each, data.timelines, rows))
        weights = [phase.prompts.tasks[task].weight for task in asked]
        return of_tasks[0] if len(of_tasks) == 1 else grain.IterDataset.mix(of_tasks, weights)

    return run.streams(stream, phase.rows[1]), packings


def _predictor(
    phase: Contextualize,
    config: UserLLMConfig,
    graphdef: nnx.GraphDef,
    params: Params,
    mesh: Mesh,
    asked: Mapping[str, Examples],
) -> Predictor:
    """Return the phase's model as it answers in evaluation."""
    return Predictor(
        config, graphdef, params, mesh, {task: of.template for task, of in asked.items()},
        max_events=phase.examples.max_events, batch_size=meshes.even_rows(phase.eval.batch_size, mesh), beams=phase.eval.beams,
        after_instruction=phase.soft_prompt.after_instruction, ranks=phase.loss.catalogue > 0, trie_softmax=phase.loss.trie_softmax,
        pad_whole=phase.eval.pad_whole,
    )  # fmt: skip


def _measured(name: str, run: Run, data: Dataset, answers: Asking) -> tuple[list[dict], list[dict]]:
    """Measure all tasks of a phase on test, with the controls; return the rows of its results and those of its model card."""
    phase, kinds = run.config.contextual(name), run.kinds.tasks
    rows, card = [], []
    for task in answers.examples:
        sizes = kinds[task].settle(answers, task, phase.eval)
        own = kinds[task].measure(answers, task, "test", None, sizes)
        for found in own:
            method = phase.method + found.suffix
            rows += run.record(name, data, task, method, found.measured, together=found.together)
            card += card_rows(task, method, found.measured)
        for found in measure_controls(kinds[task], answers, task, own, sizes, run.seed):
            rows += run.record(name, data, task, phase.method + found.suffix, found.measured, controls=True)
    return rows, card


def build(name: str, run: Run, data: Dataset) -> Task:
    """Build the task of phase `name`.

    Raises:
      ValueError: a task without what it needs in this dataset, or no task at all.
    """
    phase, kinds = run.config.contextual(name), run.kinds.tasks
    data = data.select(run.config.encoder_of(phase.encoder).features)
    examples = ExampleConfig(**vars(phase.examples))
    asked = build_examples(name, run, data)
    words = tokenizer(run, data)
    full = model_config(name, run, data, decoder_config(run, words.vocab_size))
    create = lambda: UserLLM(full, rngs=nnx.Rngs(params=run.seed))  # noqa: E731
    graphdef, shapes = trees.abstract(create)
    load = ((r"^encoder/", phase.taught_by or "fresh"), *phase.load) if examples.max_events else phase.load
    shapes = starting.kept(name, run, load, shapes)
    monitored = next(iter(asked))
    predictor = _predictor(phase, full, graphdef, shapes, run.mesh, asked)
    soft = predictor.most_soft_tokens()
    if run.config.llm.checkpoint:
        general_text.check_window(full.decoder, words, run.config.general_text.window, soft)
    for task, of in asked.items():
        with naming(f"prompts.{task}"):
            full.decoder.check_length(soft + of.template.max_tokens, "A prompt with its answer")
    asking = Asking(predictor, data, asked)
    leading = {task: predictor.leading(task) for task in asked}
    weights = {key: value for key, value in vars(phase.loss).items() if key != "trie_softmax"} | {"leading": leading}
    weights["teacher"] = phase.loss.teacher if phase.taught_by else 0.0
    choices = title_choices(asked, full.decoder.vocab_size) if phase.loss.trie_softmax else {}

    def choices_of(batch: Batch) -> Choices | None:
        return batch["choices"].get(task_of(batch)) if choices else None

    def evaluate(params: Params) -> dict[str, float]:
        """Return the metrics of the first task, which the phase monitors."""
        answers, limit = asking.of(predictor.of(params)), phase.eval.validation_users
        return kinds[monitored].measure(answers, monitored, "validation", limit, phase.eval)[0].measured.metrics

    def results(params: Params) -> list[dict]:
        answers = asking.of(predictor.of(params)).with_transitions(RANKING, phase.transitions, phase.eval.validation_users)
        rows, card = _measured(name, run, data, answers)
        samples = draw_samples(answers, kinds, phase.method, phase.eval.samples)
        write_json(run.workdir / name / "samples.json", samples)
        if run.config.llm.checkpoint:
            decoder = trees.split(trees.merge(graphdef, params).decoder)
            rows += general_text.tuned(name, run, data, phase.method, *decoder, answers.test_users)
        leave(name, run, load, answers, card)
        return rows

    train_data, packings = _train_data(phase, run, data, asked, soft, leading)
    windows = Windows(data.split.train_stop, examples.window, run.seed)
    return Task(
        name=name,
        shapes=shapes,
        load=load,
        init=lambda place: starting.init(run, create, load, shapes, place),
        loss=lambda params, batch, key, whole: contextual_loss(
            trees.merge(graphdef, params), batch, key, whole=whole, choices=choices_of(batch), **weights
        ),
        counts=lambda batch: contextual_counts(batch, choices_of(batch), phase.loss.all_words),
        train_data=train_data,
        steps_per_epoch=len(windows) / phase.batch_size,
        work=_work(shapes, phase, max(of.template.max_tokens for of in asked.values()), packings.values()),
        count_events=lambda batch: int((batch["answers"] > 0).sum()),
        metrics=kinds[monitored].metrics,
        check=lambda: check_answers(name, run, asked),
        evaluate=evaluate,
        results=results,
        programs=predictor.programs,
        beside={"choices": choices} if choices else {},
        taught_by=(phase.taught_by,) if phase.taught_by else (),
    )
