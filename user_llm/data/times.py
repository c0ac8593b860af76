"""Times as they are: whole numbers and fractions, in a unit that is decided for a whole column, or dates of ISO 8601.

A reader hands over each time as two int64: the whole part, rounded down, and the fraction in 10^-18 of it. What the whole part
counts is known (dates: seconds since 1970) or decided from all of them, and then both become ticks, whole numbers that sort as the
times do and are equal where these are.
"""

import datetime
import decimal
import re
import zoneinfo
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from user_llm.data import columns
from user_llm.data.columns import MANTISSA, WHOLE, Column, WrongType, plain
from user_llm.data.values import EXACT, NUMBER

FRACTION = 10**18  # parts of one
UNITS = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}  # in a second
COMPACT = {"YYYYMMDD": (19000101, 21001231), "YYYYMMDDHHMMSS": (19000101000000, 21001231235959)}  # of 1900 to 2100
ISO = re.compile(
    r"(\d{4})(-?)(\d\d)\2(\d\d)"
    r"(?:[T ]?(\d\d)(?::?(\d\d)(?::?(\d\d)(?:[.,](\d+))?)?)?)?"
    r"\s*(?:(Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)|\[?([A-Za-z][A-Za-z_]*(?:/[A-Za-z0-9_+-]+)+)\]?)?",
    re.ASCII,
)
EPOCH = datetime.date(1970, 1, 1).toordinal()
YEAR_1971, YEAR_2100 = 31_536_000, 4_102_444_800  # seconds since 1970
# Years of nearly all events, by which times in several units are told, and where these years begin and end in seconds since 1970. Fewer
# than a share of MIXED in another unit may be single odd values, such as the largest number of 32 bits.
RECENT, RECENT_SECONDS, MIXED = (1995, 2099), (788_918_400, YEAR_2100), 0.01


class Times(NamedTuple):
    """Times of a column.

    Attributes:
      whole, fraction: int64, as the module says.
      dates: which of them are dates, whose whole parts are seconds since 1970, and no numbers of a unit unknown.
      bad: which cannot be read.
    """

    whole: Int[np.ndarray, " rows"]
    fraction: Int[np.ndarray, " rows"]
    dates: Bool[np.ndarray, " rows"]
    bad: Bool[np.ndarray, " rows"]


def read(column: Column, *, order: bool = False, compact: bool = False) -> Times:
    """Return a column's times, or with `order` the numbers that order events.

    Dates are ISO 8601 with or without a time of day, fractions of a second and an offset or zone (without one, UTC); with `compact`
    what looks like a number, such as 20240501160000, is a date as well.

    Raises:
      WrongType: a type that holds no times.
    """
    if isinstance(column, pa.Array):
        column = plain(column)
        kind, size = column.type, len(column)
        none = column.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            if order:
                raise WrongType(str(kind))
            return _typed(column, none)
        if not compact and pa.types.is_integer(kind) and kind != pa.uint64():
            values = column.cast(pa.int64()).fill_null(0).to_numpy()
            return Times(values, np.zeros(size, np.int64), np.zeros(size, bool), none)
        if not compact and pa.types.is_floating(kind):
            values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
            if kind != pa.float64() and (np.abs(values[np.isfinite(values)]) > MANTISSA[kind]).any():
                raise WrongType(f"{kind}, in which numbers above {MANTISSA[kind]} are rounded")
            return _floats(values)
        if not any(check(kind) for check in (pa.types.is_binary, pa.types.is_null, pa.types.is_integer, pa.types.is_decimal,
                                             pa.types.is_floating)):  # fmt: skip
            raise WrongType(str(kind))
    texts, bad = columns.text(column, exact=False)
    texts = pc.utf8_trim_whitespace(texts)
    return _texts(texts, bad | columns.missing(texts), dates=not order, compact=compact)


def _typed(column: pa.Array, none: np.ndarray) -> Times:
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    values = column.cast(pa.int64()).fill_null(0).to_numpy()
    ticks = UNITS[column.type.unit]
    whole, rest = np.divmod(values, ticks)
    return Times(whole, rest * (FRACTION // ticks), np.ones(len(values), bool), none)


def _floats(values: np.ndarray) -> Times:
    """Return floats exactly. A float that stands for a decimal of at most 6 digits is that decimal, as it is in text."""
    bad = ~(np.abs(values) < 2.0**63)  # NaN and inf as well
    values = np.where(bad, 0, values)
    floor = np.floor(values)
    rest = values - floor  # exact, and so distinct floats stay apart
    fraction = np.minimum(np.rint(rest * FRACTION), FRACTION - 1024).astype(np.int64)
    for scale in (1_000_000, 1000) if rest.any() else ():
        digits = np.rint(rest * scale)
        decimals = floor * scale + digits
        # Below `EXACT` both numbers of the quotient are exact, and so it is the float that is nearest to the decimal.
        stands = (np.abs(decimals) < EXACT) & (decimals / scale == values)
        fraction = np.where(stands, digits.astype(np.int64) * (FRACTION // scale), fraction)
    return Times(floor.astype(np.int64), fraction, np.zeros(len(values), bool), bad)


def _texts(texts: pa.Array, bad: np.ndarray, *, dates: bool, compact: bool) -> Times:
    size = len(texts)
    zeros = np.zeros(size, np.int64)
    if not compact:
        whole = pc.match_substring_regex(texts, WHOLE).fill_null(False)
        if pc.all(whole).as_py() or size == 0:
            return Times(texts.cast(pa.int64()).to_numpy(), zeros, np.zeros(size, bool), bad)
    if dates and not bad.any() and (quick := _quick(texts)) is not None:
        return quick
    parts = np.zeros((size, 2), np.int64)
    is_date, bad = np.zeros(size, bool), bad.copy()
    for row, value in enumerate(texts.to_pylist()):
        if bad[row]:
            continue
        try:
            numeric = not compact and NUMBER.fullmatch(value)
            if not numeric and not dates:
                raise ValueError
            parts[row] = exact(value) if numeric else moment(value)
            is_date[row] = not numeric
        except (ValueError, OverflowError):
            bad[row] = True
    return Times(parts[:, 0], parts[:, 1], is_date, bad)


def _quick(texts: pa.Array) -> Times | None:
    """Return the dates of a column that is all of one usual form, or None."""
    if not pc.all(pc.match_substring_regex(texts, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}($|[T ][0-9]{2}:)")).as_py():
        return None
    if pc.any(pc.match_substring_regex(texts, r":.*[+-](1[6-9]|[2-9][0-9])")).as_py():
        return None  # an offset of 16 hours or more, which is none
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return _typed(texts.cast(kind), np.zeros(len(texts), bool))
        except pa.ArrowInvalid:
            continue
    return None


def exact(text: str) -> tuple[int, int]:
    """Return the whole part of a decimal number, rounded down, and its fraction in 10^-18.

    Raises:
      ValueError: it does not fit into 64 bits.
    """
    value = decimal.Decimal(text)
    if value.adjusted() > 19:
        raise ValueError
    with decimal.localcontext(prec=60):
        whole, fraction = divmod(int((value * FRACTION).to_integral_value(decimal.ROUND_FLOOR)), FRACTION)
    if not -(2**63) <= whole < 2**63:
        raise ValueError
    return whole, fraction


def moment(text: str) -> tuple[int, int]:
    """Return a date's seconds since 1970 and their fraction in 10^-18.

    Raises:
      ValueError: no such date.
    """
    match = ISO.fullmatch(text)
    if not match:
        raise ValueError
    year, _, month, day, *clock, fraction, offset, zone = match.groups()
    hour, minute, second = (int(part or 0) for part in clock)
    if hour > 24 or minute > 59 or second > 60 or (hour == 24 and minute + second):  # 24:00 and leap seconds end a day
        raise ValueError
    date = datetime.date(int(year), int(month), int(day))
    seconds = (date.toordinal() - EPOCH) * 86400 + hour * 3600 + minute * 60 + second
    if offset and offset[0] in "+-":
        digits = offset[1:].replace(":", "").ljust(4, "0")
        if int(digits[:2]) > 15 or int(digits[2:]) > 59:
            raise ValueError
        seconds -= int(offset[0] + "1") * (int(digits[:2]) * 3600 + int(digits[2:]) * 60)
    if zone:
        seconds -= _zone_offset(zone, date, seconds)
    return seconds, int((fraction or "0")[:18].ljust(18, "0"))


def _zone_offset(zone: str, date: datetime.date, seconds: int) -> int:
    try:
        zone_info = zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, OSError):
        raise ValueError from None
    local = datetime.datetime.combine(date, datetime.time()) + datetime.timedelta(seconds=seconds % 86400)
    offset = local.replace(tzinfo=zone_info).utcoffset()
    return 0 if offset is None else int(offset.total_seconds())


def in_seconds(found: Times, unit: str) -> Times:
    """Return times whose numbers, which count a unit, are turned into seconds; fractions are kept to 10^-18 s.

    Args:
      unit: of UNITS. Of another one, as of orders and of COMPACT, the numbers stay what they are.
    """
    per_second = np.where(found.dates, 1, UNITS.get(unit, 1))
    whole, rest = np.divmod(found.whole, per_second)
    return found._replace(whole=whole, fraction=rest * (FRACTION // per_second) + found.fraction // per_second)


def as_ticks(found: Times, per_second: int) -> tuple[Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """Return the ticks of times in seconds, rounded down, and which times are too far from 1970 for 64 bits."""
    most = 2**63 // per_second - 1
    far = (found.whole > most) | (found.whole < -most)
    return np.where(far, 0, found.whole) * per_second + found.fraction // (FRACTION // per_second), far


class Ticks(NamedTuple):
    """How a dataset's times become ticks.

    Attributes:
      unit: of the whole parts: one of UNITS or of COMPACT.
      per_second: ticks of a second.
      sql: of the ticks, from the columns `time` and `fraction`.
      rounded: whether ticks are coarser than the times, which span too many years.
    """

    unit: str
    per_second: int
    sql: str
    rounded: bool


def decide(counts: dict[str, Any], unit: str, *, timed: bool) -> Ticks:
    """Decide what a dataset's times count and how fine their ticks are.

    Without a unit given, numbers are in the coarsest unit in which the middle one of them lies before the year 5138, or within the
    same distance of 1970: s below 10^11, ms below 10^14, us below 10^17, and else ns.

    Args:
      counts: as `COUNTS` counts them.
      unit: of UNITS or COMPACT, or empty for one to be decided.
      timed: False if times only order events.

    Raises:
      ValueError: times of two units, of which none was given.
    """
    if not timed:
        return Ticks("", 1, "dense_rank() OVER (ORDER BY time, fraction)" if counts["fractions"] else "time", False)
    if unit in COMPACT:
        return Ticks(unit, 1, f"CAST(epoch(strptime(CAST(time AS VARCHAR), '{PATTERNS[unit]}')) AS BIGINT)", False)
    if not unit:
        unit = next((name for name in ("s", "ms", "us") if 2 * counts[name] > counts["rows"]), "ns")
        others = {name: counts[f"like_{name}"] for name in UNITS if name != unit and counts[f"like_{name}"]}
        if counts[f"like_{unit}"] and sum(others.values()) >= max(MIXED * counts["rows"], 2):
            found = ", ".join(f"{count} in {name}" for name, count in others.items())
            raise ValueError(
                f"Times in several units: most of the {counts['rows']} are in {unit}, but {found} by their size, as of {RECENT[0]} to "
                f"{RECENT[1]}. Write all in one unit, or set data.columns.time_unit if all are in one."
            )
    finest = next((digits for digits in (0, 3, 6) if not counts[f"finer_{digits}"]), 9)  # that the fractions need
    largest = max(abs(counts["earliest"]), abs(counts["latest"])) + 1
    fits = lambda digits: UNITS[unit] * 10**digits <= UNITS["ns"] and largest * 10**digits < 2**63  # noqa: E731
    digits = next((digits for digits in (9, 6, 3) if digits <= finest and fits(digits)), 0)
    sql = f"time * {10**digits} + fraction // {FRACTION // 10**digits}" if digits else "time"
    return Ticks(unit, UNITS[unit] * 10**digits, sql, rounded=bool(counts[f"finer_{digits}"]))


def compact(counts: dict[str, Any]) -> str:
    """Return the one of COMPACT that all times may be by their size, or nothing."""
    within = lambda first, last: first <= counts["earliest"] and counts["latest"] <= last  # noqa: E731
    return next((name for name, span in COMPACT.items() if counts["rows"] and not counts["fractions"] and within(*span)), "")


PATTERNS = {"YYYYMMDD": "%Y%m%d", "YYYYMMDDHHMMSS": "%Y%m%d%H%M%S"}
# What `decide` must know of all events, in SQL over the columns `time` and `fraction`.
COUNTS = {
    "rows": "count(*)",
    "earliest": "min(time)",
    "latest": "max(time)",
    "fractions": "count(*) FILTER (fraction <> 0)",
    **{f"finer_{digits}": f"count(*) FILTER (fraction % {FRACTION // 10**digits} <> 0)" for digits in (0, 3, 6, 9)},
    **{
        f"like_{unit}": f"count(*) FILTER (time >= {RECENT_SECONDS[0] * n} AND time < {RECENT_SECONDS[1] * n})"
        for unit, n in UNITS.items()
    },
    **{
        unit: f"count(*) FILTER (time > {-(10**top)} AND time < {10**top})" for unit, top in (("s", 11), ("ms", 14), ("us", 17))
    },
}
