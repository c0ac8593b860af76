"""Forgetting: the perplexity of an open LLM on general text, as it came (method `llm`) and as a phase left it.

`perplexity` is without a user, `perplexity/with_user` while it attends to users, another in each window of the text. Strategies
that freeze the LLM leave the first as it was; only the second can tell what their cross-attention does to it. With `llm.quantize` the
LLM as it came is the quantised one, so that what quantising costs is in both numbers, and their difference is of the training alone.
"""

import functools
from collections.abc import Callable
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.files import write_json
from user_llm.common.trees import Params
from user_llm.data.dataset import Dataset
from user_llm.data.tokenizer import Tokenizer
from user_llm.evals.ranking import result_rows
from user_llm.models import pretrained
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.user import User, hidden_states
from user_llm.phases.llm import decoder_config, tokenizer
from user_llm.phases.pretrain_lm import text_loss
from user_llm.phases.run import Run
from user_llm.training import loop
from user_llm.training.phases import RESULTS, has_results
from user_llm.training.task import Batch

CHUNK = 512  # rows of logits at a time


def read_windows(tokenizer: Tokenizer, *, file: str, windows: int, window: int) -> Batch:
    """Return the first windows of a text as rows, each read from the start token on; an incomplete last one is left out.

    Args:
      file: of UTF-8 text; empty for the one that comes along.
      windows: the most rows.
      window: tokens in each, besides the start token.

    Raises:
      ValueError: a file that cannot be read as UTF-8 text, or a text of less than one window.
    """
    source = epath.Path(file) if file else resources.files("user_llm.data") / "general.txt"
    try:
        ids = tokenizer.encode(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"general_text.file={file!r}: it cannot be read as UTF-8 text ({error}).") from error
    count = min(len(ids) // window, windows)
    if not count:
        raise ValueError(f"{source} holds {len(ids)} tokens, less than one window: set general_text.window below {window}.")
    rows = np.array(ids[: count * window], np.int32).reshape(count, -1)
    if tokenizer.bos_id is not None:
        rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.bos_id)
    return {"tokens": rows[:, :-1], "next": rows[:, 1:]}


def check_window(decoder: DecoderConfig, tokenizer: Tokenizer, window: int, soft: int = 0) -> None:
    """See that a decoder can read a window of general text.

    Args:
      window: tokens in it, besides the start token.
      soft: tokens of the soft prompt that is read with it.

    Raises:
      ValueError: the window is too long.
    """
    read = window - (tokenizer.bos_id is None)  # the last token is predicted and not read
    text = "a text, soft prompt included," if soft else "a text"
    decoder.check_length(read + soft, f"general_text.window: {text}")


@functools.partial(jax.jit, static_argnums=0)
def perplexity(graphdef: nnx.GraphDef, params: Params, batch: Batch, user: User | None = None) -> Array:
    """Return the perplexity of a decoder over all windows, with as many users if any; soft prompts follow the first token."""
    decoder, tokens = trees.merge(graphdef, params), batch["tokens"]
    hidden = hidden_states(decoder, tokens, jnp.full(len(tokens), tokens.shape[1]), user=user, leading=1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return jnp.exp(text_loss(decoder, rows, batch["next"].reshape(-1), jnp.ones(len(rows)), CHUNK))


def untouched(run: Run, data: Dataset) -> list[dict]:
    """Return the result row of the LLM as it came, measured once per run; with `llm.quantize`, that of the quantised LLM."""
    directory = run.workdir / "llm"
    if not has_results(directory):
        batch = read_windows(tokenizer(run, data), **vars(run.config.general_text))
        model = decoder_config(run, tokenizer(run, data).vocab_size)
        graphdef, shapes = trees.abstract(lambda: Decoder(model, rngs=nnx.Rngs(params=0)))
        rules = run.config.sections[run.config.phases[-1]].loop.sharding
        shapes = pretrained.in_stored_types(run.checkpoint, shapes, model, run.kinds.families)
        like = meshes.placed(shapes, meshes.shardings(rules, shapes, run.mesh))
        params = pretrained.load_decoder(run.checkpoint, model, like=like, families=run.kinds.families)
        found = {"perplexity": float(perplexity(graphdef, params, batch))}
        rows = result_rows(found, batch["next"].size, **run.row_facts("llm", data), task="general_text", method="llm")
        write_json(directory / RESULTS, rows)
        return rows
    return loop.read_rows(directory)


def tuned(
    name: str, run: Run, data: Dataset, method: str, graphdef: nnx.GraphDef, params: Params, users: Callable[[int], User | None]
) -> list[dict]:
    """Return the result rows of the decoder of phase `name`; `users` returns so many users, or None without an encoder."""
    batch = read_windows(tokenizer(run, data), **vars(run.config.general_text))
    found = {"perplexity": float(perplexity(graphdef, params, batch))}
    user = users(len(batch["tokens"]))
    if user is not None:
        found["perplexity/with_user"] = float(perplexity(graphdef, params, batch, user))
    return result_rows(found, batch["next"].size, **run.row_facts(name, data), task="general_text", method=method)
