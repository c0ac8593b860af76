"""Phase 0, where no open checkpoint is given: train a small decoder LLM on the catalogue's titles and genres.

It is no substitute for a real LLM; it makes the whole method run from nothing, and gives the text-prompt baselines and User-LLM
one decoder that knows how titles are written.
"""

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.trees import Params
from user_llm.config.phases import PretrainLM
from user_llm.data.dataset import Dataset
from user_llm.data.pipeline import packed_text
from user_llm.models.decoder import Decoder
from user_llm.nn.columns import Columns, Targets
from user_llm.nn.losses import Whole, chunked_cross_entropy, whole_count
from user_llm.nn.visibility import segment_mask
from user_llm.phases.llm import corpus, decoder_config, tokenizer
from user_llm.phases.run import Run
from user_llm.training.task import Batch, Task


def text_loss(
    decoder: Decoder,
    hidden: Array,
    tokens: Array | Targets,
    weights: Array,
    chunk: int,
    whole: Whole | None = None,
    among: Columns | None = None,
) -> Array:
    """Return the mean cross entropy of predicting `tokens` [R] from `hidden` [R, D], over rows of weight 1; `tokens` counts them.

    Args:
      among: the tokens that each row's softmax is over; None for the whole vocabulary.
    """
    table = decoder.output_table()
    valid = jnp.ones(table.shape[0], bool) if among is None else among
    total = chunked_cross_entropy(decoder.readout(hidden), table, tokens, weights, valid, chunk, decoder.config.logit_softcap)
    return total / whole_count(weights, whole, "tokens")


def lm_loss(
    decoder: Decoder, batch: Batch, key: Array | None, chunk: int, whole: Whole | None = None
) -> tuple[Array, dict[str, Array]]:
    """Return the mean cross entropy of each next token within its line."""
    hidden, _ = decoder(
        decoder.embed_tokens(batch["tokens"]), mask=segment_mask(batch["segments"]), positions=batch["positions"], key=key
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    weights = (batch["segments"] > 0).reshape(-1).astype(jnp.float32)
    return text_loss(decoder, rows, batch["next"].reshape(-1), weights, chunk, whole), {}


def build(name: str, run: Run, data: Dataset) -> Task:
    """Build the task; a twentieth of the lines, chosen by seed, is held out for validation."""
    phase, words = run.config.sections[name], tokenizer(run, data)
    assert isinstance(phase, PretrainLM)
    lines = words.encode_all(corpus(data, run.seed))
    if len(lines) < 2:
        raise ValueError(f"a catalogue of {len(lines)} titles is too small: one line trains and another validates.")
    rng = np.random.default_rng(run.seed)
    held_out = rng.random(len(lines)) < 0.05
    held_out[int(rng.integers(len(lines)))] |= not held_out.any()
    start = [] if words.bos_id is None else [words.bos_id]
    lines = [np.array([*start, *line], np.int32) for line in lines]
    train_lines, held_lines = (
        [line for line, out in zip(lines, held_out, strict=True) if out == part] for part in (False, True)
    )
    model_config = decoder_config(run, words.vocab_size)
    create = lambda: Decoder(model_config, rngs=nnx.Rngs(params=run.seed))  # noqa: E731
    graphdef, shapes = trees.abstract(create)

    def stream(lines: list[np.ndarray], number: tuple[int, int], rows: int) -> grain.IterDataset:
        return packed_text(lines, rows=rows, row_length=phase.batch.row_length, seed=run.seed, stream=number)

    def loss(params: Params, batch: Batch, key: Array | None, whole: Whole | None = None):
        return lm_loss(trees.merge(graphdef, params), batch, key, phase.loss.chunk, whole)

    validation_loss = jax.jit(lambda params, batch: loss(params, batch, None)[0])

    def evaluate(params: Params) -> dict[str, float]:
        held = iter(stream(held_lines, (0, 1), phase.batch.rows))
        batches = (meshes.put_rows(next(held), run.mesh) for _ in range(phase.eval.batches))
        losses = [float(validation_loss(params, batch)) for batch in batches]
        return {"loss": float(np.mean(losses)), "perplexity": float(np.exp(np.mean(losses)))}

    return Task(
        name=name,
        shapes=shapes,
        load=((r".*", "fresh"),),
        init=lambda place: trees.init(create, place),
        loss=loss,
        counts=lambda batch: {"tokens": (batch["segments"] > 0).sum()},
        train_data=run.streams(lambda number, rows: stream(train_lines, number, rows), phase.batch.rows),
        steps_per_epoch=sum(map(len, train_lines)) / (phase.batch.rows * phase.batch.row_length),
        work=trees.count(shapes) * phase.batch.rows * phase.batch.row_length,
        count_events=lambda batch: int((batch["segments"] > 0).sum()),
        metrics=("loss", "perplexity"),
        check=lambda: None,  # `build` has looked at all that evaluation needs
        evaluate=evaluate,
        results=lambda params: [],
        programs=lambda params: {},
    )
