"""Beam search: texts that end where they like, and the titles of a catalogue, which a trie holds.

Both are one loop over beams that lie side by side over one prompt (`models/prefill.py`); they differ in how the beams of a
step are extended. Left out: beams in groups, beams that are sampled.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from user_llm.common.arrays import AnyArray
from user_llm.common.mesh import fetch
from user_llm.common.trees import Params, merge
from user_llm.models.decoder import Decoder
from user_llm.models.prefill import Prompts, bucket, check_user, lane_mask, lane_positions, pad_prompts, prefill
from user_llm.models.trie import Trie
from user_llm.nn.cross_attention import UserKV


def _search(
    decoder: Decoder,
    prompts: AnyArray,
    lengths: Int[AnyArray, " B"],
    user: UserKV | None,
    *,
    beams: int,
    steps: int,
    start: Callable[[Array], tuple[Array, Array, Any]],
    extend: Callable[[Array, Any, Array], tuple[Array, Array, Any]],
    unfinished: Callable[[Array, Any], Array],
) -> Any:
    """Read and extend the beams of each row until they are finished; return their last state.

    Args:
      beams: of each row.
      steps: most calls of `extend`.
      start: from the first token's logits [B, V] to what `extend` returns.
      extend: from the tokens written so far, the state and the logits [B, beams, V] to the beam of origin and the last token
        of each beam, [B, beams], and the state.
      unfinished: from the tokens written so far and the state to whether to go on.
    """
    hidden, cache = prefill(decoder, prompts, lengths, user, steps * beams)
    batch, prompt_slots = prompts.shape[:2]
    lane, layers = jnp.arange(beams), decoder.stack.layers()
    key_positions = lane_positions(lengths, prompt_slots, steps, beams)

    def advance(carry):
        step, token, state, past, cache = carry
        past = past.at[:, :, step].set(lane)
        hidden, cache = decoder(
            decoder.embed_tokens(token),
            mask=lane_mask(lengths, prompt_slots, past, beams),
            positions=jnp.broadcast_to((lengths + step)[:, None], (batch, beams)),
            key_positions=key_positions,
            cache=cache,
            slots=jnp.broadcast_to(prompt_slots + step * beams + lane, (batch, beams)),
            user=user,
            layers=layers,
        )
        origin, token, state = extend(step + 1, state, decoder.logits(hidden))
        return step + 1, token, state, jnp.take_along_axis(past, origin[..., None], axis=1), cache

    _, token, state = start(decoder.logits(hidden))
    past = jnp.full((batch, beams, steps), -1, jnp.int32)
    carry = (jnp.int32(0), token, state, past, cache)
    return jax.lax.while_loop(lambda carry: unfinished(carry[0] + 1, carry[2]), advance, carry)[2]


class Hypotheses(NamedTuple):
    """The beams of each row, best first.

    Attributes:
      tokens: of each text, PAD (0) after its end.
      lengths: tokens of each text, the stop token included; 0 where there are fewer texts than beams.
      scores: sum of log-probs / length ** length_penalty; -inf where there is no text.
    """

    tokens: Int[Array | np.ndarray, "B beams T"]
    lengths: Int[Array | np.ndarray, "B beams"]
    scores: Float[Array | np.ndarray, "B beams"]


class _Texts(NamedTuple):
    """Texts that go on and texts that have ended, both best first, the latter -inf where there are too few.

    `closed` rows accept no more texts.
    """

    live: Int[Array, "B beams T"]
    live_score: Float[Array, "B beams"]
    done: Hypotheses
    closed: Bool[Array, " B"]


def _extend_texts(
    written: Int[AnyArray, ""],
    texts: _Texts,
    logits: Float[Array, "B beams V"],
    *,
    stop_ids: Int[AnyArray, " stops"],
    length_penalty: float | Float[Array, ""],
    max_tokens: int | Int[Array, ""],
) -> tuple[Int[Array, "B beams"], Int[Array, "B beams"], _Texts]:
    batch, beams, vocab = logits.shape
    total = (texts.live_score[..., None] + jax.nn.log_softmax(logits)).reshape(batch, -1)
    # So many that `beams` are left to go on even if all the others end.
    score, index = jax.lax.top_k(total, min(beams * (1 + len(stop_ids)), beams * vocab))
    origin, token = index // vocab, index % vocab
    tokens = jnp.take_along_axis(texts.live, origin[..., None], axis=1).at[:, :, written].set(token)
    stops = (token[..., None] == stop_ids).any(-1)
    length = written + 1
    penalty = length.astype(jnp.float32) ** length_penalty

    # A text ends only where it is among the best `beams` of its step.
    ends = (stops | (length == max_tokens)) & (jnp.arange(score.shape[1]) < beams) & ~texts.closed[:, None]
    ending = Hypotheses(tokens, jnp.full_like(token, length), jnp.where(ends, score / penalty, -jnp.inf))
    merged = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), texts.done, ending)
    done = _take(merged, jax.lax.top_k(merged.scores, beams)[1])

    live_score, best = jax.lax.top_k(jnp.where(stops, -jnp.inf, score), beams)
    origin, token, live = _take((origin, token, tokens), best)
    closed = texts.closed | (live_score[:, 0] / penalty <= done.scores[:, -1])
    return origin, token, _Texts(live, live_score, done, closed)


def _take(tree: Any, index: Int[AnyArray, "B beams"]) -> Any:
    """Gather along the second axis of all arrays."""
    return jax.tree.map(lambda a: jnp.take_along_axis(a, jnp.expand_dims(index, range(2, a.ndim)), axis=1), tree)


@functools.partial(jax.jit, static_argnames=("graphdef", "beams", "room"))
def _beam_texts(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: AnyArray,
    lengths: Int[AnyArray, " B"],
    user: UserKV | None,
    stop_ids: Int[AnyArray, " stops"],
    length_penalty: float | Float[Array, ""],
    max_tokens: int | Int[Array, ""],
    *,
    beams: int,
    room: int,
) -> Hypotheses:
    batch = prompts.shape[0]
    extend = functools.partial(_extend_texts, stop_ids=stop_ids, length_penalty=length_penalty, max_tokens=max_tokens)
    empty = jnp.zeros((batch, beams, room), jnp.int32)
    nothing = jnp.full((batch, beams), -jnp.inf)
    # All beams but one start impossible, or all would be the same.
    first = _Texts(
        live=empty,
        live_score=nothing.at[:, 0].set(0.0),
        done=Hypotheses(empty, jnp.zeros((batch, beams), jnp.int32), nothing),
        closed=jnp.zeros(batch, bool),
    )
    done = _search(
        merge(graphdef, params), prompts, lengths, user, beams=beams, steps=room,
        start=lambda logits: extend(jnp.int32(0), first, jnp.broadcast_to(logits[:, None], (batch, beams, logits.shape[-1]))),
        extend=extend,
        unfinished=lambda written, texts: (written < max_tokens) & ~texts.closed.all(),
    ).done  # fmt: skip
    real = done.scores > -jnp.inf
    return Hypotheses(jnp.where(real[..., None], done.tokens, 0), jnp.where(real, done.lengths, 0), done.scores)


def beam_generate(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Prompts,
    *,
    beams: int,
    max_tokens: int,
    lengths: Sequence[int] | Int[AnyArray, " B"] | None = None,
    stop_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
    user: UserKV | None = None,
) -> Hypotheses:
    """Continue each prompt by the `beams` best texts that beam search finds.

    This is `num_beams` of Hugging Face transformers, with its default early stopping: a text that ends with a stop token is
    set aside, `beams` others go on, and a row is closed when its worst text set aside is at least as good as the best that
    goes on, at its present length. A row that stops so has lost nothing at a `length_penalty` of 0 or below, where texts only
    grow worse; above, a text might have grown better. What still goes on at `max_tokens` ends there.

    Args:
      beams: texts of each row.
      length_penalty: exponent of the length that a text's log-prob is divided by; above 0 favours long texts.

    All other arguments and errors as in `generate`.
    """
    if beams < 1 or max_tokens < 1:
        raise ValueError(f"beams {beams} and max_tokens {max_tokens} must be at least 1.")
    table, sizes = pad_prompts(prompts, lengths, params["embed"].shape[0])
    check_user(user, len(sizes))
    merge(graphdef, params).config.check_length(int(sizes.max()) + max_tokens - 1)
    found = _beam_texts(
        graphdef, params, table, sizes, user, jnp.asarray(stop_ids, jnp.int32), length_penalty, max_tokens,
        beams=beams, room=bucket(max_tokens),
    )  # fmt: skip
    tokens, written, scores = fetch(found)
    return Hypotheses(tokens[..., :max_tokens], written, scores)


@functools.partial(jax.jit, static_argnames=("graphdef", "beams", "trie_softmax"))
def beam_search(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Int[AnyArray, "B T"] | Float[Array, "B T D"],
    lengths: Int[AnyArray, " B"],
    trie: Trie,
    *,
    beams: int,
    user: UserKV | None = None,
    trie_softmax: bool = False,
    guide: Float[Array, "#B V"] | None = None,
    weight: float | Float[Array, ""] = 0.0,
) -> tuple[Int[Array, "B beams"], Float[Array, "B beams"]]:
    """Return the best items of each row and their scores, best first; item 0 at -inf if too few.

    Without a guide the score of a title is its log-prob, the sum of its tokens'. With a guide, which scores items, the score of a
    title's beginning is (1 - weight) * its log-prob + weight * the guide's best score among the items whose titles begin so. With as
    many beams as titles the result is exact. With a weight of 1, n beams find the guide's n best items: at each step at most n
    beginnings lead to them, and no other beginning scores higher.

    Args:
      graphdef: of a `Decoder`.
      params: of the same.
      prompts: right-padded tokens, or embeddings where a prompt holds more than tokens.
      lengths: of the prompts, at least 1.
      trie: of the titles.
      beams: titles of each row.
      user: K/V of each row's user.
      trie_softmax: whether a token's softmax is over the tokens that some title goes on with, so that the probabilities of all titles sum
        to 1. Otherwise it is over the whole vocabulary, and the trie chooses what is scored and changes no score.
      guide: of each item, in a row for each prompt or in one row for all; an item of -inf is never written.
      weight: of the guide, from 0 to 1.
    """
    below = None if guide is None else trie.best_below(guide)

    def score(node, log_prob):
        if below is None:
            return log_prob
        best = jnp.take_along_axis(below, node.reshape(len(node), -1), axis=1).reshape(node.shape)
        # Where either is -inf, a weight of 0 would make no number of it.
        return jnp.where(jnp.minimum(log_prob, best) > -jnp.inf, (1 - weight) * log_prob + weight * best, -jnp.inf)

    def extend(_, state, logits, fanout=trie.fanout):
        node, written, _ = state
        child, log_prob = trie.expand(node, logits, fanout, among_children=trie_softmax)
        log_prob += written[..., None]
        origin, *state = _best(child, log_prob, score(child, log_prob), beams)
        return origin, trie.token[state[0]], tuple(state)

    root = tuple(jnp.zeros((prompts.shape[0], 1), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32))
    node, _, scores = _search(
        merge(graphdef, params), prompts, lengths, user, beams=beams, steps=trie.depth,
        start=lambda logits: extend(0, root, logits[:, None], trie.root_fanout),
        extend=extend,
        unfinished=lambda written, state: (written < trie.depth) & ((trie.item[state[0]] == 0) & (state[2] > -jnp.inf)).any(),
    )  # fmt: skip
    return jnp.where(scores > -jnp.inf, trie.item[node], 0), scores


def _best(
    child: Int[AnyArray, "B R C"], log_prob: Float[Array, "B R C"], score: Float[Array, "B R C"], beams: int
) -> tuple[Int[Array, "B beams"], Int[Array, "B beams"], Float[Array, "B beams"], Float[Array, "B beams"]]:
    """Return the beam of origin, node, log-prob and score of each row's best candidates, with -inf where there are too few."""
    batch, _, fanout = child.shape
    missing = ((0, 0), (0, max(beams - child[0].size, 0)))
    flat = lambda a, fill: jnp.pad(a.reshape(batch, -1), missing, constant_values=fill)  # noqa: E731
    score, index = jax.lax.top_k(flat(score, -jnp.inf), beams)
    node, log_prob = _take((flat(child, 0), flat(log_prob, -jnp.inf)), index)
    return index // fanout, node, log_prob, score
