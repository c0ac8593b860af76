"""The LLM of a run before any phase has changed it: its sizes, its tokenizer, and what a small one learns from."""

import dataclasses
from pathlib import Path

import numpy as np
from etils import epath

from user_llm.common.files import make_once
from user_llm.config.phases import Contextualize
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset
from user_llm.data.mapped import Column, filled
from user_llm.data.timelines import Chunk, Timelines
from user_llm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from user_llm.models import pretrained
from user_llm.models.decoder import DecoderConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.phases import identities
from user_llm.phases.run import Run

CORPUS_TEXTS = 50_000


def decoder_config(run: Run, vocab_size: int) -> DecoderConfig:
    """Return the LLM as it comes: the checkpoint's own, or a small one to train from scratch.

    Raises:
      ValueError: what `llm.quantize` asks for cannot be had, or as `pretrained.decoder_config`.
    """
    llm = run.config.llm
    if llm.checkpoint:
        found = pretrained.decoder_config(run.checkpoint, run.kinds.families, unroll=llm.unroll, remat=llm.remat)
        if llm.quantize and found.block.experts is not None:
            raise ValueError(
                f"config.llm.quantize={llm.quantize}: the weights of experts cannot be kept in codes, leave it empty."
            )
    else:
        found = DecoderConfig(
            vocab_size=vocab_size, num_layers=llm.num_layers, block=BlockConfig(**vars(llm.block)), tie_embeddings=True,
            unroll=llm.unroll, remat=llm.remat,
        )  # fmt: skip
    block = dataclasses.replace(found.block, attention_kernel=llm.attention_kernel, quantize=llm.quantize)
    return dataclasses.replace(found, block=block)


def tokenizer(run: Run, data: Dataset) -> Tokenizer:
    """Return the LLM's tokenizer: the checkpoint's own, or BPE trained once on this dataset's titles and genres."""
    config = run.config
    if config.llm.checkpoint:
        found = load_tokenizer(run.checkpoint)
        found.check_fits(decoder_config(run, found.vocab_size).vocab_size, str(run.checkpoint))
        return found

    def train(path: Path) -> None:
        # Often enough for byte-pair merges to make whole words of them: every prompt starts with one.
        asked = [line + "\n" for line in sentences(config)]
        train_bpe(corpus(data, run.seed) + 100 * asked, config.llm.vocab_size, path)
        identities.tokenizer_identity(config, data.files).write(epath.Path(path))

    return load_tokenizer(make_once(run.local / "tokenizer", train))


def sentences(config: Config) -> list[str]:
    """Return the instructions and questions of all tasks that the phases of a run ask, phase by phase."""
    phases = [phase for name in config.phases if isinstance(phase := config.sections[name], Contextualize)]
    asked = [task for phase in phases for task in phase.prompts.asked.values()]
    lines = [getattr(task, part, "") for task in asked for part in ("instruction", "question")]
    return [line for line in lines if line]


def corpus(data: Dataset, seed: int) -> list[str]:
    """Return what the small LLM learns from: a line per item, and of what users wrote in training, at most CORPUS_TEXTS lines."""
    lines = catalogue_lines(data.timelines)
    for _, column in sorted(data.timelines.columns.items()):
        if column.dtype.kind == "T":
            lines += [text + "\n" for text in _written(data, column, seed)]
    return lines


def _written(data: Dataset, column: np.ndarray | Column, seed: int) -> list[str]:
    """Return at most CORPUS_TEXTS texts of training events, drawn from all those that are not empty."""

    def rows(chunk: Chunk) -> np.ndarray:
        trains = chunk.positions < data.split.train_stop[chunk.users]
        return chunk.events.start + np.flatnonzero(trains & filled(column, chunk.events))

    total = sum(len(rows(chunk)) for chunk in data.timelines.chunks())
    # Their numbers among these texts; where they are a small share, in memory for them alone.
    drawn = np.random.default_rng(seed).choice(total, min(total, CORPUS_TEXTS), replace=False)
    texts, first = np.empty(len(drawn), object), 0
    for chunk in data.timelines.chunks():
        written = rows(chunk)
        here = np.flatnonzero((drawn >= first) & (drawn < first + len(written)))
        texts[here] = column[written[drawn[here] - first]]
        first += len(written)
    return texts.tolist()


def catalogue_lines(timelines: Timelines) -> list[str]:
    """Return one line of text per item: its title, then its genres where it has any."""
    catalogue = timelines.catalogue
    lines = []
    for item in range(1, len(catalogue.titles)):
        bags = [", ".join(catalogue.vocab[name][i] for i in bag[item] if i) for name, bag in sorted(catalogue.multi.items())]
        lines.append(" | ".join(filter(None, [catalogue.titles[item], *bags])) + "\n")
    return lines
