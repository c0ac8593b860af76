import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.generate import Trie, beam_search, generate
from user_llm.nn.attention import causal_mask
from user_llm.nn.cross_attention import CrossAttentionConfig, UserKV
from user_llm.nn.transformer import BlockConfig

VOCAB, END = 12, 2
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=2,
    block=BlockConfig(width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24),
    tie_embeddings=False,
    cross=CrossAttentionConfig(user_width=6, every=2, heads=2, head_dim=4),
)
# Prompts of mixed length, users with two, no and one token.
_rng = np.random.default_rng(0)
PROMPTS, LENGTHS = _rng.integers(3, VOCAB, (3, 5)), np.array([2, 5, 3])
K, V = _rng.normal(size=(2, 1, 3, 2, 2, 4)).astype(np.float32)
USER = UserKV(K, V, np.array([[True, True], [False, False], [True, False]]))


@pytest.fixture(scope="module")
def model(drawn):
    graphdef, params = drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(params=0)))
    return graphdef, params


@pytest.fixture(scope="module")
def log_probs(model):
    """Return score(row, continuation): log-probs [T, V] from the answer position on, by one full forward pass."""
    graphdef, params = model

    @jax.jit
    def forward(ids, length, user):
        decoder = trees.merge(graphdef, params)
        mask = causal_mask(jnp.arange(ids.shape[1])[None] < length)
        hidden, _ = decoder(decoder.embed_tokens(ids), mask=mask, positions=jnp.arange(ids.shape[1])[None], user=user)
        return jax.nn.log_softmax(decoder.logits(hidden))[0]

    def score(row, continuation):
        ids = [*PROMPTS[row, : LENGTHS[row]], *continuation]
        user = UserKV(USER.k[:, row : row + 1], USER.v[:, row : row + 1], USER.mask[row : row + 1])
        return np.asarray(forward(np.pad(ids, (0, 16 - len(ids)))[None], len(ids), user))[LENGTHS[row] - 1 :]

    return score


def _title_score(log_probs, row, title):
    return log_probs(row, title)[np.arange(len(title)), title].sum()


# --- greedy ---


def _greedy(log_probs, row, steps, eos):
    tokens = []
    for i in range(steps):
        tokens.append(int(log_probs(row, tokens)[i].argmax()))
        if tokens[-1] == eos:
            return tokens + [eos] * (steps - len(tokens))
    return tokens


def test_greedy_equals_argmax_of_full_forwards(model, log_probs):
    expected = [_greedy(log_probs, row, 8, None) for row in range(3)]
    tokens = generate(*model, PROMPTS, LENGTHS, max_tokens=8, eos_id=None, user=USER)
    np.testing.assert_array_equal(tokens, expected)

    # A token that some rows write early ends those rows and no others.
    eos = expected[0][2]
    stopped = [_greedy(log_probs, row, 8, eos) for row in range(3)]
    np.testing.assert_array_equal(generate(*model, PROMPTS, LENGTHS, max_tokens=8, eos_id=eos, user=USER), stopped)


def test_what_pads_a_prompt_and_whether_it_came_as_embeddings_changes_nothing(model):
    expected = generate(*model, PROMPTS, LENGTHS, max_tokens=8, eos_id=None, user=USER)
    padded = np.where(np.arange(9) < LENGTHS[:, None], np.pad(PROMPTS, ((0, 0), (0, 4))), 1)
    for prompts in (padded, np.asarray(model[1]["embed"])[padded]):
        tokens = generate(*model, prompts, LENGTHS, max_tokens=8, eos_id=None, user=USER)
        np.testing.assert_array_equal(tokens, expected)


def test_the_user_matters(model):
    trie = Trie.build({1: [3, END]})
    scores = [
        np.asarray(beam_search(*model, PROMPTS, LENGTHS, trie, beams=1, user=user)[1])
        for user in (USER, USER._replace(v=-USER.v))
    ]
    moved = np.abs(scores[0] - scores[1])[:, 0] > 1e-3
    np.testing.assert_array_equal(moved, [True, False, True])  # the second row's user is empty


# --- the trie ---


def test_trie_by_hand():
    #        0
    #      /   \
    #     3     4        level 1: nodes 1, 2
    #    / \     \
    #   5   END   END    level 2: nodes 4, 3 (END = 2 sorts first), 5
    #   |
    #   END              level 3: node 6
    trie = Trie.build({7: [3, 5, END], 9: [4, END], 8: [3, END]})
    np.testing.assert_array_equal(trie.first, [1, 3, 5, 6, 6, 7, 7, 7])
    np.testing.assert_array_equal(trie.token, [0, 3, 4, END, 5, END, END])
    np.testing.assert_array_equal(trie.item, [0, 0, 0, 8, 0, 9, 7])
    assert (trie.depth, trie.root_fanout, trie.fanout) == (3, 2, 2)


def _random_titles(count, seed, most=6):
    """Distinct titles over few tokens, so that many share prefixes; item ids are out of order."""
    rng, titles = np.random.default_rng(seed), set()
    while len(titles) < count:
        titles.add((*rng.integers(3, 7, rng.integers(0, most)).tolist(), END))
    ids = rng.permutation(np.arange(1, count + 1)).tolist()
    return dict(zip(ids, map(list, sorted(titles)), strict=True))


def test_every_title_and_nothing_else_is_in_the_trie():
    titles = _random_titles(200, seed=1)
    trie = Trie.build(titles)
    first, token, item = map(np.asarray, (trie.first, trie.token, trie.item))

    def walk(node, tokens):
        if item[node]:
            yield int(item[node]), tokens
        for child in range(first[node], first[node + 1]):
            yield from walk(child, [*tokens, int(token[child])])

    assert dict(walk(0, [])) == titles
    assert len(token) == 1 + len({tuple(t[: i + 1]) for t in titles.values() for i in range(len(t))})


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        ({}, "at least one title"),
        ({0: [3, END]}, "item ids from 1"),
        ({4: [3, END], 6: [5, END], 5: [3, END]}, "Items 4 and 5 have the same title"),
        ({4: [3, END], 5: [3, 4]}, "title of item 5 must end in the end token 2"),
        ({4: [3, END], 5: [3, END, 4, END]}, "title of item 5 must end"),
        ({4: [3, END], 5: []}, "title of item 5 must end"),
        ({4: [], 5: [3, END]}, "must end in the end token"),
    ],
)
def test_titles_that_make_no_trie_are_refused(titles, message):
    with pytest.raises(ValueError, match=message):
        Trie.build(titles)


# --- beam search ---


def test_as_many_beams_as_titles_is_exhaustive_scoring(model, log_probs):
    titles = _random_titles(25, seed=2, most=4) | {26: [9, 10, 11, 9, 10, END], 27: [9, 10, 11, 9, END]}
    items, scores = beam_search(*model, PROMPTS, LENGTHS, Trie.build(titles), beams=30, user=USER)
    for row in range(3):
        expected = {item: _title_score(log_probs, row, title) for item, title in titles.items()}
        ranked = sorted(expected, key=expected.get, reverse=True)
        assert items[row, :27].tolist() == ranked
        np.testing.assert_allclose(scores[row, :27], [expected[item] for item in ranked], atol=2e-5)
        # There are more beams than titles.
        assert (items[row, 27:] == 0).all() and (scores[row, 27:] == -np.inf).all()


def _beam_search_by_hand(log_probs, row, titles, beams):
    live = [(0.0, ())]
    while any(tokens[-1:] != (END,) for _, tokens in live):
        candidates = []
        for score, tokens in live:
            if tokens[-1:] == (END,):
                candidates.append((score, tokens))
                continue
            step = log_probs(row, tokens)[len(tokens)]
            allowed = {t[len(tokens)] for t in titles.values() if tuple(t[: len(tokens)]) == tokens}
            candidates += [(score + step[token], (*tokens, token)) for token in allowed]
        live = sorted(candidates, reverse=True)[:beams]
    item = {tuple(title): item for item, title in titles.items()}
    return [item[tokens] for _, tokens in live], [score for score, _ in live]


def test_few_beams_equal_a_beam_search_by_hand(model, log_probs):
    titles = _random_titles(60, seed=3)
    items, scores = beam_search(*model, PROMPTS, LENGTHS, Trie.build(titles), beams=4, user=USER)
    for row in range(3):
        expected_items, expected_scores = _beam_search_by_hand(log_probs, row, titles, 4)
        assert items[row].tolist() == expected_items
        np.testing.assert_allclose(scores[row], expected_scores, atol=2e-5)
