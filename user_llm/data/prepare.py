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
import pyarrow.compute as pc
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from user_llm.common.checksums import MANIFEST, check_manifest, write_manifest
from user_llm.common.files import check_regular, lock
from user_llm.common.hashes import content_hashes
from user_llm.data import numbering
from user_llm.data.loading import ESCAPE, SEPARATOR, open_timelines
from user_llm.data.raw import ROWS, Raw
from user_llm.data.timelines import Timelines
from user_llm.data.titles import one_line, readable, unique_titles

SHARD = 20  # pieces of a file; tfds holds one file's records in memory until it is written
SCRATCH = "scratch-"


@dataclasses.dataclass
class EventsConfig(tfds.core.BuilderConfig):
    """What is to be prepared."""

    raw: Raw | None = None


class Events(tfds.core.ShardBasedBuilder):
    """Whole users in the order of their numbers, many a record: their ids, their counts of events, and the columns of these events.

    Texts, and users' ids, are one string a record: tfds encodes many short ones slowly. Not a `GeneratorBasedBuilder`, which
    shuffles: beyond 1 GB it needs TensorFlow for that.
    """

    VERSION = tfds.core.Version("3.0.0")
    BUILDER_CONFIGS: list = []
    url_infos: dict = {}  # nothing is downloaded here; left to itself tfds looks for a file of checksums

    @property
    def raw(self) -> Raw:
        """What is to be prepared."""
        return self.builder_config.raw

    def _info(self) -> tfds.core.DatasetInfo:
        column = lambda dtype: tfds.features.Tensor(shape=(None,), dtype=dtype)  # noqa: E731
        features = {"user": np.str_, "events": column(np.int32), "item": column(np.int32), "time": column(np.int64)}
        features |= {own: np.str_ if own.startswith("text") else column(np.int32) for own in self.raw.stored}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), metadata=tfds.core.MetadataDict()
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = Path(self.data_dir_root)  # where there is room for the dataset
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=root, prefix=SCRATCH))
            table = stack.enter_context(numbering.number_events(self.raw, Path(scratch)))
            self.info.metadata.update(_facts(table, self.raw))
            return {"train": _shards(self._generate_examples(table.database, stack.pop_all()), table.kept)}

    def _generate_examples(self, table: duckdb.DuckDBPyConnection, scratch: contextlib.ExitStack) -> Iterator[tuple[int, dict]]:
        """Yield the number of the first user and the record."""
        chosen = ", ".join(f"kept.{name}" for name in ("time", *self.raw.stored))
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
        record = {name: rows[name].to_numpy() for name in ("item", "time")}
        record |= {own: _joined(rows[own]) if own.startswith("text") else rows[own].to_numpy() for own in self.raw.stored}
        return record | {"user": _joined(rows["user"].take(pa.array(starts))), "events": counts}


def _joined(texts: pa.ChunkedArray) -> str:
    """Return many texts as one, from which `loading.apart` has them again whatever they hold."""
    escaped = pc.replace_substring(pc.replace_substring(texts, ESCAPE, f"{ESCAPE}0"), SEPARATOR, f"{ESCAPE}1").combine_chunks()
    one = pa.ListArray.from_arrays(pa.array([0, len(escaped)], pa.int32()), escaped)
    return pc.binary_join(one, SEPARATOR)[0].as_py()


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


def _facts(table: numbering.Numbered, raw: Raw) -> dict:
    """Return the dataset's metadata."""
    if not table.rows:
        raise ValueError(f"{raw.files[0]} holds no events.")
    items = table.database.sql("SELECT * FROM catalogue ORDER BY number").to_arrow_table()
    bags = {name: [_names(bag) for bag in items[name].to_pylist()] for name in raw.bags}
    vocab = {name: sorted({value for bag in bags[name] for value in bag}) for name in raw.bags}
    number = {name: {value: i for i, value in enumerate(values, 1)} for name, values in vocab.items()}
    keys = items["key"].to_pylist()
    titles = [readable(title, key, n) for n, (title, key) in enumerate(zip(items["title"].to_pylist(), keys, strict=True), 1)]
    return {
        "keys": keys,
        "titles": unique_titles(titles),
        "bags": {name: [[number[name][value] for value in bag] for bag in found] for name, found in bags.items()},
        "vocab": vocab,
        "ticks_per_second": table.ticks.per_second,
        "fractions": table.fractions,
        "edges": table.edges,
        "audit": table.facts(raw),
    }


def _names(bag: list[str | None] | None) -> list[str]:
    """Return the names of a bag, each once and on one line."""
    return list(dict.fromkeys(filter(None, (one_line(name or "") for name in bag or []))))


def prepare(raw: Raw, prepared_dir: epath.PathLike) -> Events:
    """Return the dataset's builder, prepared; tfds renames a directory into place only when it is complete.

    Of several processes one prepares and the others wait.

    Raises:
      ValueError: a bad row, named by file and line; or a prepared file that is damaged or missing.
    """
    folder = Path(prepared_dir) / fingerprint(raw.files, raw.settings)
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
        with contextlib.redirect_stdout(None):  # where this library says "Downloading ... Unknown size" of what is here
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


def fingerprint(files: Iterable[epath.Path], settings: str = "") -> str:
    """Identify files by name and content, and settings of their reader.

    Raises:
      ValueError: what is no regular file.
    """
    paths = list(files)
    digest = hashlib.sha256(settings.encode())
    for path in paths:
        check_regular(path)
    for path, content in zip(paths, content_hashes(paths), strict=True):
        digest.update(path.name.encode(errors="surrogateescape") + bytes.fromhex(content))
    return digest.hexdigest()[:12]
