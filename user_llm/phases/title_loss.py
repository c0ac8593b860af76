"""Which tokens the text loss of contextualization asks for, and which distributions a title's tokens are trained towards.

With `choices` a title's token is chosen among those that some title goes on with. Two things are added to it:

- A share of the titles, `all_words`, is asked for among all words, with the tokens that alone can follow. Otherwise nothing would hold
  down the tokens that no title goes on with, and what the LLM writes freely would be no text.
- The encoder's item vectors tell which items are likely next. Each token of a title is trained towards the distribution of next tokens
  of the titles of the likeliest items, mixed with the one title that came next (`teacher`). The encoder reads without dropout here.
  So each target teaches a distribution of titles and not one of them, as in distillation (Hinton et al., arXiv 1503.02531).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.mesh import constrain
from user_llm.models.choices import Choices, Places
from user_llm.models.encoder import Encoded
from user_llm.models.user_llm import UserLLM
from user_llm.nn.columns import Targets
from user_llm.training.task import Batch

LIKELY = 256  # the likeliest items, whose titles are asked for


def places(batch: Batch) -> Int[Array, "G X"]:
    """Return the answer positions, X of each row of text (G rows), by their places in it.

    Of packed rows they are X of each bundle (G bundles), by their places in all rows of the bundle.
    """
    rows = batch["text"].size // batch["text"].shape[-1]
    return batch["answers"].reshape(len(batch["answers"]) if "segments" in batch else rows, -1)


def predicted_tokens(
    batch: Batch, choices: Choices | None = None, all_words: float = 0.0
) -> tuple[Bool[Array, "R T"], Places | None]:
    """Return which tokens the text loss asks for, by the place before each: those behind a prompt's first answer position.

    With `choices` and items to rank, tokens that alone can follow are not asked for, but in the titles that are asked for among all
    words, and where titles stand is returned; otherwise that is None.
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
    answers = places(batch)
    freely = _drawn(batch, all_words).reshape(answers.shape)
    found = choices.at(answers, batch["items"].reshape(answers.shape), text.size // len(answers), freely)
    found = Places(*(a.reshape(text.shape)[:, :-1] for a in found))
    return predicted & (found.sets >= 0), found


def _drawn(batch: Batch, share: float) -> Bool[Array, "*S J P"]:
    """Return a share of the titles of a batch: always the same by item, events before it, and place in the prompt, packed or not."""
    items, prefix = (jnp.asarray(batch[name], jnp.uint32) for name in ("items", "prefix"))
    place = jnp.arange(items.shape[-1], dtype=jnp.uint32)
    # Multiples by odd numbers, and a hash of 32 bits (C. Wellons' lowbias32).
    mixed = items * np.uint32(0x9E3779B1) + prefix[..., None] * np.uint32(0x85EBCA77) + place * np.uint32(0xC2B2AE3D)
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    return ((mixed ^ (mixed >> 16)) >> 8) < int(share * 2**24)


def taught_targets(
    model: UserLLM,
    encoded: Encoded,
    batch: Batch,
    choices: Choices,
    where: Places,
    tokens: Int[Array, " R"],
    *,
    teacher: float,
    chunk: int,
) -> Targets:
    """Return the targets of the tokens of rows of text: a share `teacher` is what the titles of the likeliest items go on with.

    The other share, and all of it where no likely title begins as the one that came next, is the token that came next.

    Args:
      encoded: the histories, of which each answer position has one end.
      where: of `predicted_tokens`, R places in all.
      tokens: the token that came next at each place.
      chunk: the items of so many answer positions are scored at a time.
    """
    table = jax.lax.stop_gradient(model.item_table)
    query = jax.lax.stop_gradient(encoded.last()).reshape(-1, table.shape[1])
    likely, probs = _likeliest(query, table, model.valid_items(), chunk)
    probs = probs * (batch["prefix"].reshape(-1, 1) > 0)  # without events nothing is known
    columns, shares = choices.shares(batch["items"].reshape(-1), likely, probs)
    answers = places(batch).shape[1]
    group = jnp.arange(where.answer.size // where.answer.shape[-1])  # of rows; several of a bundle
    number = (group // (len(group) * answers // len(likely)))[:, None] * answers + where.answer
    row = lambda a: a[number.reshape(-1), where.into.reshape(-1)]  # noqa: E731
    chosen = where.sets.reshape(-1, 1) > 0  # within the trie
    shares = jnp.where(chosen, teacher * row(shares), 0.0)
    return Targets(
        jnp.concatenate([jnp.where(chosen, row(columns), 0), tokens[:, None]], axis=1),
        jnp.concatenate([shares, 1 - shares.sum(1, keepdims=True)], axis=1),
    )


def _likeliest(
    query: Float[Array, "A D"], table: Float[Array, "V D"], valid: Bool[Array, " V"], chunk: int
) -> tuple[Int[Array, "A K"], Float[Array, "A K"]]:
    """Return the likeliest items and their probabilities among these, for each query."""

    def best(query):
        scores = jnp.einsum("AD,VD->AV", constrain(query, "rows", None), table, preferred_element_type=jnp.float32)
        found, item = jax.lax.top_k(jnp.where(valid, scores, -jnp.inf), min(LIKELY, len(table)))
        return item, jax.nn.softmax(found, axis=-1)

    if len(query) <= chunk:
        return best(query)
    parts = jnp.pad(query, ((0, -len(query) % chunk), (0, 0))).reshape(-1, chunk, query.shape[1])
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[: len(query)], jax.lax.map(best, parts))
