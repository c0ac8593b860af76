"""Items that are put behind those of a catalogue: titles, categories and numbers by hand."""

import numpy as np
import pytest

from user_llm.data.new_items import extended, rows_of
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import Catalogue

CATALOGUE = Catalogue(
    titles=["", "Heat", "Heat [2]", "Alien"],
    keys=["", "h", "h2", "a"],
    multi={"genres": np.array([[0, 0], [1, 2], [1, 0], [2, 0]], np.int32), "tags": np.zeros((4, 1), np.int32)},
    vocab={"genres": ["", "Crime", "Space"], "tags": ["", "old", "new"]},
)
SCHEMA = Schema((Feature("item", "item", 4), Feature("genres", "multi", 3, 2)))


def test_items_come_behind_by_hand():
    """A bag that is a feature keeps its width, another one grows; titles are one line, unique, and the id where there is none."""
    found = extended(
        CATALOGUE,
        [
            {"id": 7, "title": " Heat\n", "genres": ["Space", "Nothing", "Crime"], "tags": ["new", "old"]},
            {"id": "b", "tags": None},
            {"id": "7"},
            {"id": "a", "title": "Alien", "genres": ["Space"]},
            {"id": "h2", "title": "Heat"},
        ],
        SCHEMA,
    )
    assert found.keys == ["", "h", "h2", "a", "7", "b"] and found.titles[4:] == ["Heat [3]", "b"]
    assert found.multi["genres"].tolist() == [[0, 0], [1, 2], [1, 0], [2, 0], [2, 1], [0, 0]]
    assert found.multi["tags"][4:].tolist() == [[2, 1], [0, 0]] and not found.multi["tags"][:4].any()
    assert CATALOGUE.keys == ["", "h", "h2", "a"] and CATALOGUE.multi["tags"].shape == (4, 1)
    assert extended(CATALOGUE, rows_of(found, 4), SCHEMA).multi["tags"].tolist() == found.multi["tags"].tolist()
    assert rows_of(found, 5) == [{"id": "b", "title": "b", "genres": [], "tags": []}]
    assert extended(found, [{"id": "7", "title": "Heat"}, *rows_of(found, 1)], SCHEMA) is found


def test_more_categories_than_a_feature_has_columns_are_left_out():
    narrow = Schema((Feature("item", "item", 4), Feature("genres", "multi", 3, 1)))
    catalogue = Catalogue(
        CATALOGUE.titles, CATALOGUE.keys, {"genres": np.array([[0], [1], [1], [2]], np.int32)}, CATALOGUE.vocab
    )
    found = extended(catalogue, [{"id": "c", "genres": ["Space", "Crime"]}], narrow)
    assert found.multi["genres"].tolist()[4:] == [[2]]
    assert extended(found, [{"id": "c", "genres": ["Space", "Crime"]}], narrow) is found


@pytest.mark.parametrize("title", ["Alien 3", "Heat [3]", "heat"])
def test_a_changed_title_is_refused(title):
    with pytest.raises(ValueError, match=r"row 1: the item 'h' is there already, with the title 'Heat'"):
        extended(CATALOGUE, [{"id": "h", "title": title}], SCHEMA)
    with pytest.raises(ValueError, match="with the genres Crime, Space"):
        extended(CATALOGUE, [{"id": "h", "genres": ["Crime"]}], SCHEMA)
