"""The rules by which raw events become ids. A model stores them, so that serving reads events exactly as training did.

A vocabulary holds the schema, the catalogue and the fields of the timelines that a model was trained on. It turns other events
into `Timelines` too. `Timelines.features` is therefore the only code that makes features.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from user_llm.common.records import misfit, positive_whole_number, text
from user_llm.data import times
from user_llm.data.declared import Rows
from user_llm.data.event_tables import Piece
from user_llm.data.fields import Fields
from user_llm.data.incoming import event_pieces
from user_llm.data.raw import BadRows, cleaned
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import GAP_BUCKETS, Catalogue, Timelines, hash_key, order_events

REMEDY = "mend the row or leave it out"
WIDEST = 1 << 16  # the most features that an event may have, more than any real schema has


class Read(NamedTuple):
    """The events of users, read by a vocabulary.

    Attributes:
      timelines: the events of each user in order. A user whose items are all unknown is there, without events.
      unknown_ticks: the ticks of the events that are left out because their item is not in the catalogue, user after user, ascending.
      unknown_offsets: user u has the ticks [unknown_offsets[u], unknown_offsets[u + 1]).
    """

    timelines: Timelines
    unknown_ticks: Int[np.ndarray, " X"]
    unknown_offsets: Int[np.ndarray, " U+1"]

    @property
    def unknown(self) -> Int[np.ndarray, " U"]:
        """The number of events of each user that are left out."""
        return np.diff(self.unknown_offsets)


@dataclasses.dataclass(frozen=True, eq=False)  # a catalogue's arrays have no truth value
class Vocabulary:
    """The rules by which raw events become ids.

    Attributes:
      name: the name of the dataset.
      schema: the features of an event.
      catalogue: the items.
      fields: the columns of raw events, and how each is read.

    Raises:
      ValueError: the parts do not fit each other.
    """

    name: str
    schema: Schema
    catalogue: Catalogue
    fields: Fields

    def __post_init__(self) -> None:
        if wrong := self._misfit():
            raise ValueError(f"The vocabulary of {self.name!r} does not hold together: {wrong}.")

    @classmethod
    def of(cls, timelines: Timelines) -> "Vocabulary":
        """Return the rules by which the given timelines were made."""
        return cls(timelines.name, timelines.schema, timelines.catalogue, timelines.fields)

    def read(self, events: Any) -> Read:
        """Return the timelines of users, in the order in which the users first occur in `events`.

        Events are read as in training. Events of the same user, item and exact time count as one. Events of one user at the same
        time are ordered by the same hash.

        Args:
          events: a list of dicts; a pandas, polars or Arrow table; or the path of a file, a folder or a glob. The columns are those
            that `fields` names. A column of numbers or texts may be absent where its values may be missing. If the column of users
            is absent, all events are of one user, whose id is "". A time is a number in the unit of `fields`, or a date.

        Raises:
          ValueError: a column is missing, or a row holds a value that cannot be read.
        """
        return self.gather(pa.Table.from_batches(self.batches(events), self.columns))

    def batches(self, events: Any, bad_rows: BadRows | None = None) -> Iterator[pa.RecordBatch]:
        """Yield events in batches with the columns `columns`. Values are read; events are not sorted, and items not looked up.

        Args:
          events: as in `read`.
          bad_rows: what happens to rows that cannot be read. If it is not given, the first such row is an error.

        Raises:
          ValueError: as in `read`.
        """
        fields, bad_rows = self.fields, bad_rows or BadRows(remedy=REMEDY)
        needed = [fields.item, fields.time, *(fields.numbers[name].column for name in self.needed)]
        there, pieces = event_pieces(events, fields.columns(), needed=needed, numbers=fields.only_numbers(), bad_rows=bad_rows)
        for piece in pieces:
            if len(piece.rows):
                yield self._batch(piece, fields.user in there, bad_rows)

    def gather(self, table: pa.Table) -> Read:
        """Return the timelines of users; `table` holds the rows of `batches`, in any order."""
        users, items = (table[name].combine_chunks().dictionary_encode() for name in ("user", "item"))
        keys = users.dictionary.to_pylist()
        user, whole, fraction = users.indices.to_numpy(), table["whole"].to_numpy(), table["fraction"].to_numpy()
        kept = _first_of_each(user, items.indices.to_numpy(), whole, fraction)
        numbers = np.array([self._item_numbers.get(key, 0) for key in items.dictionary.to_pylist()], np.int32)
        item = numbers[items.indices.to_numpy()]
        ticks, unknown = table["ticks"].to_numpy(), kept[item[kept] == 0]
        unknown = unknown[np.lexsort((ticks[unknown], user[unknown]))]
        unknown_ticks, unknown_offsets = ticks[unknown], _offsets(user[unknown], len(keys))
        kept = kept[item[kept] > 0]
        user, item, ticks = user[kept], item[kept], ticks[kept]
        # Ticks of orders are rounded. Events are therefore sorted by the exact orders.
        time = ticks if self.fields.timed else _ranks(whole[kept], fraction[kept])
        hashed = np.array([hash_key(key) for key in keys], np.uint64)[user]
        order = order_events(user, hashed, item, time, ties=self.fields.ties, seed=self.fields.seed)
        rows = kept[order]
        columns: dict[str, Any] = {name: table[f"level_{n}"].to_numpy()[rows] for n, name in enumerate(self.fields.numbers)} | {
            name: np.array(table[f"text_{n}"].take(pa.array(rows)).to_pylist(), np.dtypes.StringDType())
            for n, name in enumerate(self.fields.texts)
        }
        if self.fields.timed:
            columns["timestamp"] = ticks[order] / self.fields.ticks_per_second
        timelines = Timelines(
            name=self.name,
            user_keys=keys,
            offsets=_offsets(user, len(keys)),
            item=item[order],
            columns=columns,
            schema=self.schema,
            catalogue=self.catalogue,
            ticks=ticks[order],
            ticks_per_second=self.fields.ticks_per_second,
            fields=self.fields,
        )
        return Read(timelines, unknown_ticks, unknown_offsets)

    def encode(self, events: Any) -> Int[np.ndarray, "E A"]:
        """Return the features of one user's events in order, one row of features for each event; see `read`.

        Raises:
          ValueError: a column is missing, a row cannot be read, or the events are of several users.
        """
        timelines = self.read(events).timelines
        if len(timelines) > 1:
            first, second = timelines.user_keys[:2]
            raise ValueError(f"The events are of {len(timelines)} users, such as {first!r} and {second!r}: give those of one.")
        return timelines.features(np.arange(len(timelines.item)))

    def extended(self, catalogue: Catalogue) -> "Vocabulary":
        """Return the same rules for a catalogue that has further items behind those of this one."""
        return dataclasses.replace(self, schema=self.schema.with_items(len(catalogue.keys) - 1), catalogue=catalogue)

    def knows(self, item: str) -> bool:
        """Return whether there is an item of this id in the catalogue."""
        return item in self._item_numbers

    def title(self, item: str) -> str | None:
        """Return the title of an item; None if there is no item of this id in the catalogue."""
        return self.catalogue.titles[self._item_numbers[item]] if self.knows(item) else None

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as a JSON value without its catalogue, which `catalogue_file.py` writes."""
        names = {bag: values[1:] for bag, values in self.catalogue.vocab.items()}
        features = [dataclasses.asdict(feature) for feature in self.schema]
        return {"name": self.name, "schema": features, "names": names, "fields": self.fields.to_json()}

    @classmethod
    def from_json(cls, value: Any, catalogue: Catalogue) -> "Vocabulary":
        """Return the vocabulary from the value that `to_json` returned, and its catalogue.

        Raises:
          ValueError: a part is missing or of a wrong type, or the catalogue does not belong to this vocabulary.
        """
        schema, names = schema_and_names(value)
        if names != {bag: values[1:] for bag, values in catalogue.vocab.items()}:
            raise ValueError("The vocabulary's names of categories are not those of the catalogue.")
        return cls(value["name"], schema, catalogue, Fields.from_json(value["fields"]))

    def _misfit(self) -> str:
        """Return a message that says which parts do not fit each other; the empty string if all parts fit."""
        catalogue, fields = self.catalogue, self.fields
        if self.schema.num_items != len(catalogue.keys) - 1:
            return f"the schema has {self.schema.num_items} items and the catalogue {len(catalogue.keys) - 1}"
        if fields.timed and not fields.unit:
            return "the unit of times is not said"
        if self.schema.width > WIDEST:
            return f"an event has {self.schema.width} columns of features, more than {WIDEST}"
        for feature in self.schema:
            wrong = ""
            match feature.kind:
                case "multi" if feature.name not in catalogue.multi:
                    wrong = "is no bag of the catalogue"
                case "multi" if catalogue.multi[feature.name].shape[1] != feature.width:
                    wrong = f"has {feature.width} columns, and {catalogue.multi[feature.name].shape[1]} in the catalogue"
                case "multi" if len(catalogue.vocab[feature.name]) > feature.size:
                    wrong = f"has {feature.size} ids for {len(catalogue.vocab[feature.name]) - 1} names"
                case "time" if not fields.timed or feature.size < GAP_BUCKETS:
                    wrong = f"needs times and {GAP_BUCKETS} ids"
                case "text" if feature.name not in fields.texts:
                    wrong = "is read from no column of texts"
                case "ordinal" | "categorical" if feature.name not in fields.numbers:
                    wrong = "is read from no column of numbers"
                case "ordinal" | "categorical" if fields.numbers[feature.name].highest >= feature.size:
                    wrong = f"has {feature.size} ids and levels up to {fields.numbers[feature.name].highest}"
            if wrong:
                return f"feature {feature.name!r} {wrong}"
        return ""

    @functools.cached_property
    def needed(self) -> set[str]:
        """The names of the numbers that every event must have: they are features, and have no level for a missing number."""
        return {name for name, number in self.fields.numbers.items() if not number.missing and name in self.schema.names}

    @functools.cached_property
    def _item_numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.catalogue.keys) if number}

    @property
    def columns(self) -> pa.Schema:
        """The columns of the batches that `batches` yields."""
        columns = {"user": pa.string(), "item": pa.string(), **dict.fromkeys(("whole", "fraction", "ticks"), pa.int64())}
        columns |= {f"level_{n}": pa.int32() for n in range(len(self.fields.numbers))}
        return pa.schema(columns | {f"text_{n}": pa.string() for n in range(len(self.fields.texts))})

    def _batch(self, piece: Piece, has_user: bool, bad_rows: BadRows) -> pa.RecordBatch:
        """Return the values of a piece of events, read and checked.

        Args:
          has_user: whether the events have the column of users.
        """
        fields, rows = self.fields, Rows(piece)
        user = rows.ids(fields.user, "user") if has_user else rows.texts(fields.user, "user")
        item = rows.ids(fields.item, "item")
        found = rows.times(fields.time, order=not fields.timed, compact=fields.unit in times.COMPACT)
        found = times.in_seconds(found, fields.unit if fields.timed else "")
        ticks, far = times.as_ticks(found, fields.ticks_per_second)
        rows.refuse(far, fields.time, *(("time", ", too far from 1970") if fields.timed else ("order", ", too large")))
        levels = []
        for name, number in fields.numbers.items():
            numbers = rows.numbers(number.column)
            scale = f"; it is one of {', '.join(f'{one:g}' for one in number.allowed)}" if number.allowed else ""
            rows.refuse(number.refused(numbers, needed=name in self.needed), number.column, "number", scale)
            levels.append(pa.array(number.levels(numbers)))
        texts = []
        for one in fields.texts.values():
            found_texts = rows.texts(one.column)
            texts.append(cleaned(found_texts) if one.html else found_texts)
        good = rows.settle(bad_rows)
        numeric = map(pa.array, (found.whole, found.fraction, ticks))
        batch = pa.RecordBatch.from_arrays([user, item, *numeric, *levels, *texts], schema=self.columns)
        return batch if good is None else batch.filter(good)


def _first_of_each(*columns: np.ndarray) -> Int[np.ndarray, " k"]:
    """Return the number of the first row of each different combination of values, ascending."""
    order = np.lexsort((np.arange(len(columns[0])), *columns))
    differs = np.any([np.diff(column[order]) != 0 for column in columns], axis=0)
    return np.sort(order[np.insert(differs, 0, True)]) if len(order) else order


def _offsets(user: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " U+1"]:
    """Return where the rows of each of `count` users begin, and where the last one's end, once the rows are sorted by user."""
    return np.concatenate([[0], np.cumsum(np.bincount(user, minlength=count))]).astype(np.int64)


def _ranks(whole: Int[np.ndarray, " n"], fraction: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the rank of each number `whole + fraction`: equal numbers have equal ranks."""
    return np.unique(np.stack([whole, fraction], axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _text_lists(value: Any) -> bool:
    return isinstance(value, dict) and all(not misfit(names, [text]) for names in value.values())


_text_lists.__name__ = "object of lists of texts"
FEATURE = {"name": text, "kind": text, "size": positive_whole_number, "width": positive_whole_number}
FORM = {"name": text, "schema": [FEATURE], "names": _text_lists, "fields": lambda value: True}
KINDS = ("item", "categorical", "multi", "ordinal", "time", "text")


def schema_and_names(value: Any) -> tuple[Schema, dict[str, list[str]]]:
    """Return two parts of the value that `Vocabulary.to_json` returned: the schema, and the names of each bag's ids from 1.

    Raises:
      ValueError: a part is missing or of a wrong type.
    """
    if wrong := misfit(value, FORM):
        raise ValueError(f"The vocabulary: {wrong}.")
    for feature in value["schema"]:
        if feature["kind"] not in KINDS:
            raise ValueError(f"The vocabulary: feature {feature['name']!r} is of the unknown kind {feature['kind']!r}.")
    schema = Schema(tuple(Feature(*(feature[key] for key in FEATURE)) for feature in value["schema"]))
    return schema, value["names"]
