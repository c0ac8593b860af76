"""Soft prompts: where they stand by hand, and reading, writing and scoring behind them against full forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from user_llm.common import trees
from user_llm.models.beam_search import beam_search
from user_llm.models.generate import generate
from user_llm.models.score import score
from user_llm.models.trie import Trie
from user_llm.models.user import SoftPrompt, User, embed_prompts, hidden_states, insert
from user_llm.nn.visibility import causal_mask

LEADING = 1
_rng = np.random.default_rng(0)
# As `tiny.user`: two, no and one token; what is beyond them must not be seen.
PROMPT = SoftPrompt(_rng.normal(size=(3, 2, 16)).astype(np.float32), np.array([2, 0, 1]))


@pytest.mark.parametrize(
    ("leading", "expected"),
    [(2, ["abxyzcd.", "abxcd...", "abcd...."]), (0, ["xyzabcd.", "xabcd...", "abcd...."]), (4, ["abcdxyz.", "abcdx...", "abcd...."]),
     (np.array([2, 0, 4]), ["abxyzcd.", "xabcd...", "abcd...."])],
)  # fmt: skip
def test_a_soft_prompt_stands_behind_the_leading_tokens_and_the_text_goes_on_behind_it(leading, expected):
    letters = lambda rows: np.array([[[ord(c)] for c in row] for row in rows], np.float32)  # noqa: E731
    text, prompt = letters(["abcd."] * 3), SoftPrompt(letters(["xyz", "x??", "???"]), np.array([3, 1, 0]))
    rows, lengths, moved = insert(text, np.array([4, 4, 4]), prompt, leading)
    assert rows.shape == (3, 8, 1) and lengths.tolist() == [7, 5, 4]
    read = ["".join(chr(int(c)) for c in row[:length, 0]) for row, length in zip(rows, lengths, strict=True)]
    assert read == [row.rstrip(".") for row in expected]
    assert [[row.index(c) for c in "abcd"] for row in expected] == moved[:, :4].tolist()


def test_soft_prompts_of_other_rows_than_the_texts_are_refused():
    with pytest.raises(ValueError, match="Soft prompts of 3 users for 2 texts"):
        insert(np.zeros((2, 5, 16)), np.array([5, 5]), PROMPT, 0)


@pytest.fixture(scope="module")
def oracle(tiny):
    """Return `log_probs(row, continuation)` [T, V] from the answer position on, of a row put together by hand."""

    @jax.jit
    def forward(params, inputs, length, user):
        decoder = trees.merge(tiny.graphdef, params)
        mask = causal_mask(jnp.arange(inputs.shape[1])[None] < length)
        hidden, _ = decoder(inputs, mask=mask, positions=jnp.arange(inputs.shape[1])[None], user=user)
        return hidden[0], jax.nn.log_softmax(decoder.logits(hidden))[0]

    def read(row, continuation=()):
        embed = np.asarray(tiny.params["embed"])
        ids = np.array([*tiny.prompts[row], *continuation])
        parts = [embed[ids[:LEADING]], PROMPT.tokens[row, : PROMPT.lengths[row]], embed[ids[LEADING:]]]
        inputs = np.concatenate(parts)
        user = tiny.user._replace(k=tiny.user.k[:, [row]], v=tiny.user.v[:, [row]], mask=tiny.user.mask[[row]])
        padded = np.pad(inputs, ((0, 20 - len(inputs)), (0, 0)))[None]
        hidden, log_probs = map(np.asarray, forward(tiny.params, padded, len(inputs), user))
        begin = len(inputs) - len(continuation) - 1
        of_text = np.delete(hidden[: len(inputs)], np.s_[LEADING : LEADING + PROMPT.lengths[row]], axis=0)
        return of_text, log_probs[begin : len(inputs)]

    return read


@pytest.fixture(scope="module")
def prompts(tiny):
    """The prompts as embeddings, their lengths, and the user."""
    user = User(tiny.user, PROMPT)
    return *embed_prompts(*tiny.model, tiny.padded, tiny.lengths, user=user, leading=LEADING), user


def test_hidden_states_are_those_of_the_text(tiny, oracle):
    found = jax.jit(lambda p: hidden_states(
        trees.merge(tiny.graphdef, p), tiny.padded, tiny.lengths, user=User(tiny.user, PROMPT), leading=LEADING
    ))(tiny.params)  # fmt: skip
    assert found.shape == (*tiny.padded.shape, 16)
    for row, length in enumerate(tiny.lengths):
        np.testing.assert_allclose(found[row, :length], oracle(row)[0], atol=1e-5)


def test_greedy_behind_a_soft_prompt_equals_argmax_of_full_forwards(tiny, oracle, prompts):
    inputs, lengths, user = prompts
    written = generate(*tiny.model, inputs, lengths=lengths, max_tokens=6, user=user.kv).tokens
    for row in range(3):
        tokens = []
        for _ in range(6):
            tokens.append(int(oracle(row, tokens)[1][-1].argmax()))
        assert written[row].tolist() == tokens
    # The soft prompt had its say, but for the user who has none.
    inputs, lengths = embed_prompts(*tiny.model, tiny.padded, tiny.lengths)
    without = generate(*tiny.model, inputs, lengths=lengths, max_tokens=6, user=tiny.user).tokens
    assert (written != without).any(1).tolist() == [True, False, True]


@pytest.mark.slow
def test_beams_and_scores_behind_a_soft_prompt_equal_full_forwards(tiny, oracle, prompts, random_titles):
    inputs, lengths, user = prompts
    titles = random_titles(6, seed=1)
    expected = np.array([[_sum(oracle(row, titles[item])[1], titles[item]) for item in sorted(titles)] for row in range(3)])
    items, scores = beam_search(*tiny.model, inputs, lengths, Trie.build(titles), beams=6, user=user.kv)
    np.testing.assert_array_equal(items, 1 + np.argsort(-expected, axis=1))
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1), atol=1e-4)
    candidates = [[titles[item] for item in sorted(titles)]] * 3
    np.testing.assert_allclose(score(*tiny.model, inputs, candidates, lengths=lengths, user=user.kv), expected, atol=1e-4)


def _sum(log_probs, tokens):
    return sum(float(row[token]) for row, token in zip(log_probs, tokens, strict=False))
