"""The loss of contextualization, for all tasks, strategies and ways in (sections 3 and 4 of the paper).

A batch has a row of text for each prompt, or packed rows of several (`data/packing.py`); the loss is the same.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from user_llm.models.choices import Choices
from user_llm.models.encoder import Encoded
from user_llm.models.user import Packed
from user_llm.models.user_llm import UserLLM
from user_llm.nn.losses import Whole, chunked_cross_entropy, whole_count
from user_llm.phases.pretrain_lm import text_loss
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
) -> tuple[Array, dict[str, Array]]:
    """Return the weighted sum of three losses.

    - `text`, weighted by the batch itself: cross entropy of what follows the first answer position. With `choices`, each token of a
      title is predicted among those that titles can go on with.
    - `catalogue`, where there are items to rank: their cross entropy at the answer positions.
    - `align`, with an encoder only: mean squared distance of the LLM's item query from the encoder's own, its last state: that of the
      last event, or of the mask token behind it. Both are in the space of the encoder's item vectors, by which the LLM ranks too. The
      pretrained encoder knows what every event taught it, and its state tells the LLM more than the one next item does. An encoder
      from scratch knows nothing, and `encoder_source` refuses to be drawn to it. A `residual` model ranks by the sum of both queries,
      and the distance is the length of what its LLM adds.

    `leading` tokens of each task's rows stand in front of a soft prompt, at most those before the first answer position.
    """
    task = task_of(batch)
    weight = batch["text_weight"][task]
    encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
    encoded = None
    if model.config.encoder is not None:
        events, ends = batch["events"], batch["prefix"]
        encoded = model.encode(events.reshape(-1, *events.shape[-2:]), ends.reshape(-1, ends.shape[-1]), key=encoder_key)
    tokens, hidden = _read(model, batch, encoded, leading[task], decoder_key)

    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    predicted, sets = predicted_tokens(batch, choices)
    among = None if choices is None or sets is None else choices.columns(sets.reshape(-1))
    weights = predicted.reshape(-1).astype(jnp.float32)
    token_loss = text_loss(model.decoder, rows, tokens[:, 1:].reshape(-1), weights, chunk, whole, among)
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


def predicted_tokens(batch: Batch, choices: Choices | None = None) -> tuple[Bool[Array, "R T"], Int[Array, "R T"] | None]:
    """Return which tokens the text loss asks for, by the place before each: those behind a prompt's first answer position.

    With `choices` and items to rank, tokens that alone can follow are not asked for, and the second array is the number of the set
    that each token is chosen from; otherwise it is None.
    """
    text = batch["text"].reshape(-1, batch["text"].shape[-1])
    if "predicted" in batch:
        predicted = batch["predicted"].reshape(text.shape)[:, :-1] > 0
    else:
        lengths, answers = (batch[k].reshape(len(text), -1) for k in ("text_lengths", "answers"))
        position = jnp.arange(text.shape[1] - 1)
        predicted = (position >= answers[:, :1]) & (position + 1 < lengths) & (answers[:, :1] > 0)
    if choices is None or "items" not in batch:
        return predicted, None
    answers = _places(batch)
    sets = choices.at(answers, batch["items"].reshape(answers.shape), text.size // len(answers)).reshape(text.shape)[:, :-1]
    return predicted & (sets >= 0), sets


def contextual_counts(batch: Batch, choices: Choices | None = None) -> dict[str, Array]:
    """Return by what the means of `contextual_loss` divide."""
    counts = {"tokens": predicted_tokens(batch, choices)[0].sum()}
    return counts | ({"items": (batch["items"] > 0).sum()} if "items" in batch else {})


def _places(batch: Batch) -> Int[Array, "G X"]:
    """Return the answer positions, X of each row of text (G rows), by their places in it.

    Of packed rows they are X of each bundle (G bundles), by their places in all rows of the bundle.
    """
    rows = batch["text"].size // batch["text"].shape[-1]
    return batch["answers"].reshape(len(batch["answers"]) if "segments" in batch else rows, -1)


def _ranking_losses(
    model: UserLLM, batch: Batch, hidden: Array, encoded: Encoded | None, chunk: int, whole: Whole | None
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of ranking the items at the answer positions, and the scalars to log, `align_loss` among them."""
    items = batch["items"]
    answers = _places(batch)
    places = hidden.reshape(len(answers), -1, hidden.shape[-1])
    query = model.item_query(jnp.take_along_axis(places, answers[..., None], axis=1))
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
