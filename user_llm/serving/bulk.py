"""Encode, or recommend items to, all users of event files that are larger than memory; the results are Parquet files.

    event files -> one file of events per part, on disk -> pieces of a part -> some users at a time -> OUT/part-00012-of-00064.parquet

A hash of the user's id chooses the user's part, so that all events of a user are in one part. A part that has too many events for
memory is divided into pieces in the same way. The memory in use therefore does not grow with the number of users. A part's Parquet
file appears when it is complete. The same command, given again after a run was killed, computes the missing parts only. Several processes can divide
the parts among them (`Share`). Each of them reads all event files, and stores the events of its own parts in OUT while it works.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from absl import logging
from etils import epath
from tqdm import tqdm

from user_llm.common.files import lock, write_json
from user_llm.common.hashes import content_hashes
from user_llm.common.records import anything, misfit, read_json, text
from user_llm.data.event_files import find_files
from user_llm.data.raw import BadRows
from user_llm.data.vocabulary import REMEDY, Vocabulary
from user_llm.serving.tables import Encode, Recommend
from user_llm.serving.user import User

BYTES = 32 << 20  # bytes of event files for each part
MOST_PARTS = 200  # the most parts, each of which is an open file while events are read
EVENTS = 1 << 19  # events of a piece, which are in memory together; a user with more is in memory as a whole nevertheless
USERS = 1024  # users that are encoded at a time; the results of all of them are in memory together
FACTS = "_made_of.json"  # readers of a folder of Parquet files leave out what begins so
SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True)
class Share:
    """The parts that one of `count` processes computes: numbers `index`, `index` + `count`, `index` + 2 `count` and so on."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, spelled: str) -> "Share":
        """Return the share that a text such as "0/4" (INDEX/COUNT) names.

        Raises:
          ValueError: the text is of another form, or INDEX is not below COUNT.
        """
        index, _, count = spelled.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"--share={spelled}: name it as INDEX/COUNT, such as 0/4 for the first of four processes.")
        return cls(int(index), int(count))


def run(function: Encode | Recommend, events: str, out: Path, *, share: Share | None = None, skip_bad: bool = False) -> int:
    """Apply a function to all users of event files, and write the results to a folder.

    Args:
      function: what is computed for each user: `Encode` or `Recommend`.
      events: a file, a folder or a glob of events, which have the columns of the training data.
      out: the folder to write to; it is made if it is missing.
      share: the parts that this process computes; all of them if it is not given.
      skip_bad: whether rows that cannot be read are left out and counted in the log. Otherwise the first one is an error.

    Returns:
      The number of users who have rows in this share's parts.

    Raises:
      ValueError: a row cannot be read, or the folder holds results of another model, command, setting or set of events.
    """
    share, vocabulary = share or Share(), function.model.vocabulary
    files, _ = find_files(events)
    size = sum(file.stat().length for file in files)
    parts = int(np.clip(math.ceil(size / BYTES), share.count, max(MOST_PARTS, share.count)))
    settings = {f"--{name}": value for name, value in function.settings.items()}
    settings |= {"--bad_rows": "skip" if skip_bad else "refuse", "--share": f"INDEX/{share.count}"}
    out.mkdir(parents=True, exist_ok=True)
    _settle(out, function, [content_hashes(files), parts], settings)
    mine = range(share.index, parts, share.count)
    scratch = out / f"{SCRATCH}-{share.index}-of-{share.count}"
    with lock(out / f".{scratch.name}"):  # another process with the same share waits, and finds all parts there
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        if missing := [part for part in mine if not _path(out, part, parts).exists()]:
            with tqdm(unit=" events", unit_scale=True, desc="reading", mininterval=1) as progress:
                bad_rows = BadRows(skip=skip_bad, remedy=REMEDY)
                those = {part: scratch / f"{part}.arrow" for part in missing}
                sizes = _divided(vocabulary.batches(events, bad_rows), vocabulary.columns, those, lambda n: n % parts, progress)
                if bad_rows.count:
                    logging.warning("%d rows that cannot be read are left out.", bad_rows.count)
                progress.reset(sum(sizes.values()))
                progress.set_description("computing")
                for part in missing:
                    pieces = _pieces(those[part], sizes[part], vocabulary.columns, parts)
                    _compute(function, vocabulary, pieces, _path(out, part, parts), progress)
        shutil.rmtree(scratch)
    return sum(_users(_path(out, part, parts)) for part in mine)


def _users(file: Path) -> int:
    """Return the number of users of a part's results, in which the rows of a user are side by side."""
    count, last = 0, None
    for batch in pq.ParquetFile(file).iter_batches(columns=["user"]):
        if len(batch):
            count += len(batch["user"].unique()) - (batch["user"][0] == last)
            last = batch["user"][-1]
    return count


def _path(out: Path, part: int, parts: int) -> Path:
    return out / f"part-{part:05}-of-{parts:05}.parquet"


def _settle(out: Path, function: Encode | Recommend, events: list, settings: dict[str, Any]) -> None:
    """Write to OUT which model, command, settings and events its parts are made from; check it where it is written already.

    Args:
      events: what tells the events, and their parts, from others.
      settings: the settings of the command, as they are given: {"--k": 10}.

    Raises:
      ValueError: the parts in OUT are made from something else.
    """
    digest = hashlib.sha256(json.dumps(events).encode()).hexdigest()[:16]
    facts = {
        "model": "+".join(filter(None, (function.model.identity, function.model.mark))),
        "command": type(function).__name__.lower(),
        "settings": settings,
        "events": digest,
    }
    with lock(out):
        if not (out / FACTS).exists():
            write_json(epath.Path(out) / FACTS, facts)
            return
        form = dict.fromkeys(facts, text) | {"settings": dict.fromkeys(settings, anything)}
        there = read_json(out / FACTS, dict.fromkeys(facts, anything), "choose another --out")
        for name in ("model", "command"):
            if there[name] != facts[name]:
                raise ValueError(f"{out} holds results of another {name}: choose another --out.")
        if wrong := misfit(there, form):
            raise ValueError(f"{out / FACTS}: {wrong}; choose another --out.")
        for name, value in settings.items():
            if (before := there["settings"][name]) != value:
                raise ValueError(
                    f"{out} was made with {name}={before}, and not {value}: give it again, or choose another --out."
                )
        if there["events"] != digest:
            raise ValueError(f"{out} holds results of other events: choose another --out.")


def _divided(
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    files: Mapping[int, Path],
    chosen: Callable[[np.ndarray], np.ndarray],
    progress: tqdm | None = None,
) -> dict[int, int]:
    """Divide events among files by their users, and return the number of events in each file.

    Args:
      batches: events, with the columns of `schema`.
      files: where the events of each number are written.
      chosen: from the hashes of users to the numbers of their files. Events whose number is not in `files` are left out.
    """
    sizes = dict.fromkeys(files, 0)
    with ExitStack() as stack:
        writers = {number: stack.enter_context(pa.ipc.new_file(str(file), schema)) for number, file in sorted(files.items())}
        for batch in batches:
            users = batch.column("user").dictionary_encode()
            of_user = chosen(np.array([zlib.crc32(user.encode()) for user in users.dictionary.to_pylist()], np.int64))
            of_row = of_user[users.indices.to_numpy()]
            order = np.argsort(of_row, kind="stable")
            sorted_rows, (found, firsts) = batch.take(pa.array(order)), np.unique(of_row[order], return_index=True)
            for number, first, last in zip(found.tolist(), firsts.tolist(), [*firsts.tolist()[1:], len(order)], strict=True):
                if number in files:
                    writers[number].write_batch(sorted_rows.slice(first, last - first))
                    sizes[number] += last - first
            if progress is not None:
                progress.update(len(batch))
    return sizes


def _pieces(file: Path, size: int, schema: pa.Schema, parts: int) -> list[Path]:
    """Return the files into which a part's events are divided, of some `EVENTS` each: `file` itself where it has no more.

    Args:
      size: the number of events in `file`, which is deleted when it is divided.
      parts: the number of parts, by which the hashes of users are divided before the pieces are numbered: users of one part have
        the same remainder.
    """
    count = min(math.ceil(size / EVENTS), MOST_PARTS)
    if count < 2:
        return [file]
    pieces = {number: file.with_stem(f"{file.stem}-{number}") for number in range(count)}
    with pa.OSFile(str(file)) as source:  # pages of a file that is mapped would count as memory in use
        opened = pa.ipc.open_file(source)
        batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        _divided(batches, schema, pieces, lambda n: n // parts % count)
    file.unlink()
    return list(pieces.values())


def _compute(
    function: Encode | Recommend, vocabulary: Vocabulary, pieces: Sequence[Path], target: Path, progress: tqdm
) -> None:
    """Write a part's results to `target`, which appears when it is complete, and delete the part's events in `pieces`."""
    unfinished = target.with_suffix(".unfinished")
    with pq.ParquetWriter(unfinished, function.schema) as writer, ThreadPoolExecutor(1) as thread:
        written = None  # one slice of users is written while the next one is computed
        for file in pieces:
            with pa.OSFile(str(file)) as source:
                read = vocabulary.gather(pa.ipc.open_file(source).read_all())
            for numbers in _slices(len(read.timelines)):
                users = function.model.encode_read(read, numbers)
                if written:
                    written.result()
                written = thread.submit(_write, writer, function, users)
                known = read.timelines.lengths[numbers.start : numbers.stop].sum()
                progress.update(int(known + read.unknown[numbers.start : numbers.stop].sum()))
        if written:
            written.result()
    unfinished.rename(target)
    for file in pieces:
        file.unlink()


def _write(writer: pq.ParquetWriter, function: Encode | Recommend, users: Mapping[str, User]) -> None:
    writer.write_table(function.of_users(users))


def _slices(count: int) -> Iterator[range]:
    for first in range(0, count, USERS):
        yield range(first, min(first + USERS, count))


def forget(states: str | Path, user: str) -> int:
    """Delete all rows of one user from the Parquet files that `user_llm.encode` or `user_llm.recommend` wrote.

        user_llm.forget("STATES", "u1")   # 1

    Each file that holds the user is replaced by a copy without the user. What a killed run has left in the folder (events in parts,
    and unfinished files) is deleted, as it may hold the user. Call it while no run writes to the folder. The event files and the weights of the
    model are not changed.

    Args:
      states: a Parquet file, or the folder that the command wrote.
      user: the user's id, as in the column `user`.

    Returns:
      The number of rows that were deleted; 0 if the user is in none of the files.

    Raises:
      ValueError: there is no such file, the folder holds no Parquet files, or one without the column `user`.
    """
    path = Path(states)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{states} holds no Parquet files of users: name the folder that encode or recommend wrote.")
    for left in [*path.glob(f"{SCRATCH}-*"), *path.glob("*.unfinished")] if path.is_dir() else []:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    removed, user = 0, str(user)
    for file in files:
        if "user" not in pq.ParquetFile(file).schema_arrow.names:
            raise ValueError(f"{file} has no column 'user': name what encode or recommend wrote.")
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
