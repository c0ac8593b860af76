"""From a prepared dataset to timelines whose columns are files, mapped into memory.

Three folders lie beside the records, each made by the first process that needs it (`mapped.py`):

    columns/             all events, sorted by user and time, with ties in the publisher's order: one for all runs
    words-SIZE-WIDTH/    the ids of the words of texts
    order-TIES-SEED-MIN/ the users of a protocol, and for each of their events its row in `columns`: 4 bytes an event

The results of `audits.py` are kept beside them. Only the order differs from seed to seed, so that a further seed costs 4 bytes an
event and not another copy of the texts.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from user_llm.common.checksums import MANIFEST
from user_llm.data.fields import Fields, Number
from user_llm.data.mapped import FACTS, Column, Keys, Seconds, Texts, stored
from user_llm.data.raw import Raw
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import GAP_BUCKETS, Catalogue, Chunk, Origin, Timelines, chunks, hash_key, order_events, word_ids

SEPARATOR, ESCAPE = "\x1e", "\x1d"  # of the texts of a record, and what stands before 0 and 1 where a text holds one of the two
RECORDS = 16  # read at a time

Arrays = Mapping[str, np.ndarray]


def open_timelines(
    builder: tfds.core.DatasetBuilder, raw: Raw, *, ties: str, seed: int, min_events: int, word_count: int, words: int
) -> Timelines:
    """Return the timelines of a prepared dataset.

    Args:
      ties, seed: see `order_events`.
      min_events: users with fewer are left out.
      word_count, words: the size of a text feature's vocabulary, and how many of its words count.

    Raises:
      ValueError: an unknown order of ties, or no user that is long enough.
    """
    folder, metadata = Path(builder.data_dir), builder.info.metadata
    fields = _fields(raw, metadata, ties=ties, seed=seed)
    numbers, texts = _names(raw)
    columns = stored(folder / "columns", lambda: _columns(builder, raw))
    if np.diff(columns["offsets"]).max() < min_events:
        raise ValueError(f"No user in {raw.files[0].parent} has {min_events} events: lower min_events.")
    protocol = f"order-{ties}-{seed}-{min_events}" if ties == "hashed" else f"order-{ties}-{min_events}"
    order = stored(folder / protocol, lambda: _order(columns, ties=ties, seed=seed, min_events=min_events))
    rows = order["rows"]
    word_columns = {}
    if texts:
        ids = stored(folder / f"words-{word_count}-{words}", lambda: _words(columns, [*texts.values()], word_count, words))
        word_columns = {name: Column(ids[file], rows) for name, file in texts.items()}
    ticks_per_second = metadata.get("ticks_per_second", 1)
    catalogue = _catalogue(metadata)
    timelines = Timelines(
        name=raw.name,
        user_keys=Keys(_texts(columns, "user", order["users"])),
        offsets=order["offsets"],
        item=Column(columns["item"], rows),
        columns={
            **{name: Column(columns[file], rows) for name, file in numbers.items()},
            **{name: _texts(columns, file, rows) for name, file in texts.items()},
            **({"timestamp": Seconds(columns["time"], rows, ticks_per_second)} if raw.timed else {}),
        },
        schema=_schema(raw, catalogue, Feature("", "text", word_count, words)),
        catalogue=catalogue,
        facts=dict(metadata["audit"]),
        ticks=Column(columns["time"], rows),
        ticks_per_second=ticks_per_second,
        words=word_columns,
        fields=fields,
    )
    stored_as = (folder / MANIFEST, folder / "columns" / FACTS, folder / protocol / FACTS)
    identity = hashlib.sha256(b"".join(path.read_bytes() for path in stored_as)).hexdigest()
    object.__setattr__(timelines, "origin", Origin(folder, identity))
    return timelines


def _names(raw: Raw) -> tuple[dict[str, str], dict[str, str]]:
    """Return which stored column each column of numbers and each column of texts is."""
    taken = {"item", "timestamp", *raw.bags}
    names = {_free(name, taken): own for own, name in raw.stored.items()}
    of_kind = lambda kind: {name: own for name, own in names.items() if own.startswith(kind)}  # noqa: E731
    return of_kind("level"), of_kind("text")


def _fields(raw: Raw, metadata: Mapping[str, Any], *, ties: str, seed: int) -> Fields:
    """Return the reader's fields by the names of the schema's features, with what the whole dataset told of them."""
    numbers, texts = _names(raw)
    edges = {name: tuple(found) for name, found in metadata["edges"].items()}

    def number(name: str) -> Number:
        found = raw.number(name)
        return dataclasses.replace(found, edges=edges.get(name, found.edges))

    return dataclasses.replace(
        raw.fields,
        timed=raw.timed,
        unit=raw.fields.unit or metadata["audit"].get("time_unit", ""),
        ticks_per_second=metadata["ticks_per_second"] if raw.timed else 1000 if metadata.get("fractions") else 1,
        numbers={name: number(raw.stored[own]) for name, own in numbers.items()},
        texts={name: raw.text(raw.stored[own]) for name, own in texts.items()},
        ties=ties,
        seed=seed,
    )


def _free(name: str, taken: set[str]) -> str:
    """Return the name, or where it is taken the name with a number, and take it."""
    tries = (f"{name}_{n}" if n > 1 else name for n in range(1, len(taken) + 2))
    free = next(candidate for candidate in tries if candidate not in taken)
    taken.add(free)
    return free


def _schema(raw: Raw, catalogue: Catalogue, text: Feature) -> Schema:
    numbers, texts = _names(raw)
    taken = {"item", *numbers, *texts, *raw.bags}
    return Schema(
        (
            Feature("item", "item", len(catalogue.titles)),
            *(Feature(name, "ordinal", raw.ordinals[raw.stored[own]] + 1) for name, own in numbers.items()),
            *(Feature(name, "multi", max(len(catalogue.vocab[name]), 2), catalogue.multi[name].shape[1]) for name in raw.bags),
            *(Feature(name, "text", text.size, text.width) for name in texts),
            *((Feature(_free("gap", taken), "time", GAP_BUCKETS),) if raw.timed else ()),
        )
    )


def _texts(columns: Arrays, name: str, rows: np.ndarray) -> Texts:
    return Texts(columns[f"{name}.offsets"], columns[f"{name}.utf8"], rows)


def _columns(builder: tfds.core.DatasetBuilder, raw: Raw) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns of a prepared dataset's records."""
    source = builder.as_data_source(split="train")
    # Of each name that holds offsets, where the next stretch begins.
    ends = dict.fromkeys(("offsets", "user.offsets", *(f"text_{i}.offsets" for i in range(len(raw.texts)))), 0)
    yield {name: np.zeros(1, np.int64) for name in ends}
    for first in range(0, len(source), RECORDS):
        # Several at a time: one read for each costs more than all decoding.
        for record in source.__getitems__(range(first, min(first + RECORDS, len(source)))):
            stretch = _of_record(record, raw)
            for name in ends:
                offsets = ends[name] + np.cumsum(stretch[name], dtype=np.int64)
                ends[name] = int(offsets[-1])
                stretch[name] = offsets
            yield stretch


def _of_record(record: dict[str, Any], raw: Raw) -> dict[str, np.ndarray]:
    """Return what a record holds, each user's events by time; in the place of offsets the lengths of what they divide."""
    lengths = np.asarray(record["events"], np.int64)
    order = np.lexsort((record["time"], np.repeat(np.arange(len(lengths)), lengths)))
    users = apart(record["user"].decode())
    stretch = {"offsets": lengths, "user.number": np.array([hash_key(user) for user in users], np.uint64)}
    stretch |= {name: record[name][order] for name in ("item", "time")}
    stretch |= _utf8("user", users)
    for own in raw.stored:
        if own.startswith("text"):
            texts = apart(record[own].decode())
            stretch |= _utf8(own, [texts[row] for row in order.tolist()])
        else:
            stretch[own] = record[own][order]
    return stretch


def apart(joined: str) -> list[str]:
    """Return the texts that `prepare.py` joined."""
    texts = joined.split(SEPARATOR)
    if ESCAPE not in joined:
        return texts
    return [text.replace(f"{ESCAPE}1", SEPARATOR).replace(f"{ESCAPE}0", ESCAPE) for text in texts]


def _utf8(name: str, texts: Iterable[str]) -> dict[str, np.ndarray]:
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    return {f"{name}.offsets": lengths, f"{name}.utf8": np.frombuffer(b"".join(encoded), np.uint8)}


def _order(columns: Arrays, *, ties: str, seed: int, min_events: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the users that are long enough, the offsets of their events, and the row of each event."""
    total, number = 0, np.uint32 if len(columns["item"]) < 2**32 else np.int64
    yield {"offsets": np.zeros(1, np.int64)}
    for chunk in chunks(columns["offsets"]):
        lengths = np.diff(chunk.offsets)
        long = lengths >= min_events
        rows = _broken_ties(chunk, columns, ties=ties, seed=seed)[np.repeat(long, lengths)]
        offsets = total + np.cumsum(lengths[long])
        total += len(rows)
        yield {"users": chunk.first + np.flatnonzero(long), "offsets": offsets, "rows": rows.astype(number)}


def _broken_ties(chunk: Chunk, columns: Arrays, *, ties: str, seed: int) -> Int[np.ndarray, " n"]:
    """Return the rows of a chunk's events in their order. Only rows that tie change places, and only among themselves."""
    item, time, users = columns["item"][chunk.events], columns["time"][chunk.events], chunk.users
    rows = np.arange(chunk.events.start, chunk.events.stop)
    same = (np.diff(time) == 0) & (np.diff(users) == 0)
    tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
    keys = columns["user.number"][users[tied]]
    order = order_events(users[tied], keys, item[tied], time[tied], ties=ties, seed=seed)
    rows[tied] = rows[tied[order]]
    return rows


def _words(columns: Arrays, files: Iterable[str], size: int, width: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the ids of the words of texts."""
    number = np.uint16 if size <= 2**16 else np.int32
    for chunk in chunks(columns["offsets"]):
        rows = np.arange(chunk.events.start, chunk.events.stop)
        yield {file: word_ids(_texts(columns, file, rows)[:], size, width).astype(number) for file in files}


def _catalogue(metadata: Mapping[str, Any]) -> Catalogue:
    multi: dict[str, Int[np.ndarray, "V W"]] = {}
    for name, bags in metadata["bags"].items():
        multi[name] = np.zeros((len(bags) + 1, max(max(map(len, bags), default=1), 1)), np.int32)
        for item, bag in enumerate(bags, 1):
            multi[name][item, : len(bag)] = bag
    return Catalogue(
        titles=["", *metadata["titles"]],
        keys=["", *metadata["keys"]],
        multi=multi,
        vocab={name: ["", *values] for name, values in metadata["vocab"].items()},
    )
