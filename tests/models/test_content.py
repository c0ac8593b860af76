"""The regression that places items by what they are, against answers by hand."""

import numpy as np
import pytest

from user_llm.data.timelines import Catalogue
from user_llm.models import content
from user_llm.models.content import Content, contents


def catalogue(titles: list[str], genres: list[int]) -> Catalogue:
    bag = np.array([0, *genres], np.int32)[:, None]
    return Catalogue(["", *titles], ["", *titles], {"genres": bag}, {"genres": ["", "Crime", "Space"]})


def test_contents_are_categories_and_words():
    """Of any case, each word once; two items of the same words and categories are the same."""
    found = contents(catalogue(["Heat heat", "HEAT!", "Alien", "heat"], [1, 1, 0, 2])).toarray()
    np.testing.assert_array_equal(found[1], found[2])
    assert found.max() == 1 and (found.sum(1) == [1, 3, 3, 2, 3]).all() and (found[:, 0] == 1).all()
    np.testing.assert_array_equal(
        contents(catalogue(["a", "b"], [1, 2]), 2).toarray(), contents(catalogue(["a", "b"], [1, 2])).toarray()[2:]
    )


def test_a_new_item_lies_where_items_of_its_category_lie():
    """With many items of each category, a placed item is LENGTH times the vector of its category's items."""
    genres = [1, 2] * 200
    known = catalogue([f"t{n}" for n in range(400)], genres)
    table = np.array([[0.0, 0.0], *([2.0, 0.0] if genre == 1 else [0.0, 4.0] for genre in genres)])
    fitted = Content.fit(known, table, np.array([0, *[10_000] * 400]))
    grown = catalogue([*known.titles[1:], "unheard", "of"], [*genres, 1, 2])
    placed = fitted.place(grown, 401)
    np.testing.assert_allclose(placed, content.LENGTH * np.array([[2, 0], [0, 4]]), atol=0.15)


def test_items_without_events_say_nothing(monkeypatch):
    known = catalogue(["a", "b", "c"], [1, 2, 0])
    table, counts = np.array([[0, 0], [1, 0], [0, 1], [7, 7]], float), np.array([0, 5, 5, 0])
    weights = Content.fit(known, table, counts).weights
    table[3] = 99
    np.testing.assert_array_equal(Content.fit(known, table, counts).weights, weights)
    with pytest.raises(ValueError, match="No item of the model has events in training"):
        Content.fit(known, table, np.zeros(4, int))
    monkeypatch.setattr(content, "COLUMNS", 2)  # the commonest: of all items, and the first of those that one item has
    assert len(Content.fit(known, table, counts).columns) == 2
