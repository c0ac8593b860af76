"""A user as it is stored: user tokens, and of the history what an update, a recommendation and an explanation need.

    USERLLM1 | length of the header | header (JSON) | arrays, compressed | CRC-32 of all before it

In bytes, user tokens are 8-bit whole numbers with a scale for each token (the largest absolute value over 127). Nothing in them runs
when they are read.
"""

import dataclasses
import json
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from user_llm.common.records import anything, misfit, positive_whole_number, text, whole_number
from user_llm.data.schema import Schema
from user_llm.data.timelines import Timelines, order_events, time_gap_bucket

MAGIC = b"USERLLM1"
MAX_BYTES = 1 << 28  # of the arrays of a user
ARRAYS = {"tokens": "i1", "scales": "<f4", "events": "<i4", "ticks": "<i8", "seen": "<i4"}
HEADER = {
    "model": text, "key": anything, "count": whole_number, "unknown": whole_number, "before": anything,
    "ticks_per_second": positive_whole_number, "shapes": dict.fromkeys(ARRAYS, [whole_number]),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class User:
    """A user of one model.

    Attributes:
      model: identity of the model; no other can read the tokens.
      tokens: the user tokens, none for a user without events.
      events: features of the last events, oldest first.
      ticks: the times of these events, in the model's ticks, or their orders.
      before: the tick of the event before them; None if there is none.
      seen: the different items of all events, in order.
      count: all events, those that are not kept included.
      unknown: events that were left out because the model does not know their item.
      key: what ties between events of one time are broken by.
      ticks_per_second: how many ticks a second has, or an order.
    """

    model: str
    tokens: Float[np.ndarray, "M U"]
    events: Int[np.ndarray, "E A"]
    ticks: Int[np.ndarray, " E"]
    before: int | None
    seen: Int[np.ndarray, " S"]
    count: int
    unknown: int
    key: int
    ticks_per_second: int

    @property
    def items(self) -> Int[np.ndarray, " E"]:
        """The items of the last events, oldest first."""
        return self.events[:, 0]

    @property
    def last_time(self) -> float | None:
        """When the last event was, in seconds since 1970, or its order; None without events."""
        return float(self.ticks[-1]) / self.ticks_per_second if len(self.ticks) else None

    def to_bytes(self) -> bytes:
        """Return the user as bytes, its tokens rounded to 8 bits."""
        scales = np.maximum(np.abs(self.tokens).max(axis=1, initial=0), 1e-30).astype(np.float32) / 127
        arrays = {
            "tokens": np.rint(self.tokens / scales[:, None]), "scales": scales, "events": self.events.T, "ticks": _steps(self.ticks),
            "seen": _steps(self.seen),
        }  # fmt: skip
        header = {
            "model": self.model, "key": self.key, "count": self.count, "unknown": self.unknown, "before": self.before,
            "ticks_per_second": self.ticks_per_second, "shapes": {name: list(array.shape) for name, array in arrays.items()},
        }  # fmt: skip
        parts = b"".join(_planes(array.astype(ARRAYS[name])) for name, array in arrays.items())
        packed = json.dumps(header, separators=(",", ":")).encode()
        whole = MAGIC + len(packed).to_bytes(4, "little") + packed + zlib.compress(parts, 9)
        return whole + zlib.crc32(whole).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> "User":
        """Return the user that `to_bytes` made bytes of.

        Raises:
          ValueError: bytes that are cut off, altered, or of something else.
        """
        try:
            header, arrays = _unpack(bytes(data))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error) as error:
            raise ValueError(f"These bytes hold no user ({error}): store what User.to_bytes returns, unaltered.") from None
        return cls(
            model=header["model"], tokens=arrays["tokens"].astype(np.float32) * arrays["scales"][:, None],
            events=np.ascontiguousarray(arrays["events"].T), ticks=np.cumsum(arrays["ticks"]), before=header["before"],
            seen=np.cumsum(arrays["seen"], dtype=np.int32), count=header["count"], unknown=header["unknown"], key=header["key"],
            ticks_per_second=header["ticks_per_second"],
        )  # fmt: skip


def _steps(numbers: np.ndarray) -> np.ndarray:
    """Return the first number and the differences of neighbours, which `np.cumsum` undoes: small numbers compress well."""
    return np.diff(numbers, prepend=numbers.dtype.type(0))


def _planes(array: np.ndarray) -> bytes:
    """Return the first bytes of all numbers, then the second ones, and so on: those of small numbers are zeros side by side."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    whole, check = data[:-4], data[-4:]
    if not whole.startswith(MAGIC):
        raise ValueError("they do not begin as a user's do")
    if zlib.crc32(whole) != int.from_bytes(check, "little"):
        raise ValueError("their checksum is wrong")
    start = len(MAGIC) + 4
    length = int.from_bytes(whole[len(MAGIC) : start], "little")
    header = json.loads(whole[start : start + length])
    if wrong := misfit(header, HEADER):
        raise ValueError(f"the header {wrong}")
    if not (header["before"] is None or whole_number(header["before"])):
        raise ValueError("the header's 'before' is no whole number")
    if not (type(header["key"]) is int and 0 <= header["key"] < 2**64):
        raise ValueError("the header's 'key' is no whole number of 64 bits")
    shapes = {name: tuple(header["shapes"][name]) for name in ARRAYS}
    sizes = {name: int(np.prod(shape, dtype=np.int64)) * np.dtype(ARRAYS[name]).itemsize for name, shape in shapes.items()}
    dims = {name: len(shape) for name, shape in shapes.items()}
    if dims != {"tokens": 2, "scales": 1, "events": 2, "ticks": 1, "seen": 1} or min(map(min, shapes.values())) < 0:
        raise ValueError("its arrays have other shapes")
    if (
        shapes["tokens"][0] != shapes["scales"][0]
        or shapes["events"][1] != shapes["ticks"][0]
        or sum(sizes.values()) > MAX_BYTES
    ):
        raise ValueError("its arrays do not fit each other")
    inflate = zlib.decompressobj()
    parts = inflate.decompress(whole[start + length :], sum(sizes.values()) + 1)
    if len(parts) != sum(sizes.values()):
        raise ValueError("its arrays are cut off")
    arrays, at = {}, 0
    for name, shape in shapes.items():
        kind = np.dtype(ARRAYS[name])
        planes = np.frombuffer(parts[at : at + sizes[name]], np.uint8).reshape(kind.itemsize, -1)
        arrays[name] = np.ascontiguousarray(planes.T).view(kind).reshape(shape)
        at += sizes[name]
    return header, arrays


def from_timeline(
    timelines: Timelines, user: int, *, keep: int | None, model: str, key: int, unknown: int, ticks_per_second: int
) -> User:
    """Return a user of whom nothing is encoded yet.

    Args:
      keep: the last events that are kept; None for all.
    """
    first, last = int(timelines.offsets[user]), int(timelines.offsets[user + 1])
    start = first if keep is None else max(last - keep, first)
    numbers, order = np.arange(start, last), timelines.order
    return User(
        model=model, tokens=np.zeros((0, 0), np.float32), events=timelines.features(numbers),
        ticks=np.asarray(order[numbers], np.int64), before=int(order[start - 1]) if start > first else None,
        seen=np.unique(timelines.item[first:last]).astype(np.int32), count=last - first, unknown=unknown, key=key,
        ticks_per_second=ticks_per_second,
    )  # fmt: skip


def joined(user: User, more: User, schema: Schema, *, keep: int | None, ties: str, seed: int) -> User:
    """Return a user with the events of another one too, as if all had come together; of its tokens nothing is left.

    An event of `more` that is kept already (the same item at the same time) counts once. Events older than all that are kept
    add to `count` and `seen` alone once as many as are kept are newer.
    """
    events, ticks = np.concatenate([user.events, more.events]), np.concatenate([user.ticks, more.ticks])
    item = events[:, 0]
    pairs = np.stack([item.astype(np.int64), ticks], axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    fresh = np.sort(first)
    twice = len(pairs) - len(fresh)
    none = np.zeros(len(fresh), np.int64)
    order = fresh[order_events(none, np.full(len(fresh), user.key, np.uint64), item[fresh], ticks[fresh], ties=ties, seed=seed)]
    drop = 0 if keep is None else max(len(order) - keep, 0)
    events, ticks = events[order], ticks[order]
    older = [tick for tick in (user.before, more.before) if tick is not None] + ([int(ticks[drop - 1])] if drop else [])
    before = max(older, default=None)
    events, ticks = events[drop:], ticks[drop:]
    for feature in schema:
        if feature.kind == "time" and len(ticks):
            gaps = np.diff(ticks, prepend=ticks[:1] if before is None else np.int64(before)) // user.ticks_per_second
            events[:, schema.columns(feature.name).start] = time_gap_bucket(gaps)
    return dataclasses.replace(
        user, tokens=np.zeros((0, 0), np.float32), events=events, ticks=ticks, before=before,
        seen=np.union1d(user.seen, more.seen).astype(np.int32), count=user.count + more.count - twice,
        unknown=user.unknown + more.unknown,
    )  # fmt: skip


def unknown_user(model: str, width: int, key: int, ticks_per_second: int) -> User:
    """Return a user without events, whose events would have `width` columns."""
    none = np.zeros(0, np.int64)
    return User(
        model=model, tokens=np.zeros((0, 0), np.float32), events=np.zeros((0, width), np.int32), ticks=none, before=None,
        seen=none.astype(np.int32), count=0, unknown=0, key=key, ticks_per_second=ticks_per_second,
    )  # fmt: skip
