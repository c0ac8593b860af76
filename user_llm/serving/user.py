"""A user as an application stores it: the user tokens, and the part of the history that later calls need.

    USERLLM2 | length of the header | header (JSON) | arrays, compressed | CRC-32 of all before it

The bytes hold user tokens as 8-bit whole numbers and a scale for each token (its largest absolute value divided by 127). Reading
the bytes runs no code from them.

Axis letters: M user tokens, U width of a user token, E kept events, A features of an event, S different items of all events.
"""

import dataclasses
import json
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from user_llm.common.records import anything, misfit, positive_whole_number, text, whole_number
from user_llm.data.schema import Schema
from user_llm.data.timelines import Timelines, order_events, time_gap_bucket

MAGIC = b"USERLLM2"
MAX_BYTES = 1 << 28  # the most bytes that a user's arrays may have uncompressed
ARRAYS = {"tokens": "i1", "scales": "<f4", "events": "<i4", "ticks": "<i8", "seen": "<i4"}
HEADER = {
    "model": text, "key": anything, "count": whole_number, "unknown": whole_number, "before": anything,
    "last_unknown": anything, "ticks_per_second": positive_whole_number, "shapes": dict.fromkeys(ARRAYS, [whole_number]),
    "added?": text,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class User:
    """A user, encoded by one model. It is immutable: `Personalizer.update` returns another `User`.

    A user keeps its latest events (`Personalizer.keep` says how many), because an update encodes them again. Of the events before
    these, and of events whose item the model does not know, it keeps their number and the time of the latest one.

    Attributes:
      model: the identity of the model that encoded the user; no other model can use the tokens.
      tokens: the user tokens; there are none for a user without events.
      events: the features of the kept events, oldest first.
      ticks: the time of each kept event in ticks. Where the training data has orders instead of times, these are the orders.
      before: the tick of the event before the kept ones; None if there is no such event.
      seen: the numbers of the different items of all events, ascending.
      count: the number of all events, those that are no longer kept included.
      unknown: the number of events that were left out because the model does not know their item.
      last_unknown: the tick of the latest event that was left out; None if none was.
      key: a number that stands for the user's id in the hash that orders events of the same time.
      ticks_per_second: the number of ticks in a second, or in one step of an order.
      added: the mark of the model's added items (`growth.py`); empty if it had none. See `growth.py`.
    """

    model: str
    tokens: Float[np.ndarray, "M U"]
    events: Int[np.ndarray, "E A"]
    ticks: Int[np.ndarray, " E"]
    before: int | None
    seen: Int[np.ndarray, " S"]
    count: int
    unknown: int
    last_unknown: int | None
    key: int
    ticks_per_second: int
    added: str = ""

    @property
    def items(self) -> Int[np.ndarray, " E"]:
        """The item numbers of the kept events, oldest first."""
        return self.events[:, 0]

    @property
    def last_time(self) -> float | None:
        """The time of the latest event in seconds since 1970, or its order; None without events."""
        return float(self.ticks[-1]) / self.ticks_per_second if len(self.ticks) else None

    def to_bytes(self) -> bytes:
        """Return the user as bytes, to be stored.

            User.from_bytes(user.to_bytes())

        The user tokens are rounded to 8 bits; everything else is exact.
        """
        scales = np.maximum(np.abs(self.tokens).max(axis=1, initial=0), 1e-30).astype(np.float32) / 127
        arrays = {
            "tokens": np.rint(self.tokens / scales[:, None]), "scales": scales, "events": self.events.T, "ticks": _steps(self.ticks),
            "seen": _steps(self.seen),
        }  # fmt: skip
        header = {
            "model": self.model, "key": self.key, "count": self.count, "unknown": self.unknown, "before": self.before,
            "last_unknown": self.last_unknown, "ticks_per_second": self.ticks_per_second,
            "shapes": {name: list(array.shape) for name, array in arrays.items()}, **({"added": self.added} if self.added else {}),
        }  # fmt: skip
        parts = b"".join(_planes(array.astype(ARRAYS[name])) for name, array in arrays.items())
        packed = json.dumps(header, separators=(",", ":")).encode()
        whole = MAGIC + len(packed).to_bytes(4, "little") + packed + zlib.compress(parts, 9)
        return whole + zlib.crc32(whole).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> "User":
        """Return the user from the bytes that `to_bytes` returned.

        Raises:
          ValueError: the bytes are cut off, altered or not those of a user.
        """
        try:
            header, arrays = _unpack(bytes(data))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error) as error:
            raise ValueError(f"These bytes hold no user ({error}): store what User.to_bytes returns, unaltered.") from None
        return cls(
            model=header["model"], tokens=arrays["tokens"].astype(np.float32) * arrays["scales"][:, None],
            events=np.ascontiguousarray(arrays["events"].T), ticks=np.cumsum(arrays["ticks"]), before=header["before"],
            seen=np.cumsum(arrays["seen"], dtype=np.int32), count=header["count"], unknown=header["unknown"],
            last_unknown=header["last_unknown"], key=header["key"],
            ticks_per_second=header["ticks_per_second"], added=header.get("added", ""),
        )  # fmt: skip


def check_user(user: Any, model: str, marks: Collection[str]) -> None:
    """Check that a user was encoded by the model of an identity.

    Args:
      marks: the marks of the model's added items; see `growth.py`.

    Raises:
      ValueError: the user is of another model, or of one with other further items, or is no `User` at all.
    """
    if not isinstance(user, User):
        raise ValueError(f"{type(user).__name__} is no user: pass a User, such as encode returns.")
    if user.model != model:
        raise ValueError(
            f"This user was encoded by the model {user.model}, and this one is {model}: encode their events again."
        )
    if user.added not in marks:
        raise ValueError(
            "This user was encoded with items that this model does not have, or has in another order: add the same items, or encode "
            "their events again."
        )


def _steps(numbers: np.ndarray) -> np.ndarray:
    """Return the first number and then the differences of neighbours. They are small, and so compress well; `np.cumsum` undoes this."""
    steps = numbers.copy()
    steps[1:] -= numbers[:-1]
    return steps


def _planes(array: np.ndarray) -> bytes:
    """Return the lowest byte of every number, then the next byte of every number, and so on.

    The high bytes of small numbers are zeros, which compress well side by side.
    """
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
    for name in ("before", "last_unknown"):
        if not (header[name] is None or whole_number(header[name])):
            raise ValueError(f"the header's {name!r} is no whole number")
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


def from_timelines(
    timelines: Timelines,
    those: Int[np.ndarray, " n"],
    *,
    keep: int | None,
    model: str,
    keys: Sequence[int],
    unknown: Sequence[Int[np.ndarray, " X"]],
    ticks_per_second: int,
    added: str = "",
) -> list[User]:
    """Return users with the events of timelines but without user tokens.

    Args:
      those: the places of the users in the timelines.
      keep: the number of latest events that a user keeps; None for all.
      keys: for each user, its attribute `key`.
      unknown: for each user, the ticks of the events that are left out, because the model does not know their item.
      model, ticks_per_second, added: attributes of all users.
    """
    firsts, lasts = timelines.offsets[those], timelines.offsets[those + 1]
    starts = firsts if keep is None else np.maximum(lasts - keep, firsts)
    numbers = np.concatenate([np.arange(0), *map(np.arange, starts, lasts)])
    edges = np.cumsum(lasts - starts)[:-1]  # the features of all users are made at once, and then divided
    events, ticks = (
        np.split(timelines.features(numbers), edges),
        np.split(np.asarray(timelines.order[numbers], np.int64), edges),
    )
    return [
        User(
            model=model, tokens=np.zeros((0, 0), np.float32), events=events[n].copy(), ticks=ticks[n].copy(),
            before=int(timelines.order[start - 1]) if start > first else None,
            seen=np.unique(timelines.item[first:last]).astype(np.int32), count=last - first, unknown=len(unknown[n]),
            last_unknown=_latest(unknown[n]), key=keys[n], ticks_per_second=ticks_per_second, added=added,
        )
        for n, (first, start, last) in enumerate(zip(firsts.tolist(), starts.tolist(), lasts.tolist(), strict=True))
    ]  # fmt: skip


def joined(
    user: User,
    more: User,
    schema: Schema,
    *,
    unknown: Int[np.ndarray, " X"],
    keep: int | None,
    ties: str,
    seed: int,
) -> User:
    """Return a user with the events of `more` added, as if all events had come together. The result has no user tokens.

    An event that `user` has already is not added again:

      - An event that `user` keeps is known by its item and its tick.
      - The user does not keep all events. A further event is taken for one of the older ones if it may be one: it comes before the
        kept events, it is not later than the latest one that is not kept, and the user has had its item.
      - An event with an unknown item is taken for one of those counted if it is not later than the latest of them. The count of unknown
        events never falls: an event whose item the model has learned since is counted among the events as well.

    Args:
      more: a user who keeps all of the further events.
      unknown: the ticks of the further events that are left out, because the model does not know their item.
      keep: the number of latest events that the result keeps; None for all.
      ties, seed: how events of the same tick are ordered; see `order_events`.
    """
    kept = set(zip(user.items.tolist(), user.ticks.tolist(), strict=True))
    fresh = np.array([pair not in kept for pair in zip(more.items.tolist(), more.ticks.tolist(), strict=True)], bool)
    events, ticks = np.concatenate([user.events, more.events[fresh]]), np.concatenate([user.ticks, more.ticks[fresh]])
    none, keys = np.zeros(len(ticks), np.int64), np.full(len(ticks), user.key, np.uint64)
    order = order_events(none, keys, events[:, 0], ticks, ties=ties, seed=seed)
    if user.before is not None:
        earlier = np.arange(len(order)) < (np.argmin(order) if len(user.ticks) else len(order))
        had = earlier & (ticks[order] <= user.before) & np.isin(events[order, 0], user.seen)
        order = order[~had]
    added = len(order) - len(user.ticks)
    drop = 0 if keep is None else max(len(order) - keep, 0)
    events, ticks = events[order], ticks[order]
    before = _latest(ticks[:drop], user.before)
    events, ticks = events[drop:], ticks[drop:]
    for feature in schema:
        if feature.kind == "time" and len(ticks):
            gaps = np.diff(ticks, prepend=ticks[:1] if before is None else np.int64(before)) // user.ticks_per_second
            events[:, schema.columns(feature.name).start] = time_gap_bucket(gaps)
    if user.last_unknown is not None:
        unknown = unknown[unknown > user.last_unknown]
    return dataclasses.replace(
        user, tokens=np.zeros((0, 0), np.float32), events=events, ticks=ticks, before=before,
        seen=np.union1d(user.seen, more.seen).astype(np.int32), count=user.count + added,
        unknown=user.unknown + len(unknown), last_unknown=_latest(unknown, user.last_unknown), added=more.added,
    )  # fmt: skip


def _latest(ticks: Int[np.ndarray, " n"], other: int | None = None) -> int | None:
    """Return the latest of some ticks and another one; None if there is none."""
    return max([*ticks[-1:].tolist(), *([] if other is None else [other])], default=None)


def unknown_user(model: str, width: int, key: int, ticks_per_second: int, added: str = "") -> User:
    """Return a user without events.

    Args:
      width: the number of features of an event.
      model, key, ticks_per_second, added: attributes of the `User`.
    """
    none = np.zeros(0, np.int64)
    return User(
        model=model, tokens=np.zeros((0, 0), np.float32), events=np.zeros((0, width), np.int32), ticks=none, before=None,
        seen=none.astype(np.int32), count=0, unknown=0, last_unknown=None, key=key,
        ticks_per_second=ticks_per_second, added=added,
    )  # fmt: skip
