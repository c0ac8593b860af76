import re

import jax
import numpy as np
import pytest

from user_llm.models import score as module
from user_llm.models.beam_search import beam_generate
from user_llm.models.score import score

_rng = np.random.default_rng(4)
CANDIDATES = [
    [_rng.integers(1, 12, length).tolist() for length in row] for row in ((1, 4, 2, 10, 3), (6, 1, 5, 1, 2), (3, 3, 9, 1, 7))
]


def _expected(tiny, candidates):
    def one(row, text):
        return tiny.log_probs(row, text[:-1])[np.arange(len(text)), text].sum()

    return [[one(row, text) for text in texts] for row, texts in enumerate(candidates)]


def test_scores_equal_a_full_forward_for_each_prompt_and_candidate(tiny):
    scores = score(*tiny.model, tiny.prompts, CANDIDATES, user=tiny.user)
    np.testing.assert_allclose(scores, _expected(tiny, CANDIDATES), atol=2e-5)
    in_pieces = score(*tiny.model, tiny.prompts, CANDIDATES, user=tiny.user, chunk=2)
    np.testing.assert_allclose(in_pieces, scores, atol=2e-5)


def test_single_tokens_are_read_off_the_prompt(tiny):
    candidates = [[[token] for token in range(tiny.vocab)]] * 3
    scores = score(*tiny.model, tiny.prompts, candidates, user=tiny.user, chunk=5)
    np.testing.assert_allclose(scores, [tiny.log_probs(row, [])[-1] for row in range(3)], atol=2e-5)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1.0, atol=1e-5)


def test_prompts_may_come_as_embeddings(tiny):
    expected = score(*tiny.model, tiny.prompts, CANDIDATES, user=tiny.user)
    embedded = np.asarray(tiny.params["embed"])[tiny.padded]
    np.testing.assert_array_equal(score(*tiny.model, embedded, CANDIDATES, lengths=tiny.lengths, user=tiny.user), expected)


def test_an_empty_user_is_no_user_bit_for_bit(tiny):
    with_users, without = (score(*tiny.model, tiny.prompts, CANDIDATES, user=user) for user in (tiny.user, None))
    np.testing.assert_array_equal(with_users[1], without[1])
    assert (np.abs(with_users - without)[[0, 2]] > 1e-3).all()


@pytest.mark.slow
def test_beams_score_their_texts_alike(tiny):
    found = beam_generate(*tiny.model, tiny.prompts, beams=3, max_tokens=6, stop_ids=[4], length_penalty=0.0, user=tiny.user)
    texts = [[text[:n].tolist() for text, n in zip(*row, strict=True)] for row in zip(found.tokens, found.lengths, strict=True)]
    np.testing.assert_allclose(score(*tiny.model, tiny.prompts, texts, user=tiny.user), found.scores, atol=2e-5)


def test_logits_of_all_positions_are_never_in_memory(tiny):
    texts, sizes = np.zeros((3, 40, 9), np.int32), np.full((3, 40), 9)
    table = np.zeros((3, 64), np.int32)
    hidden, cache = jax.eval_shape(
        lambda params: module._read(tiny.graphdef, params, table, tiny.lengths, tiny.user, room=320), tiny.params
    )
    run = lambda params, hidden, cache: module._score(  # noqa: E731
        tiny.graphdef, params, hidden, cache, tiny.lengths, tiny.user, texts, sizes
    )
    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(run)(tiny.params, hidden, cache)))
    positions = [np.prod([int(n) for n in shape.split(",")[:-1]]) for shape in shapes if shape.endswith(f",{tiny.vocab}")]
    assert max(positions) == module.LOGIT_ROWS < 3 * 40 * 8


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([[[3]], [[3]]], "3 prompts need as many rows of candidates"),
        ([[[3]], [[3]], [[3], [4]]], "all of one length"),
        ([[], [], []], "all of one length"),
        ([[[3]], [[]], [[3]]], "empty candidate"),
    ],
)
def test_candidates_that_cannot_be_scored_are_refused(tiny, candidates, message):
    with pytest.raises(ValueError, match=message):
        score(*tiny.model, tiny.prompts, candidates)
