"""The loss of contextualization, for all tasks, strategies and ways in (sections 3 and 4 of the paper).

A batch has a row of text for each prompt, or packed rows of several (`data/packing.py`); the loss is the same.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from user_llm.models.choices import Choices
from user_llm.models.encoder import Encoded
from user_llm.models.user import Packed
from user_llm.models.user_llm import UserLLM
from user_llm.nn.columns import Targets
from user_llm.nn.losses import Whole, chunked_cross_entropy, whole_count
from user_llm.phases.pretrain_lm import text_loss
from user_llm.phases.title_loss import places, predicted_tokens, taught_targets
from user_llm.training.task import Batch


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
    teacher: float = 0.0,
    all_words: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Return the weighted sum of three losses.

    - `text`, weighted by the batch itself: cross entropy of what follows the first answer position. With `choices`, each token of a
      title is predicted among those that titles can go on with, and `teacher` and `all_words` are shares as in `title_loss.py`;
      without an encoder there is no teacher.
    - `catalogue`, where there are items to rank: their cross entropy at the answer positions.
    - `align`, with an encoder only: mean squared distance of the LLM's item query from the encoder's own, its last state: that of the
      last event, or of the mask token behind it. Both are in the space of the encoder's item vectors, by which the LLM ranks too. The
      pretrained encoder knows what every event taught it, and its state tells the LLM more than the one next item does. An encoder
      from scratch knows nothing, and a config that draws the LLM to it is refused. A `residual` model ranks by the sum of both queries,
      and the distance is the length of what its LLM adds.

    `leading` tokens of each task's rows stand in front of a soft prompt, at most those before the first answer position.
    """
    task = task_of(batch)
    weight = batch["text_weight"][task]
    encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
    encoded = None if model.config.encoder is None else _encode(model, batch, encoder_key)
    tokens, hidden = _read(model, batch, encoded, leading[task], decoder_key)

    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    predicted, where = predicted_tokens(batch, choices, all_words)
    asked, weights, among = tokens[:, 1:].reshape(-1), predicted.reshape(-1).astype(jnp.float32), None
    targets: Array | Targets = asked
    if choices is not None and where is not None:
        among = choices.columns(where.sets.reshape(-1))
        if teacher and encoded is not None:
            # The teacher knows the whole histories: dropout would make it another one at each step.
            knowing = encoded if encoder_key is None else jax.lax.stop_gradient(_encode(model, batch, None))
            targets = taught_targets(model, knowing, batch, choices, where, asked, teacher=teacher, chunk=chunk)
    token_loss = text_loss(model.decoder, rows, targets, weights, chunk, whole, among)
    total, scalars = weight[0] * token_loss, {f"{task}/text_loss": token_loss}
    if "items" in batch:
        ranked, found = _ranking_losses(model, batch, hidden, encoded, chunk, whole)
        scalars |= found
        total = catalogue * ranked + total + (align * found["align_loss"] if encoded is not None else 0.0)
    if model.config.decoder.cross is not None:
        gates = jnp.tanh(model.decoder.stack.cross.gate[...])
        scalars |= {f"gate/{layer}": gates[layer] for layer in range(gates.shape[0])}
    return total, scalars


def task_of(batch: Batch) -> str:
    """Return the task whose prompts a batch holds."""
    (task,) = batch["text_weight"]
    return task


def _encode(model: UserLLM, batch: Batch, key: Array | None) -> Encoded:
    """Return the histories of a batch as the encoder reads them."""
    events, ends = batch["events"], batch["prefix"]
    return model.encode(events.reshape(-1, *events.shape[-2:]), ends.reshape(-1, ends.shape[-1]), key=key)


def _read(
    model: UserLLM, batch: Batch, encoded: Encoded | None, leading: int, key: Array | None
) -> tuple[Int[Array, "R T"], Float[Array, "R T D"]]:
    """Return the tokens of all rows of text and the LLM's hidden states at them."""
    rows = lambda name: batch[name].reshape(-1, batch[name].shape[-1])  # noqa: E731
    tokens = rows("text")
    if "segments" in batch:
        user = None if encoded is None else model.user(encoded, batch["users"].reshape(len(batch["users"]), -1))
        text = Packed(tokens, rows("segments"), rows("positions"))
        return tokens, model.packed(text, user=user, leading=leading, key=key)
    user = None if encoded is None else model.user(encoded)
    return tokens, model.hidden(tokens, batch["text_lengths"].reshape(-1), user=user, leading=leading, key=key)


def contextual_counts(batch: Batch, choices: Choices | None = None, all_words: float = 0.0) -> dict[str, Array]:
    """Return by what the means of `contextual_loss` divide."""
    counts = {"tokens": predicted_tokens(batch, choices, all_words)[0].sum()}
    return counts | ({"items": (batch["items"] > 0).sum()} if "items" in batch else {})


def _ranking_losses(
    model: UserLLM, batch: Batch, hidden: Array, encoded: Encoded | None, chunk: int, whole: Whole | None
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of ranking the items at the answer positions, and the scalars to log, `align_loss` among them."""
    items = batch["items"]
    answers = places(batch)
    states = hidden.reshape(len(answers), -1, hidden.shape[-1])
    query = model.item_query(jnp.take_along_axis(states, answers[..., None], axis=1))
    query = query.reshape(-1, query.shape[-1])
    wanted = (items > 0).reshape(-1).astype(jnp.float32)
    wanted /= whole_count(wanted, whole, "items")
    scalars = {}
    if encoded is not None:
        events = (batch["prefix"] > 0).reshape(-1)
        last = encoded.last().reshape(query.shape)
        apart = query if model.config.residual else query - jax.lax.stop_gradient(last)
        scalars["align_loss"] = jnp.sum(wanted * events * jnp.mean(jnp.square(apart), axis=-1))
        if model.config.residual:
            query += jnp.where(events[:, None], last, 0)
    item_loss = chunked_cross_entropy(query, model.item_table, items.reshape(-1), wanted, model.valid_items(), chunk)
    return item_loss, {"item_loss": item_loss} | scalars
