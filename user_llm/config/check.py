"""Is a config one that can run? All that can be told from the config alone: each value by itself, then those that depend on others.

What takes data, a tokenizer or devices to tell is checked where the phases are built (`phases/early.py`).
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from user_llm.config.phases import TASKS, Contextualize, Phase, PretrainEncoder
from user_llm.config.reader import Config, changed, either, fault, near_miss, read_config
from user_llm.config.records import Block, Encoder
from user_llm.config.values import ENCODERS, SOURCES, best_of

# The weights that llm.quantize keeps in codes.
QUANTIZED = (*(f"attn/{weight}" for weight in "qkvo"), "mlp/gate_proj", "mlp/up", "mlp/down")


def check(
    config: Mapping[str, Any] | ConfigDict,
    *,
    tasks: Mapping[str, type] = TASKS,
    sources: Collection[str] = SOURCES,
    encoders: Collection[str] = ENCODERS,
) -> Config:
    """Read a config, and see that the settings of what runs fit each other.

    Args:
      tasks: the settings of each task that prompts may name, by the task's name.
      sources, encoders: what `data.source` and `encoder.kind` may be.

    Raises:
      ValueError: the first key that is unknown or missing, or whose value is not of its type, in its range or among its choices.
    """
    read = read_config(config, tasks)
    for key, value, why in conflicts(read, sources, encoders):
        raise fault(key, value, why)
    return read


def conflicts(run: Config, sources: Collection[str], encoders: Collection[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and reason of the settings that do not fit others, of the run and of the phases that run."""
    phases = run.sections
    for key, value, choices in (("data.source", run.data.source, sources), ("encoder.kind", run.encoder.kind, encoders)):
        if value not in choices:
            yield key, value, f"choose {either(list(choices))}{near_miss(value, choices)}"
    known = sorted({*phases, *run.variants})
    if not run.phases:
        yield "phases", run.phases, f"name one or more of {', '.join(known)}"
    for place, name in enumerate(run.phases):
        if name in run.variants and name not in phases:
            like, others = run.variants[name].like, [other for other in known if other != name]
            yield f"variants.{name}.like", like, f"it leads to no phase that the config describes{near_miss(like, others)}"
        if name not in phases:
            yield (
                "phases",
                run.phases,
                f"there is no phase {name}; choose from {', '.join(known)}{near_miss(name, known)}",
            )
        if name in run.phases[:place]:
            yield "phases", run.phases, f"{name} stands there twice"
    yield from _blocks("encoder", run.encoder.block)
    if not run.llm.checkpoint:
        yield from _llm_conflicts(run.llm.block)
        if run.llm.quantize:
            yield "llm.quantize", run.llm.quantize, "it is for an open LLM: name one by llm.checkpoint, or leave it empty"
    axes = {f"mesh.{axis}": size for axis, size in vars(run.mesh).items() if size == -1}
    if len(axes) > 1:
        yield list(axes)[1], -1, f"only one axis can take what the others leave, and {list(axes)[0]} does"
    for name in run.phases:
        for key, value, why in _phase_conflicts(run, phases[name], encoders):
            yield f"{name}.{key}", value, why


def _blocks(section: str, block: Block) -> Iterator[tuple[str, Any, str]]:
    if block.heads % block.kv_heads:
        yield f"{section}.block.kv_heads", block.kv_heads, f"it must divide the {block.heads} heads"


def _llm_conflicts(block: Block) -> Iterator[tuple[str, Any, str]]:
    """Yield what rules out an LLM that is trained from scratch: it must be of an open family, as which its model is written."""
    yield from _blocks("llm", block)
    if block.residual_gate:
        yield "llm.block.residual_gate", True, "no open family has it, and the model could not be written: set it to False"
    if block.norm_eps >= 1:
        yield "llm.block.norm_eps", block.norm_eps, "it must be below 1, or the model could not be written"


def _phase_conflicts(run: Config, phase: Phase, encoders: Collection[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield the same of a phase, keys without its name."""
    loop, optimizer, (key, rows) = phase.loop, phase.optimizer, phase.rows
    if phase.strategy not in run.strategies:
        yield "strategy", phase.strategy, f"choose {either(sorted(run.strategies))}{near_miss(phase.strategy, run.strategies)}"
    if (loop.total_steps > 0) == (loop.total_epochs > 0):
        yield "loop.total_steps", loop.total_steps, f"set it or loop.total_epochs ({loop.total_epochs}), and the other to 0"
    if loop.mode != (best_of(loop.monitor) or loop.mode):
        best = "lowest" if loop.mode == "max" else "highest"
        yield "loop.mode", loop.mode, f"the {best} {loop.monitor} is the best: set it to {best_of(loop.monitor)}"
    if optimizer.schedule == "cosine" and 0 < loop.total_steps <= optimizer.warmup_steps:
        yield (
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            (f"it must be below the {loop.total_steps} steps of loop.total_steps, for the schedule is cosine"),
        )
    if rows % loop.accumulation_steps:
        yield "loop.accumulation_steps", loop.accumulation_steps, f"it must divide the {rows} rows of {key}"
    if run.data.streams and rows % run.data.streams:
        yield key, rows, f"it must be a multiple of data.streams, {run.data.streams}"
    if isinstance(phase, PretrainEncoder):
        yield from _encoder_conflicts(run, phase, encoders)
    if isinstance(phase, Contextualize):
        quantized = [f"decoder/stack/blocks/{weight}{of}" for weight in QUANTIZED for of in ("", "/codes", "/scale")]
        if run.llm.quantize and any(_trains(run, phase, path) for path in quantized):
            why = f"with llm.quantize={run.llm.quantize} nothing can train the LLM's own weights: choose lora, enc or proj"
            yield "strategy", phase.strategy, why
        yield from _contextual_conflicts(run, phase, encoders)


def _encoder_conflicts(run: Config, phase: PretrainEncoder, encoders: Collection[str]) -> Iterator[tuple[str, Any, str]]:
    encoder, batch, weights = changed(run.encoder, phase.encoder), phase.batch, phase.loss.head_weights
    if encoder.kind not in encoders:
        yield "encoder.kind", encoder.kind, f"choose {either(list(encoders))}{near_miss(encoder.kind, encoders)}"
    yield from _blocks("encoder", encoder.block)
    if batch.row_length < batch.window:
        yield "batch.row_length", batch.row_length, f"it must be {batch.window} or more, to hold a window of batch.window"
    if missing := [head for head in encoder.heads if head not in weights]:
        yield "loss.head_weights", weights, f"it lacks the weight of {missing[0]}, which encoder.heads names"
    if unused := [head for head in weights if head not in encoder.heads]:
        yield "loss.head_weights", weights, f"encoder.heads names no {unused[0]}"
    if phase.loss.negatives and (phase.loss.in_batch or encoder.objective == "dual"):
        why = "a dual encoder has" if encoder.objective == "dual" else "loss.in_batch takes"
        yield "loss.negatives", phase.loss.negatives, f"{why} the negatives of its batch and draws no others: set it to 0"
    for key, events in (("batch.window", batch.window), ("eval.max_events", phase.eval.max_events)):
        if encoder.positions == "learned" and events > encoder.max_events:
            yield key, events, f"an encoder of learned positions reads at most encoder.max_events, {encoder.max_events}"


def _contextual_conflicts(run: Config, phase: Contextualize, kinds: Collection[str]) -> Iterator[tuple[str, Any, str]]:
    encoders = {name: other for name, other in run.sections.items() if isinstance(other, PretrainEncoder)}
    if phase.encoder not in encoders:
        known = sorted({*encoders, *(name for name, variant in run.variants.items() if variant.like in encoders)})
        why = f"choose a phase that pretrains an encoder: {either(known)}{near_miss(phase.encoder, known)}"
        yield "encoder", phase.encoder, why
        return
    encoder = run.encoder_of(phase.encoder)
    if encoder.kind not in kinds:
        why = f"its encoder.kind is {encoder.kind!r}: choose {either(list(kinds))}{near_miss(encoder.kind, kinds)}"
        yield "encoder", phase.encoder, why
    yield from _pack_conflicts(phase)
    if not phase.prompts.asked:
        tasks = list(phase.prompts.tasks)
        yield f"prompts.{tasks[0]}.weight", 0.0, f"one of {', '.join(tasks)} needs a weight above 0"
    if encoder.positions == "learned" and phase.examples.max_events > encoder.max_events:
        yield (
            "examples.max_events",
            phase.examples.max_events,
            (f"an encoder of learned positions reads at most encoder.max_events, {encoder.max_events}"),
        )
    if phase.examples.max_events and phase.encoder_init == "scratch":
        yield from _scratch_conflicts(run, phase, encoder)
    if phase.residual and not phase.examples.max_events:
        yield "residual", True, "a text prompt has no encoder to add to: set it to False"
    crosses = phase.examples.max_events and phase.injection != "soft_prompt"
    if crosses and not run.llm.checkpoint and phase.cross.every > run.llm.num_layers:
        yield "cross.every", phase.cross.every, f"the LLM has llm.num_layers={run.llm.num_layers} layers"
    if not phase.loss.catalogue and not phase.eval.generate_users and "next_item" in phase.prompts.asked:
        why = "with loss.catalogue=0 no item head is trained, and titles must be written: set it to 1 or more"
        yield "eval.generate_users", phase.eval.generate_users, why
    for number, (_, source) in enumerate(phase.load):
        if source != "fresh" and source not in run.sections and not (source == "checkpoint" and run.llm.checkpoint):
            yield (
                f"load[{number}][1]",
                source,
                f"choose fresh, the name of a phase{', or checkpoint' if run.llm.checkpoint else ''}",
            )


def _pack_conflicts(phase: Contextualize) -> Iterator[tuple[str, Any, str]]:
    """Yield what rules out the packing of prompts."""
    histories = phase.pack.histories
    if histories and phase.batch_size % histories:
        yield "pack.histories", histories, f"it must divide the {phase.batch_size} histories of batch_size"
    if histories and phase.injection != "cross_attention" and phase.resampler.kind == "none" and phase.examples.max_events:
        yield (
            "pack.histories",
            histories,
            "soft prompts of any length are not packed: set it to 0, or resampler.kind to perceiver",
        )


def _trains(run: Config, phase: Phase, path: str) -> bool:
    """Return whether the strategy of a phase trains a parameter."""
    rules = run.strategies[phase.strategy].trainable
    return next((trains for pattern, trains in rules if re.search(pattern, path)), True)


def _scratch_conflicts(run: Config, phase: Contextualize, encoder: Encoder) -> Iterator[tuple[str, Any, str]]:
    """Yield what an encoder that starts from scratch rules out."""
    if phase.loss.align:
        yield "loss.align", phase.loss.align, "an encoder from scratch teaches nothing: set it to 0"
    if encoder.kind in ENCODERS and (encoder.tower or encoder.objective == "dual"):
        yield (
            "encoder_init",
            phase.encoder_init,
            "the item tower of its encoder comes pretrained: set it to frozen or pretrained",
        )
    if not _trains(run, phase, "encoder/project"):
        yield "strategy", phase.strategy, "it would leave an encoder from scratch untrained: choose another"
    if phase.residual:
        yield "residual", True, "an encoder from scratch ranks nothing yet that an LLM could add to: set it to False"
