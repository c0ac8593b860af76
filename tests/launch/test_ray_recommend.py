"""Data engines recommend as one process does: Ray by the example in launch/, Spark and Beam by the lines of launch/README.md."""

import importlib.util
import re
import sys
import zlib
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_dataset, make_models

from user_llm.serving.tables import RANKINGS, Recommend

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def known(make_timelines, drawn, tmp_path_factory):
    return make_models(make_dataset(make_timelines), drawn, tmp_path_factory.mktemp("models"))("cross")


@pytest.fixture(scope="module")
def rows(known) -> list[dict]:
    """The events of all users, shuffled, with a column that the model does not name."""
    made = [row | {"other": "x"} for user in range(5) for row in known.rows(user)]
    return [made[n] for n in np.random.default_rng(0).permutation(len(made))]


def same(found: pa.Table, wanted: pa.Table) -> None:
    """The same users, ranks, items, titles and types, in any order of users; scores within 1e-5."""
    assert found.schema.remove_metadata() == wanted.schema == RANKINGS
    found, wanted = (table.sort_by([("user", "ascending"), ("rank", "ascending")]) for table in (found, wanted))
    assert found.drop_columns("score").to_pylist() == wanted.drop_columns("score").to_pylist()
    np.testing.assert_allclose(found["score"].to_numpy(), wanted["score"].to_numpy(), atol=1e-5)


@pytest.mark.slow
def test_ray_recommends_as_one_process(known, rows, tmp_path, monkeypatch):
    """Two workers, two files that both hold events of each user, more blocks than users, and mistakes of the caller."""
    ray = pytest.importorskip("ray.data", reason='Ray is not installed: pip install -e ".[ray]"') and sys.modules["ray"]
    spec = importlib.util.spec_from_file_location("ray_recommend", LAUNCH / "ray_recommend.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    events, out = tmp_path / "events", tmp_path / "out"
    events.mkdir()
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(rows[number::2]), events / f"{number}.parquet")

    def run(model=known.directory, events=events, out=out, workers=1) -> str | None:
        """Run the example; return the message with which it ends, if any."""
        args = [f"--model={model}", f"--events={events}", f"--out={out}", "--k=3", "--blocks=6", f"--workers={workers}"]
        monkeypatch.setattr(sys, "argv", ["ray_recommend.py", *args])
        try:
            example.main()
        except SystemExit as error:
            return str(error)

    ray.init(num_cpus=2)  # as many as the workers are: none is left if the workers reserve them
    try:
        assert run(workers=2) is None
        same(pq.read_table(out), Recommend(known.directory, 3)(pa.Table.from_pylist(rows)))
        pq.write_table(pa.Table.from_pylist([rows[0] | {"rating": 99}, *rows[1:]]), tmp_path / "99.parquet")
        pq.write_table(pa.Table.from_pylist(rows).drop_columns("user"), tmp_path / "nobody.parquet")
        for given, message in (
            ({}, "out already exists"),
            ({"model": tmp_path / "no"}, "^Error: .*no"),
            ({"events": tmp_path / "nobody.parquet", "out": tmp_path / "a"}, "no column user"),
            ({"events": tmp_path / "99.parquet", "out": tmp_path / "b"}, "'rating' holds 99"),
        ):
            said = run(**given)
            assert re.search(message, said) and "\n" not in said and "Traceback" not in said and len(said) < 400
    finally:
        ray.shutdown()


class Spark:
    """A DataFrame of pyspark, as far as the lines use it: partitions, given to a function as iterators of small batches."""

    def __init__(self, rows: list[dict]):
        self.partitions = [rows]

    def repartition(self, count: int, column: str) -> "Spark":
        (rows,) = self.partitions
        self.partitions = [[row for row in rows if zlib.crc32(row[column].encode()) % count == n] for n in range(count)]
        assert [] in self.partitions and max(map(len, self.partitions)) > 4
        return self

    def mapInArrow(self, function, schema: str) -> pa.Table:  # noqa: N802
        kinds = {pa.string(): "string", pa.int32(): "int", pa.float32(): "float"}
        assert schema == ", ".join(f"{field.name} {kinds[field.type]}" for field in RANKINGS)
        batches = [batch for part in self.partitions for batch in function(iter(_batches(part)))]
        assert all(isinstance(batch, pa.RecordBatch) for batch in batches)
        return pa.Table.from_batches(batches)


def _batches(rows: list[dict]) -> list[pa.RecordBatch]:
    return pa.Table.from_pylist(rows).to_batches(max_chunksize=4) if rows else []


class Beam:
    """A transform of apache_beam, as far as the lines use it."""

    def __init__(self, apply):
        self.apply = apply

    def __ror__(self, elements):
        return self.apply(elements)

    @classmethod
    def GroupBy(cls, key):  # noqa: N802
        return cls(lambda elements: [(k, iter(list(group))) for k, group in groupby(sorted(elements, key=key), key)])

    @classmethod
    def FlatMap(cls, function):  # noqa: N802
        return cls(lambda elements: [row for element in elements for row in function(element)])


def test_spark_and_beam_by_the_lines_of_the_readme(known, rows):
    text = (LAUNCH / "README.md").read_text()
    lines = {name: re.search(rf"```python\n# {name}\n(.*?)```", text, re.DOTALL)[1] for name in ("Spark", "Beam")}
    wanted = Recommend(known.directory, 3)(pa.Table.from_pylist(rows))
    for name, names in (
        ("Spark", {"frame": Spark(rows)}),
        ("Beam", {"events": rows, "beam": SimpleNamespace(GroupBy=Beam.GroupBy, FlatMap=Beam.FlatMap)}),
    ):
        scope = {"recommend": Recommend(str(known.directory), 3), "pa": pa, "zlib": zlib, **names}
        exec(lines[name], scope)
        found = scope["ranked"]
        same(found if isinstance(found, pa.Table) else pa.Table.from_pylist(found, RANKINGS), wanted)
