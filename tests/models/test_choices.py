"""What a title can go on with, and the loss over it beside beam search and beside all titles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from user_llm.models import choices as module
from user_llm.models.beam_search import beam_search
from user_llm.models.choices import Choices
from user_llm.models.trie import Trie
from user_llm.nn.columns import unpacked
from user_llm.nn.losses import chunked_cross_entropy

END = 2
#        0
#      / | \
#     3  4  5
#    /|  |  |\\
#   5 E  E  6 7 E
#   |       | |
#   E       E E
TITLES = {7: [3, 5, END], 9: [4, END], 8: [3, END], 1: [5, 6, END], 2: [5, 7, END], 3: [5, END]}


@pytest.mark.parametrize("listed", [2, 64], ids=["masks", "lists"])
def test_choices_by_hand(monkeypatch, listed):
    """The root has three children, 3 has two and 5 has three; 4, 5 behind 3, 6 and 7 have no choice."""
    monkeypatch.setattr(module, "LISTED", listed)
    choices = Choices.build(Trie.build(TITLES), 9, max_title_tokens=5)
    kept = {-1: None} | {0: set(range(9))}
    kept |= {n: set(np.flatnonzero(mask).tolist()) for n, mask in enumerate(unpacked(jnp.asarray(choices.masks), 9))}
    lists = np.split(choices.listed, choices.first[1:-1]) if len(choices.first) > 1 else []
    kept |= {n: set(tokens.tolist()) for n, tokens in enumerate(lists, len(choices.masks))}
    assert len(choices.masks) == (3 if listed == 2 else 1)
    root, three, five = {3, 4, 5}, {5, END}, {6, 7, END}
    expected = {7: [root, three, None], 9: [root, None, None], 8: [root, three, None]} | dict.fromkeys(
        (1, 2, 3), [root, five, None]
    )
    assert {item: [kept[n] for n in choices.of_title[item]] for item in TITLES} == expected


def test_a_title_that_training_cuts_does_not_train_its_end():
    """Of [5, 6, END] and the like one token is read, and the END that stands behind it then is no end of this title."""
    cut, whole = (Choices.build(Trie.build(TITLES), 9, most).of_title for most in (1, 2))
    assert cut[[7, 1, 2], 1].tolist() == [-1] * 3 and (cut[[8, 3], 1] > 0).all()
    assert cut.shape == (10, 2) and whole[1, 1] == cut[3, 1]


def test_the_places_of_several_titles_in_a_row():
    """A prompt of two tokens, item 7, item 0 that is no item, and then item 3 from place 6 on; a second row holds nothing."""
    choices = Choices.build(Trie.build(TITLES), 9, max_title_tokens=5)
    found = choices.at(np.array([[1, 6, 0], [0, 0, 0]]), np.array([[7, 3, 0], [0, 0, 0]]), 10).sets
    a, b, c = choices.of_title[7]
    d, e, f = choices.of_title[3]
    np.testing.assert_array_equal(found, [[-1, a, b, c, -1, -1, d, e, f, -1], [-1] * 10])


@pytest.fixture(scope="module")
def titles(random_titles):
    return random_titles(25, seed=2, most=4) | {26: [9, 10, 11, 9, 10, END], 27: [9, 10, 11, 9, END]}


@pytest.fixture(scope="module")
def searched(tiny, titles):
    """Items and log-probabilities of all titles, by row."""
    search = beam_search(
        *tiny.model, tiny.padded, tiny.lengths, Trie.build(titles), beams=27, user=tiny.user, trie_softmax=True
    )
    return jax.device_get(search)


def test_the_probabilities_of_all_titles_sum_to_1(searched):
    np.testing.assert_allclose(np.exp(searched[1]).sum(1), 1, atol=1e-5)


def test_beam_search_gives_each_title_the_loss_that_training_gives_it(tiny, titles, searched):
    """And both are the product, token by token, of softmaxes over the tokens with which some title goes on."""
    choices = Choices.build(Trie.build(titles), tiny.vocab, max_title_tokens=8)
    table = jnp.eye(tiny.vocab)  # log-probabilities are their own logits
    loss = jax.jit(chunked_cross_entropy, static_argnums=5)
    for item, log_prob in zip(searched[0][0], searched[1][0], strict=True):
        title = titles[int(item)]
        logits = tiny.log_probs(0, title[:-1])
        by_hand = 0.0
        for place, token in enumerate(title):
            among = sorted({t[place] for t in titles.values() if t[:place] == title[:place] and len(t) > place})
            by_hand += logits[place, token] - np.logaddexp.reduce(logits[place, among])
        sets = choices.at(np.array([[0]]), np.array([[item]]), 8).sets[0]
        rows, targets = (np.pad(a, [(0, 8 - len(title))] + [(0, 0)] * (np.ndim(a) - 1)) for a in (logits, np.array(title)))
        trained = loss(rows, table, targets, (sets >= 0).astype(np.float32), choices.columns(sets), 4)
        np.testing.assert_allclose([log_prob, -trained], by_hand, atol=2e-5)


def test_a_chunk_of_rows_is_all_that_is_held(tiny):
    """Rows of 4,096 among a vocabulary of 4,096: their logits would be 64 MiB."""
    titles = {n: [*divmod(n, 50), 99] for n in range(1, 2000)}
    choices = Choices.build(Trie.build(titles), 4096, max_title_tokens=8)
    shapes = [((4096, 8), "f4"), ((4096, 8), "f4"), ((4096,), "i4"), ((4096,), "f4"), ((4096,), "i4")]

    def loss(hidden, table, targets, weights, sets):
        return chunked_cross_entropy(hidden, table, targets, weights, choices.columns(sets), 64)

    args = [jax.ShapeDtypeStruct(*like) for like in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 2**20


def test_likely_titles_share_what_a_title_goes_on_with():
    """By hand, for item 2, whose title is 5 7 END: of what begins with 5, items 3 and 1 have 0.3 and 0.1; nothing likely begins with 5 7."""
    choices = Choices.build(Trie.build(TITLES), 9, max_title_tokens=5)
    tokens, shares = choices.shares(
        np.array([2, 8]), np.array([[3, 7, 1], [7, 8, 9]]), np.array([[0.3, 0.6, 0.1], [0.5, 0.3, 0.2]])
    )
    assert tokens[0].tolist() == [[5, 3, 5], [END, 5, 6], [-1, END, END]]
    np.testing.assert_allclose(shares[0], [[0.3, 0.6, 0.1], [0.75, 0, 0.25], [0, 0, 0]], atol=1e-6)
    assert tokens[1, 1].tolist() == [5, END, END]
    np.testing.assert_allclose(shares[1], [[0.5, 0.3, 0.2], [0.625, 0.375, 0], [0, 0, 0]], atol=1e-6)


def test_titles_that_are_chosen_freely_have_set_0_up_to_the_next_title():
    choices = Choices.build(Trie.build(TITLES), 9, max_title_tokens=5)
    answers, items = np.array([[6, 1, 0]]), np.array([[3, 7, 0]])
    bound, found = (choices.at(answers, items, 10, freely) for freely in (None, np.array([[False, True, True]])))
    assert found.sets[0].tolist() == [-1, 0, 0, 0, 0, 0, *bound.sets[0, 6:].tolist()]
    assert found.answer[0].tolist() == [1] * 6 + [0] * 4 and found.into[0, 6:9].tolist() == [0, 1, 2]
