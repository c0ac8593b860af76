"""What a schema accepts and which columns its features take."""

import pytest

from user_llm.data.schema import Feature, Schema

ITEM = Feature("item", "item", 101)
GENRES = Feature("genres", "multi", 20, 4)
GAP = Feature("gap", "time", 28)


def test_columns_follow_one_another_by_width():
    schema = Schema((ITEM, GENRES, GAP))
    assert [schema.columns(name) for name in schema.names] == [slice(0, 1), slice(1, 5), slice(5, 6)]
    assert schema.width == 6
    assert schema.num_items == 100
    assert list(schema) == [ITEM, GENRES, GAP]
    assert schema["genres"] is GENRES


def test_unknown_feature_is_named_with_what_there_is():
    with pytest.raises(ValueError, match="'brand'.* item, gap"):
        Schema((ITEM, GAP))["brand"]


@pytest.mark.parametrize("features", [(), (GAP,), (GAP, ITEM), (ITEM, Feature("other", "item", 5))])
def test_one_item_comes_first(features):
    with pytest.raises(ValueError, match="starts with its one item"):
        Schema(features)


def test_names_differ():
    with pytest.raises(ValueError, match="must differ"):
        Schema((ITEM, GAP, Feature("gap", "categorical", 3)))


@pytest.mark.parametrize(
    ("kind", "size", "width", "words"),
    [("item", 1, 1, "besides PAD"), ("multi", 5, 0, "one column"), ("ordinal", 5, 2, "has one column, not 2")],
)
def test_impossible_features_are_refused(kind, size, width, words):
    with pytest.raises(ValueError, match=words):
        Feature("f", kind, size, width)
