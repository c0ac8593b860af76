"""A catalogue in a file: what is read is what was written, and what was changed is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from user_llm.data.catalogue_file import read_catalogue, write_catalogue
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import Catalogue

SCHEMA = Schema((Feature("item", "item", 4), Feature("genres", "multi", 4, 2)))
GENRES = np.array([[0, 0], [1, 3], [0, 0], [2, 0]], np.int32)
CATALOGUE = Catalogue(
    ["", "A", 'B "é"', "C"], ["", "a", "\x01", "7"], {"genres": GENRES, "tags": GENRES[:, :1] > 0},
    {"genres": ["", "x", "y", "z"], "tags": ["", "old"]},
)  # fmt: skip
NAMES = {"genres": ["x", "y", "z"], "tags": ["old"]}
COUNTS = np.array([0, 5, 0, 2**40])


@pytest.fixture
def path(tmp_path):
    write_catalogue(tmp_path / "catalogue.parquet", CATALOGUE, COUNTS)
    return tmp_path / "catalogue.parquet"


def test_what_is_written_is_read(path):
    catalogue, counts = read_catalogue(path, SCHEMA, NAMES)
    assert (catalogue.titles, catalogue.keys, catalogue.vocab) == (CATALOGUE.titles, CATALOGUE.keys, CATALOGUE.vocab)
    assert catalogue.multi.keys() == CATALOGUE.multi.keys()
    for name, bag in CATALOGUE.multi.items():  # `tags` is no feature
        np.testing.assert_array_equal(catalogue.multi[name], bag)
    np.testing.assert_array_equal(counts, COUNTS)
    assert pq.read_table(path).slice(0, 1).to_pylist() == [
        {"id": "a", "title": "A", "genres": ["x", "z"], "tags": ["old"], "events": 5}
    ]


def replaced(path, name, values, kind=None):
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values, kind)), path)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("id", ["a", None, "c"], "row 2: column 'id' holds nothing"),
        ("id", ["a", "b", "a"], "row 3: id 'a' is that of row 1 too"),
        ("title", ["A", "B", "B"], "row 3: title 'B' is that of row 2 too"),
        ("id", [["a"], ["b"], ["c"]], "catalogue.parquet: .*list"),
        ("title", [b"\xff", b"b", b"c"], "UTF"),
        ("events", [1, -1, 1], "row 2: events are at least 0"),
        ("events", ["x", "y", "z"], "Failed to parse"),
        ("genres", [["x"], None, ["y"]], "row 2: column 'genres' holds nothing"),
        ("genres", [["x"], [None], ["y"]], "row 2: None is none of the genres of the model"),
        ("genres", [["x"], [], ["q"]], "row 3: 'q' is none of the genres of the model"),
        ("genres", [["x", "y", "z"], [], []], "row 1: 3 genres where the model has at most 2"),
        ("genres", [1, 2, 3], "catalogue.parquet"),
    ],
)
def test_what_does_not_fit_is_one_sentence(path, name, values, words):
    replaced(path, name, values)
    with pytest.raises(ValueError, match=words) as caught:
        read_catalogue(path, SCHEMA, NAMES)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_of_another_kind_are_refused(path):
    with pytest.raises(ValueError, match="has 3 items where the schema has 8"):
        read_catalogue(path, Schema((Feature("item", "item", 9),)), NAMES)
    with pytest.raises(ValueError, match="has not one column 'colours', but id, title, genres, tags, events"):
        read_catalogue(path, SCHEMA, NAMES | {"colours": []})
    content = path.read_bytes()
    for part in (b"", content[: len(content) // 2], b"PAR1" + b"\0" * 64 + b"PAR1", content[:50] + b"\xff" * 40 + content[90:]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="catalogue.parquet"):
            read_catalogue(path, SCHEMA, NAMES)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        read_catalogue(path, SCHEMA, NAMES)


def test_a_bag_of_a_columns_name_is_refused(tmp_path):
    catalogue = Catalogue(["", "A"], ["", "a"], {"events": GENRES[:2]}, {"events": ["", "x", "y", "z"]})
    with pytest.raises(ValueError, match="no bag of these names: events"):
        write_catalogue(tmp_path / "c.parquet", catalogue, COUNTS[:2])
    assert not list(tmp_path.iterdir())
