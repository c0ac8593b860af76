"""All users of event files larger than memory: encoded, or with recommendations, into Parquet.

    event files -> parts by the user's hash, on disk -> each part: users by users -> OUT/part-00012-of-00064.parquet

A part is written whole or not at all, and those that are there are not computed again: a run that was killed goes on with the same
command. Several processes share the parts (`share`), each with what it reads of its own on its own disk.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from absl import logging
from etils import epath
from tqdm import tqdm

from user_llm.common.files import lock, write_json
from user_llm.common.hashes import content_hashes
from user_llm.common.records import read_json, text
from user_llm.data.event_files import find_files
from user_llm.data.raw import BadRows
from user_llm.data.vocabulary import REMEDY, Vocabulary
from user_llm.serving.tables import Encode, Recommend

BYTES = 32 << 20  # of event files, for each part
MOST_PARTS = 512  # files that are written side by side
USERS = 2048  # at a time: of them all are in memory
FACTS = "made_of.json"
SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True)
class Share:
    """The parts that a process computes: every `count`-th one, from `index` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, spelled: str) -> "Share":
        """Return the share that is spelled as INDEX/COUNT.

        Raises:
          ValueError: another spelling, or an index that is not below the count.
        """
        index, _, count = spelled.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"--share={spelled}: name it as INDEX/COUNT, such as 0/4 for the first of four processes.")
        return cls(int(index), int(count))


def run(function: Encode | Recommend, events: str, out: Path, *, share: Share | None = None, skip_bad: bool = False) -> int:
    """Apply a function of users to all users of event files, and return of how many there are rows in OUT afterwards.

    Args:
      events: a file, a folder or a glob, in the columns that the model names.
      out: a folder for the parts.
      skip_bad: leave rows out that cannot be read, and say how many.

    Raises:
      ValueError: a row that cannot be read, or a folder that holds results of something else.
    """
    share, vocabulary = share or Share(), function.model.vocabulary
    files, _ = find_files(events)
    parts = int(
        np.clip(math.ceil(sum(file.stat().length for file in files) / BYTES), share.count, max(MOST_PARTS, share.count))
    )
    out.mkdir(parents=True, exist_ok=True)
    _settle(out, function, [content_hashes(files), skip_bad], parts)
    mine = range(share.index, parts, share.count)
    missing = [part for part in mine if not _path(out, part, parts).exists()]
    scratch = out / f"{SCRATCH}-{share.index}-of-{share.count}"
    with lock(scratch):
        if missing:
            with tqdm(unit=" events", unit_scale=True, desc="reading", mininterval=1) as progress:
                sizes = _parted(
                    vocabulary, events, scratch, set(missing), parts, BadRows(skip=skip_bad, remedy=REMEDY), progress
                )
                progress.reset(sum(sizes.values()))
                progress.set_description("computing")
                for part in missing:
                    _compute(function, vocabulary, scratch / f"{part}.arrow", _path(out, part, parts), progress)
    shutil.rmtree(scratch)
    return sum(
        len(np.unique(pq.read_table(_path(out, part, parts), columns=["user"])["user"].to_numpy(zero_copy_only=False)))
        for part in mine
    )


def _path(out: Path, part: int, parts: int) -> Path:
    return out / f"part-{part:05}-of-{parts:05}.parquet"


def _settle(out: Path, function: Encode | Recommend, events: list, parts: int) -> None:
    """Note of what the parts in a folder are made.

    Raises:
      ValueError: they are made of something else.
    """
    digest = hashlib.sha256(json.dumps([events, parts, function.settings]).encode()).hexdigest()[:16]
    facts = {"model": function.model.identity, "function": type(function).__name__, "of": digest}
    with lock(out):
        if (out / FACTS).exists():
            found = read_json(out / FACTS, dict.fromkeys(facts, text), "choose another --out")
            if found != facts:
                what = next(key for key in facts if found.get(key) != facts[key])
                said = {"model": "another model", "function": "another command", "of": "other events or settings"}[what]
                raise ValueError(f"{out} holds results of {said}: choose another --out.")
        else:
            write_json(epath.Path(out) / FACTS, facts)


def _parted(
    vocabulary: Vocabulary, events: str, scratch: Path, wanted: set[int], parts: int, bad_rows: BadRows, progress: tqdm
) -> dict[int, int]:
    """Write the events of each wanted part to a file, and return how many it has."""
    sizes = dict.fromkeys(wanted, 0)
    schema = vocabulary.columns
    with ExitStack() as stack:
        writers = {
            part: stack.enter_context(pa.ipc.new_file(str(scratch / f"{part}.arrow"), schema)) for part in sorted(wanted)
        }
        for batch in vocabulary.batches(events, bad_rows):
            users = batch.column("user").dictionary_encode()
            of_user = np.array([zlib.crc32(user.encode()) % parts for user in users.dictionary.to_pylist()], np.int64)
            of_row = of_user[users.indices.to_numpy()]
            order = np.argsort(of_row, kind="stable")
            sorted_rows, found = batch.take(pa.array(order)), np.unique(of_row)
            edges = np.searchsorted(of_row[order], [*found, parts])
            for part, first, last in zip(found.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                if part in wanted:
                    writers[part].write_batch(sorted_rows.slice(first, last - first))
                    sizes[part] += last - first
            progress.update(len(batch))
    if bad_rows.count:
        logging.warning("%d rows that cannot be read are left out.", bad_rows.count)
    return sizes


def _compute(function: Encode | Recommend, vocabulary: Vocabulary, source: Path, target: Path, progress: tqdm) -> None:
    """Write the results of a part's users, whole."""
    with pa.memory_map(str(source)) as file:
        read = vocabulary.gather(pa.ipc.open_file(file).read_all())
    unfinished = target.with_suffix(".unfinished")
    with pq.ParquetWriter(unfinished, function.schema) as writer:
        for numbers in _slices(len(read.timelines)):
            writer.write_table(function.of_users(function.model.encode_read(read, numbers)))
            progress.update(
                int(
                    read.timelines.lengths[numbers.start : numbers.stop].sum()
                    + read.unknown[numbers.start : numbers.stop].sum()
                )
            )
    unfinished.rename(target)
    source.unlink()


def _slices(count: int) -> Iterator[range]:
    for first in range(0, count, USERS):
        yield range(first, min(first + USERS, count))


def forget(states: str | Path, user: str) -> int:
    """Remove a user from Parquet files that `run` wrote, by writing those anew that hold the user; return how many rows there were.

    Args:
      states: a file, or a folder of them.

    Raises:
      ValueError: no Parquet files there.
    """
    path = Path(states)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{states} holds no Parquet files of users: name the folder that encode or recommend wrote.")
    removed = 0
    for file in files:
        here = sum(part["user"].to_pylist().count(user) for part in pq.ParquetFile(file).iter_batches(columns=["user"]))
        if not here:
            continue
        unfinished = file.with_suffix(".unfinished")
        source = pq.ParquetFile(file)
        with pq.ParquetWriter(unfinished, source.schema_arrow) as writer:
            for batch in source.iter_batches():
                writer.write_batch(batch.filter(pa.array([one != user for one in batch["user"].to_pylist()])))
        unfinished.replace(file)
        removed += here
    return removed
