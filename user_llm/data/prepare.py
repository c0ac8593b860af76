"""From raw files to timelines: numbered, sorted and stored once as a tensorflow-datasets dataset.

    Raw -> DuckDB (drops duplicates, numbers items and users, sorts on disk) -> array_record -> Timelines

A record holds whole users, as many as fill a piece: one record each costs 0.5 ms to write and 0.6 ms to read, whatever is in it.
Records keep the publisher's order of rows; how ties are broken, and which users are long enough, is decided when timelines are
loaded, so that one prepared dataset serves all protocols. Titles, bags and ids are stored with the dataset as metadata. Runs
without TensorFlow.
"""

import contextlib
import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from user_llm.common.files import MANIFEST, check_manifest, lock, write_manifest
from user_llm.common.hashes import content_hashes
from user_llm.data.loading import SEPARATOR, open_timelines
from user_llm.data.raw import ROWS, Raw
from user_llm.data.timelines import Timelines

SHARD = 20  # pieces of a file; tfds holds one file's records in memory until it is written
SCRATCH = "scratch-"
MEMORY = "1GB"  # of DuckDB, beyond which it sorts on disk
# Ids that are numbers are ordered as numbers, before those that are not.
IN_ORDER = "try_cast({0} AS HUGEINT) NULLS LAST, {0}"


@dataclasses.dataclass
class EventsConfig(tfds.core.BuilderConfig):
    """What is to be prepared."""

    raw: Raw | None = None


class Events(tfds.core.ShardBasedBuilder):
    """Whole users in the order of their numbers, many a record: their ids, their counts of events, and the columns of these events.

    Texts, and users' ids, are one string a record: tfds encodes many short ones slowly. Not a `GeneratorBasedBuilder`, which
    shuffles: beyond 1 GB it needs TensorFlow for that.
    """

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS: list = []
    url_infos: dict = {}  # nothing is downloaded here; left to itself tfds looks for a file of checksums

    @property
    def raw(self) -> Raw:
        """What is to be prepared."""
        return self.builder_config.raw

    def _info(self) -> tfds.core.DatasetInfo:
        column = lambda dtype: tfds.features.Tensor(shape=(None,), dtype=dtype)  # noqa: E731
        features = {"user": np.str_, "events": column(np.int32), "item": column(np.int32), "time": column(np.int64)}
        features |= {name: column(np.int32) for name in self.raw.ordinals} | dict.fromkeys(self.raw.texts, np.str_)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), metadata=tfds.core.MetadataDict()
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = Path(self.data_dir_root)  # where there is room for the dataset
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=root, prefix=SCRATCH))
            table = stack.enter_context(_table(self.raw, Path(scratch)))
            self.info.metadata.update(_facts(table, self.raw))
            count = table.sql("SELECT count(*) FROM kept").fetchall()[0][0]
            return {"train": _shards(self._generate_examples(table, stack.pop_all()), count)}

    def _generate_examples(self, table: duckdb.DuckDBPyConnection, scratch: contextlib.ExitStack) -> Iterator[tuple[int, dict]]:
        """Yield the number of the first user and the record."""
        names = ["time", *self.raw.ordinals, *self.raw.texts]
        chosen = ", ".join(f"kept.{name}" for name in names)
        query = f"""
            SELECT users.user AS user, users.number AS number, items.number::INTEGER AS item, {chosen}
            FROM kept JOIN users ON kept.user = users.user JOIN items ON kept.item = items.item
            ORDER BY users.number, kept.row
        """
        with scratch:
            held: pa.Table | None = None
            for piece in table.sql(query).to_arrow_reader(ROWS):
                rows = pa.Table.from_batches([piece])
                rows = rows if held is None else pa.concat_tables([held, rows])
                number = rows["number"].to_numpy()
                last = int(np.searchsorted(number, number[-1]))  # who may go on in the next piece
                if last:
                    yield int(number[0]), self._record(rows[:last])
                held = rows[last:]
            if held is not None:
                yield held["number"][0].as_py(), self._record(held)

    def _record(self, rows: pa.Table) -> dict:
        """Return the record of the users whose events these rows are."""
        number = rows["number"].to_numpy()
        starts = np.flatnonzero(np.diff(number, prepend=number[0] - 1))
        counts = np.diff(starts, append=len(number)).astype(np.int32)
        record = {name: rows[name].to_numpy() for name in ("item", "time", *self.raw.ordinals)}
        record |= {name: _joined(rows[name]) for name in self.raw.texts}
        return record | {"user": _joined(rows["user"].take(pa.array(starts))), "events": counts}


def _joined(texts: pa.ChunkedArray) -> str:
    return SEPARATOR.join(text.replace(SEPARATOR, " ") for text in texts.to_pylist())


def _shards(records: Iterator[tuple[int, dict]], events: int) -> list[Callable[[], Iterator[tuple[int, dict]]]]:
    """Return one generator for each file, which take their shares of the records in turn."""
    count = max(events // (SHARD * ROWS), 1)
    written = 0

    def shard(number: int) -> Iterator[tuple[int, dict]]:
        nonlocal written
        for key, record in records:
            written += len(record["item"])
            yield key, record
            # The last one takes what is left.
            if number < count and written >= events * number / count:
                break
        logging.info("%d of %d events are prepared.", written, events)

    return [functools.partial(shard, number) for number in range(1, count + 1)]


def _table(raw: Raw, scratch: Path) -> duckdb.DuckDBPyConnection:
    """Return a database on disk with `kept` (events without duplicates), `users`, `items` (both numbered) and `catalogue`."""
    table = duckdb.connect(str(scratch / "events.duckdb"))
    table.execute(f"SET memory_limit = '{MEMORY}'; SET temp_directory = '{scratch}'; SET enable_progress_bar = false")
    for name, schema, source in (("events", raw.event_schema, raw.events), ("published", raw.item_schema, raw.items)):
        numbered = schema.insert(0, pa.field("row", pa.int64()))
        faults: list[ValueError] = []
        reader = pa.RecordBatchReader.from_batches(numbered, _numbered(source(), numbered, faults))
        table.register("source", reader)
        try:
            table.execute(f"CREATE TABLE {name} AS SELECT * FROM source")
        except duckdb.Error:
            if faults:  # what a reader refuses, in its own words
                raise faults[0] from None
            raise
        table.unregister("source")
    table.execute("""
        CREATE TABLE kept AS SELECT * FROM events QUALIFY row_number() OVER (PARTITION BY "user", item, time ORDER BY row) = 1
    """)
    for name, of in (("users", '"user"'), ("items", "item")):
        order = IN_ORDER.format(of)
        table.execute(f"""
            CREATE TABLE {name} AS
            SELECT {of}, row_number() OVER (ORDER BY {order}) AS number FROM (SELECT DISTINCT {of} FROM kept)
        """)
    table.execute("""
        CREATE TABLE catalogue AS SELECT items.number, items.item AS "key", published.* EXCLUDE (row, item)
        FROM items LEFT JOIN published ON items.item = published.item
        QUALIFY row_number() OVER (PARTITION BY items.item ORDER BY published.row) = 1
        ORDER BY items.number
    """)
    return table


def _numbered(batches: Iterable[pa.RecordBatch], schema: pa.Schema, faults: list[ValueError]) -> Iterator[pa.RecordBatch]:
    """Number the rows of all pieces, for no database keeps the publisher's order by itself; keep what ends it too early."""
    first = 0
    try:
        for batch in batches:
            rows = pa.array(np.arange(first, first + len(batch)))
            yield pa.RecordBatch.from_arrays([rows, *batch.columns], schema=schema)
            first += len(batch)
            if first % (SHARD * ROWS) == 0:
                logging.info("%d rows are read.", first)
    except ValueError as fault:
        faults.append(fault)
        raise


def _facts(table: duckdb.DuckDBPyConnection, raw: Raw) -> dict:
    """Return the dataset's metadata."""
    rows, kept, users = (table.sql(f"SELECT count(*) FROM {name}").fetchall()[0][0] for name in ("events", "kept", "users"))
    if not rows:
        raise ValueError(f"{raw.files[0]} holds no events.")
    items = table.sql("SELECT * FROM catalogue ORDER BY number").to_arrow_table()
    bags = {name: [list(filter(None, bag or [])) for bag in items[name].to_pylist()] for name in raw.bags}
    vocab = {name: sorted({value for bag in bags[name] for value in bag}) for name in raw.bags}
    number = {name: {value: i for i, value in enumerate(values, 1)} for name, values in vocab.items()}
    keys = items["key"].to_pylist()
    titles = [title or key for title, key in zip(items["title"].to_pylist(), keys, strict=True)]
    return {
        "keys": keys,
        "titles": unique_titles(titles),
        "bags": {name: [[number[name][value] for value in bag] for bag in found] for name, found in bags.items()},
        "vocab": vocab,
        "audit": {"rows": rows, "duplicates_dropped": rows - kept, "users_before_min_events": users},
    }


def unique_titles(titles: list[str]) -> list[str]:
    """Number repeated titles " [2]", " [3]", ... so that a title names one item."""
    taken: set[str] = set()
    latest: dict[str, int] = {}
    out = []
    for title in titles:
        name, n = title, latest.get(title, 1)
        while name in taken:
            n += 1
            name = f"{title} [{n}]"
        latest[title] = n
        taken.add(name)
        out.append(name)
    return out


def prepare(raw: Raw, prepared_dir: epath.PathLike) -> Events:
    """Return the dataset's builder, prepared; tfds renames a directory into place only when it is complete.

    Of several processes one prepares and the others wait.

    Raises:
      ValueError: a bad row, named by file and line; or a prepared file that is damaged or missing.
    """
    folder = Path(prepared_dir) / fingerprint(raw.files)
    home = folder / "events" / raw.name / str(Events.VERSION)  # as tfds names it
    with lock(folder):
        for left in (*folder.glob(f"{SCRATCH}*"), *folder.rglob(f"{tfds.core.constants.INCOMPLETE_PREFIX}*_*")):
            logging.warning("Removing %s, left by a preparation that was killed.", left)
            shutil.rmtree(left)
        if (home / MANIFEST).exists():
            try:
                check_manifest(home)
            except ValueError as error:
                raise ValueError(f"{error} Delete {folder} and run the same command: the dataset is prepared again.") from error
        builder = Events(config=EventsConfig(name=raw.name, raw=raw), data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
        if not (home / MANIFEST).exists():
            write_manifest(home)
    return builder


def load(
    raw: Raw, prepared_dir: epath.PathLike, *, ties: str = "hashed", seed: int = 0, min_events: int = 3, word_ids: int = 4096,
    words: int = 8,
) -> Timelines:  # fmt: skip
    """Prepare a dataset once and open its timelines, which are mapped from files (`loading.py`).

    Args:
      prepared_dir: where the prepared dataset is kept, apart for each state of the raw files.
      ties: `hashed` (by `seed`) or `file`; see `order_events`.
      min_events: users with fewer are left out.
      word_ids, words: the size of a text feature's vocabulary, and how many of its words count.

    Raises:
      ValueError: a bad row, named by file and line, an unknown order of ties, or no user that is long enough.
    """
    builder = prepare(raw, prepared_dir)
    return open_timelines(builder, raw, ties=ties, seed=seed, min_events=min_events, word_count=word_ids, words=words)


def fingerprint(files: Iterable[epath.Path]) -> str:
    """Identify files by name and content."""
    paths = list(files)
    digest = hashlib.sha256()
    for path, content in zip(paths, content_hashes(paths), strict=True):
        digest.update(path.name.encode() + bytes.fromhex(content))
    return digest.hexdigest()[:12]
