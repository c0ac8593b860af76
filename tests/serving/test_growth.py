"""Items that are added to a trained model: encoded and recommended by what they are, saved, and refused where they are wrong."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_directories import seal, settings_of
from tiny_models import Made, variants

import user_llm
from user_llm.common import trees
from user_llm.common.mesh import fetch
from user_llm.models.item_rows import table_path
from user_llm.models.user_encoder import READ_SCALE
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.user import User

NEW = {"id": "new", "title": "A new film", "genres": ["Drama", "War"]}


@pytest.fixture
def known(make_model) -> Made:
    return make_model("cross")


@pytest.fixture
def old(known) -> Personalizer:
    return user_llm.load(known.directory)


def event(item: str, time: int) -> dict:
    return {"item": item, "rating": 5, "timestamp": time}


def table(model: Personalizer) -> tuple[str, np.ndarray]:
    path = table_path(model.predictor.config)
    return path, fetch(trees.flatten(model.predictor.params)[path]).copy()


def same_ranking(found, wanted) -> None:
    assert [item.id for item in found] == [item.id for item in wanted]
    np.testing.assert_allclose([item.score for item in found], [item.score for item in wanted], atol=1e-5)


@pytest.mark.parametrize("made", variants("cross", "written"), indirect=True)
def test_an_added_item_is_one_known_by_content_alone(made, model):
    """An item of the training that has the same row and categories is ranked and left out in the same way.

    It is encoded in the same way if its row is as long as events read that of an added item.
    """
    catalogue = model.vocabulary.catalogue
    genres = [catalogue.vocab["genres"][n] for n in catalogue.multi["genres"][3] if n]
    grown = model.add_items([{"id": "new", "title": "A new film", "genres": genres}])
    path, rows = table(grown)

    def with_row(row: np.ndarray) -> Personalizer:
        changed = rows.copy()
        changed[3] = row
        return dataclasses.replace(grown, predictor=grown.predictor.of(trees.replace(grown.predictor.params, {path: changed})))

    alike, read = (with_row(factor * rows[len(catalogue.keys)]) for factor in (1, READ_SCALE))
    user, same = (read.encode([event("40", 1), event(item, 9000)]) for item in ("new", catalogue.keys[3]))
    assert user.items.tolist() == [4, 10] and (user.count, user.unknown) == (2, 0)
    np.testing.assert_allclose(user.tokens, same.tokens, atol=1e-6)
    if model.predictor.ranks and not model.lines.text_items:
        scores = {item.id: item.score for item in alike.recommend(user, 10)}
        assert len(scores) == 10 and abs(scores["new"] - scores[catalogue.keys[3]]) < 1e-5
    ranked = [item.id for item in alike.recommend(user, 10, seen=False)]
    assert "new" not in ranked and "40" not in ranked and len(ranked) == 8
    assert [item.title for item in grown.recommend(user, candidates=["new"])] == ["A new film"]


def test_what_the_model_knew_stays(known, old):
    """Users of before, their answers without the further items, and the given model itself."""
    users = old.encode_many([row for user in range(5) for row in known.rows(user)])
    before = old.recommend_many(list(users.values()), 9)
    grown = old.add_items([NEW, {"id": 7}])
    assert len(old.vocabulary.catalogue.keys) == 10 and grown.vocabulary.catalogue.titles[-2:] == ["A new film", "7"]
    assert grown.identity == old.identity
    for user, ranking in zip(users.values(), before, strict=True):
        same_ranking(grown.recommend(user, 9, deny=["new", "7"]), ranking)
        again = grown.update(User.from_bytes(user.to_bytes()), [event("new", 10**6)])
        assert again.items[-1] == 10 and again.count == user.count + 1
    same_ranking(old.recommend(next(iter(users.values())), 9), before[0])
    assert grown.add_items([NEW, {"id": "7", "title": "7", "genres": []}, {"id": "10"}]) is grown


def test_items_fill_the_rows_that_are_there_and_then_get_more(old):
    """128 rows are there, of which 9 are items; added at once, in parts or by a table, the items are the same."""
    items = [{"id": f"n{n}", "title": f"Film {n} of war", "genres": ["War"] * (n % 2)} for n in range(300)]
    at_once = old.add_items(items)
    parts = old
    for first, last in ((0, 1), (1, 118), (118, 119), (119, 300)):
        parts = parts.add_items(items[first:last])
    wide = [{"genres": []} | item for item in items]
    for other in (parts, old.add_items(pa.Table.from_pylist(wide))):
        assert other.mark == at_once.mark and other.vocabulary.catalogue.titles == at_once.vocabulary.catalogue.titles
        np.testing.assert_allclose(table(other)[1][:310], table(at_once)[1][:310], atol=1e-6)
    one = old.add_items(items[:1]).predictor.config
    assert one == old.add_items(items[:100]).predictor.config  # so that nothing is compiled again
    user = at_once.encode([event("n299", 1), event("n4", 2)])
    assert user.items.tolist() == [309, 14] and len(at_once.recommend(user, 400)) == 309


def test_items_come_in_a_table_of_pandas(old):
    pandas = pytest.importorskip("pandas")
    items = [{"id": f"n{n}", "title": f"Film {n} of war", "genres": ["War"] * (n % 2)} for n in range(3)]
    found, expected = old.add_items(pandas.DataFrame(items)), old.add_items(items)
    assert found.mark == expected.mark and found.vocabulary.catalogue.titles == expected.vocabulary.catalogue.titles


def test_a_saved_model_answers_as_before(known, old, tmp_path):
    grown = old.add_items([NEW]).add_items([{"id": "next", "title": "A new film"}])
    grown.save(tmp_path / "one")
    loaded = user_llm.load(tmp_path / "one")
    assert loaded.identity == old.identity and loaded.mark == grown.mark
    assert loaded.vocabulary.catalogue.titles[-2:] == ["A new film", "A new film [2]"]
    user = grown.encode([event("10", 1), event("next", 2)])
    again = loaded.encode([event("10", 1), event("next", 2)])
    np.testing.assert_allclose(again.tokens, user.tokens, atol=1e-6)
    same_ranking(loaded.recommend(user, 11), grown.recommend(user, 11))
    # It grows further, also in its own place, and is exported with all its items.
    further = loaded.add_items([NEW, {"id": "last"}])
    further.save(tmp_path / "one")
    same_ranking(user_llm.load(tmp_path / "one").recommend(user, 12), further.recommend(user, 12))
    artifact.export(tmp_path / "one", tmp_path / "whole")
    same_ranking(user_llm.load(tmp_path / "whole").recommend(user, 12), further.recommend(user, 12))
    assert "added" not in json.loads((known.directory / "user_llm.json").read_text())
    with pytest.raises(ValueError, match="holds another model, or other items"):
        user_llm.load(tmp_path / "one").growth.save(tmp_path / "two", old.predictor, old.vocabulary.catalogue)
    with pytest.raises(ValueError, match="not loaded from a directory"):
        known.written.add_items([NEW])


def test_a_directory_that_counts_its_trained_items_wrong_is_refused(old, tmp_path):
    old.add_items([NEW, {"id": "next"}]).save(tmp_path)
    settings = settings_of(tmp_path)
    assert settings["added"] == 2 and settings["model"]["encoder"]["trained_items"] == 9
    for wrong in (-1, 8, 11, 1000):
        settings["model"]["encoder"]["trained_items"] = wrong
        seal(tmp_path, settings)
        with pytest.raises(ValueError, match=f"trained_items={wrong}: 2 of 11 items were added"):
            user_llm.load(tmp_path)


def test_items_that_an_older_version_added_are_read_as_that_version_read_them(old, tmp_path):
    """It did not say which rows are scaled. Its users are not those of a model that scales them, whose user tokens differ."""
    grown = old.add_items([NEW])
    grown.save(tmp_path)
    settings = settings_of(tmp_path)
    del settings["model"]["encoder"]["trained_items"]
    seal(tmp_path, settings)
    older = user_llm.load(tmp_path)
    user = older.encode([event("40", 1), event("new", 2)])
    path, rows = table(grown)
    rows[10] /= READ_SCALE
    same = grown.predictor.of(trees.replace(grown.predictor.params, {path: rows}))
    expected = dataclasses.replace(grown, predictor=same).encode([event("40", 1), event("new", 2)])
    np.testing.assert_allclose(user.tokens, expected.tokens, atol=1e-6)
    assert np.abs(user.tokens - grown.encode([event("40", 1), event("new", 2)]).tokens).max() > 1e-3
    with pytest.raises(ValueError, match="items that this model does not have"):
        grown.recommend(user, 1)
    # What is added to it now is scaled, and is so after it was saved too.
    both = older.add_items([{"id": "next", "title": "Another film"}])
    assert both.predictor.config.encoder.trained_items == 10 and both.recommend(user, 1)
    both.save(tmp_path / "both")
    assert user_llm.load(tmp_path / "both").mark == both.mark


def test_an_item_of_the_same_id_and_title_in_the_directory_is_not_taken_for_ones_own(known, tmp_path):
    """Another process has added it with other categories, by which its row lies elsewhere."""
    directory = shutil.copytree(known.directory, tmp_path / "model")
    one, other = user_llm.load(directory), user_llm.load(directory)
    one.add_items([NEW]).save(directory)
    with pytest.raises(ValueError, match="holds another model, or other items"):
        other.add_items([NEW | {"genres": ["Comedy"]}]).add_items([{"id": "next"}]).save(directory)
    assert user_llm.load(directory).mark == one.add_items([NEW]).mark


def test_the_count_of_unknown_events_never_falls(old):
    """Which events were unknown is not kept, so that one of an item that was added may or may not have been among them."""
    user, grown = old.encode([event("10", 1), event("strange", 6)]), old.add_items([NEW])
    for _ in range(2):
        user = grown.update(user, [event("new", 5)])
        assert (user.count, user.unknown, user.last_unknown) == (2, 1, 6)


def test_a_model_is_not_saved_with_what_another_run_left_in_its_place(make_model, tmp_path):
    """Even where the other model has the same items, the rows that were added lie in another space."""
    directory = shutil.copytree(make_model("cross").directory, tmp_path / "model")
    grown = user_llm.load(directory).add_items([NEW])
    shutil.rmtree(directory)
    shutil.copytree(make_model("soft").directory, directory)
    with pytest.raises(ValueError, match="holds another model, or other items"):
        grown.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_added_items_is_saved_as_it_was(known, old, tmp_path):
    old.save(tmp_path / "model")
    for file in ("user_llm.json", "catalogue.parquet", "README.md"):
        assert (tmp_path / "model" / file).read_bytes() == (known.directory / file).read_bytes()


def test_users_of_other_items_are_refused(old):
    one, other = old.add_items([NEW]), old.add_items([{"id": "other"}])
    user = one.encode([event("new", 1)])
    assert one.add_items([{"id": "other"}]).recommend(user, 1)
    for model in (old, other, other.add_items([NEW])):
        for call in (model.recommend, lambda user, model=model: model.update(user, []), model.explain):
            with pytest.raises(ValueError, match="items that this model does not have, or has in another order"):
                call(User.from_bytes(user.to_bytes()))


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([{"title": "x"}], "row 1: an item's id is a text or a whole number, and not None"),
        ([NEW, {"id": True}], "row 2: an item's id"),
        ([{"id": " "}], "an item's id"),
        ([{"id": 1.5}], "an item's id"),
        ([{"id": "\ud800"}], "an item's id"),
        ([{"id": "a", "title": " \n"}], "a title is a text that is not blank, and not ' \\\\n'"),
        ([{"id": "a", "title": 3}], "a title is a text"),
        ([{"id": "a", "genres": "War"}], "genres are a list of texts, and not 'War'"),
        ([{"id": "a", "genres": [3]}], "genres are a list of texts"),
        ([{"id": "a", "categories": ["War"]}], "an item has id, title, genres, and no 'categories'"),
        (["a"], "row 1: 'a' is no dict"),
        ([NEW, NEW | {"title": "B"}], "row 2: the item 'new' is there already, with the title 'A new film'"),
        ([NEW, NEW | {"genres": ["War"]}], "'new' is there already, with the genres Drama, War"),
        ([NEW | {"genres": ["Drama"]}, NEW], "row 2: the item 'new' is there already, with the genres Drama"),
        ([{"id": "10", "genres": ["Comedy", "War"]}], "row 1: the item '10' is there already, with the genres Comedy"),
        ([{"id": "10", "genres": ["War", "Comedy"]}], "row 1: the item '10' is there already, with the genres Comedy"),
        ([{"id": "new"}, NEW], "row 2: the item 'new' is there already, with the title 'new'"),
        ([{"id": "10", "title": "Another"}], "row 1: the item '10' is there already"),
        (7, "Items are a list of dicts, a table of pandas, polars or Arrow, or the path of a file, not int"),
        ("no/file.parquet", "There is no file no/file.parquet"),
        (__file__, "is no Parquet file"),
    ],
)  # fmt: skip
def test_wrong_items_are_refused_by_one_sentence(old, items, words):
    with pytest.raises(ValueError, match=words) as error:
        old.add_items(items)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_items_and_unknown_categories(old, tmp_path, caplog):
    assert old.add_items([]) is old
    grown = old.add_items([NEW | {"genres": ["War", "Nothing known", "War"]}])
    assert [grown.vocabulary.catalogue.vocab["genres"][n] for n in grown.vocabulary.catalogue.multi["genres"][10] if n] == [
        "War"
    ]
    assert grown.add_items([NEW | {"genres": ["War", "Nothing known"]}]) is grown
    # A file in the layout of a model's catalogue.
    grown.save(tmp_path / "model")
    assert old.add_items(tmp_path / "model" / "catalogue.parquet").mark == grown.mark
    pq.write_table(pa.table({"title": ["x"]}), tmp_path / "no_ids.parquet")
    with pytest.raises(ValueError, match="has no column 'id'; it has 'title'"):
        old.add_items(tmp_path / "no_ids.parquet")
    pq.write_table(pa.table({"id": ["x"], "genre": [["War"]]}), tmp_path / "misspelt.parquet")
    with pytest.raises(ValueError, match="misspelt.parquet: an item has id, title, genres, and no 'genre'"):
        old.add_items(tmp_path / "misspelt.parquet")


def test_tables_of_items_may_have_an_index_and_no_rounded_ids(old, tmp_path):
    file = tmp_path / "items.parquet"
    pq.write_table(pa.table({"id": ["x"], "__index_level_0__": [7]}), file)
    assert old.add_items(file).mark == old.add_items([{"id": "x"}]).mark
    table = pa.table({"id": pa.array([123456789.0], pa.float32())})
    pq.write_table(table, file)
    for items in (file, table):
        with pytest.raises(ValueError, match="ids are of type float, which rounds large numbers"):
            old.add_items(items)


def test_whole_numbers_are_ids_whatever_their_type(old):
    assert old.add_items([{"id": 77.0}, {"id": np.float64(78)}]).mark == old.add_items([{"id": "77"}, {"id": 78}]).mark
