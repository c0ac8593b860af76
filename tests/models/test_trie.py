import numpy as np
import pytest

from user_llm.models.trie import Trie

END = 2


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
    np.testing.assert_array_equal(trie.parent, [0, 0, 0, 1, 1, 2, 4])
    assert (trie.depth, trie.root_fanout, trie.fanout, trie.levels) == (3, 2, 2, (0, 1, 3, 6, 7))
    scores = np.array(
        [[9, 9, 9, 9, 9, 9, 9, 2, -1, 1], [9, 9, 9, 9, 9, 9, 9, -3, -np.inf, -4]], np.float32
    )  # of item ids 0 to 9
    np.testing.assert_array_equal(trie.best_below(scores), [[2, 2, 1, -1, 2, 1, 2], [-3, -3, -4, -np.inf, -3, -4, -3]])


def test_every_title_and_nothing_else_is_in_the_trie(random_titles):
    titles = random_titles(200, seed=1)
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
