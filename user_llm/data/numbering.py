"""Events in a database on disk: without duplicates, users and items numbered, times as ticks, numbers as levels.

The database holds columns of the program's own names alone: what a dataset or a user calls them never comes into SQL.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from absl import logging

from user_llm.data import times
from user_llm.data.raw import Raw

MEMORY = "1GB"  # of DuckDB, beyond which it sorts on disk
SAID = 1_000_000  # rows, after which a line says how far reading has come
# Ids that are numbers are ordered as numbers, before those that are not.
IN_ORDER = "try_cast({0} AS HUGEINT) NULLS LAST, {0}"


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A dataset's events in a database.

    Attributes:
      database: with the tables `kept` (events without duplicates), `users`, `items` (both numbered) and `catalogue`.
      rows, kept, users: counts of events, of those without duplicates, and of users.
      ticks: how times became whole numbers.
      fractions: whether any time is no whole number of its unit.
      edges: of each measured number, the values at which its next level begins (above which, not from which).
    """

    database: duckdb.DuckDBPyConnection
    rows: int
    kept: int
    users: int
    ticks: times.Ticks
    fractions: bool
    edges: dict[str, list[float]]

    def facts(self, raw: Raw) -> dict[str, int | str]:
        """Return what the audit says of reading: counts, and of times their unit and how many are of unlikely years.

        Where the unit was decided here and all times fall into 1970, a warning says so.
        """
        facts: dict[str, int | str] = {
            "rows": self.rows,
            "duplicates_dropped": self.rows - self.kept,
            "users_before_min_events": self.users,
            "bad_rows_left_out": raw.bad_rows.count,
        }
        if raw.timed:
            day = f"(time // {self.ticks.per_second})"
            early, first, late = self.database.sql(f"""
                SELECT count(*) FILTER (time < 0), count(*) FILTER (time >= 0 AND {day} < {times.YEAR_1971}),
                  count(*) FILTER ({day} >= {times.YEAR_2100})
                FROM kept
            """).fetchall()[0]
            if first == self.kept > 0 and not raw.unit:
                logging.warning(
                    "All times are of 1970 if they count %s since then. If they count something else, such as days, write them as dates.",
                    self.ticks.unit,
                )
            facts |= {"time_unit": self.ticks.unit, "ticks_per_second": self.ticks.per_second}
            facts |= {"events_before_1970": early, "events_after_2100": late, "times_rounded": int(self.ticks.rounded)}
        return facts


@contextlib.contextmanager
def number_events(raw: Raw, scratch: Path) -> Iterator[Numbered]:
    """Read a dataset into a database in the folder `scratch`.

    Raises:
      ValueError: what its reader refuses, or times that are not of the unit that they are said to be.
    """
    with duckdb.connect(str(scratch / "events.duckdb")) as database:
        database.execute(f"SET memory_limit = '{MEMORY}'; SET enable_progress_bar = false")
        database.execute("SET temp_directory = $folder", {"folder": str(scratch)})
        for name, schema, source in (("events", raw.event_schema, raw.events), ("published", raw.item_schema, raw.items)):
            _store(database, name, schema, source())
        counts = _row(database, ", ".join(f"{sql} AS {name}" for name, sql in times.COUNTS.items()))
        ticks = _ticks(database, raw, counts)
        edges = {own: _edges(database, own, raw.ordinals[name] - 1) for own, name in raw.stored.items() if name in raw.measured}
        _number(database, raw, ticks, edges, exact=bool(counts["fractions"]))
        kept, users = (database.sql(f"SELECT count(*) FROM {name}").fetchall()[0][0] for name in ("kept", "users"))
        named = {raw.stored[own]: values for own, values in edges.items()}
        yield Numbered(database, counts["rows"], kept, users, ticks, bool(counts["fractions"]), named)


def _ticks(database: duckdb.DuckDBPyConnection, raw: Raw, counts: dict) -> times.Ticks:
    """Return how times become ticks; without a unit given, times are dates if all of them are of one form and of 1900 to 2100."""
    if not counts["rows"]:
        return times.Ticks("", 1, "time", rounded=False)
    unit = raw.unit
    if raw.timed and not unit and (form := times.compact(counts)):
        no_date = f"try_strptime(CAST(time AS VARCHAR), '{times.PATTERNS[form]}') IS NULL"
        unit = "" if _row(database, f"count(*) FILTER ({no_date}) AS others")["others"] else form
    return times.decide(counts, unit, timed=raw.timed)


def _row(database: duckdb.DuckDBPyConnection, columns: str) -> dict:
    table = database.sql(f"SELECT {columns} FROM events").to_arrow_table()
    return table.to_pylist()[0]


def _store(database: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Store all pieces as a table, with their rows' numbers."""
    numbered = schema.insert(0, pa.field("row", pa.int64()))
    faults: list[Exception] = []
    database.register("source", pa.RecordBatchReader.from_batches(numbered, _numbered(batches, numbered, faults)))
    try:
        database.execute(f"CREATE TABLE {name} AS SELECT * FROM source")
    except duckdb.Error:
        if faults:  # what a reader refuses, in its own words
            raise faults[0] from None
        raise
    database.unregister("source")


def _numbered(batches: Iterable[pa.RecordBatch], schema: pa.Schema, faults: list[Exception]) -> Iterator[pa.RecordBatch]:
    """Number the rows of all pieces, for no database keeps the publisher's order by itself; keep what ends it too early."""
    first = 0
    try:
        for batch in batches:
            rows = pa.array(np.arange(first, first + len(batch)))
            yield pa.RecordBatch.from_arrays([rows, *batch.columns], schema=schema)
            if (first + len(batch)) // SAID > first // SAID:
                logging.info("%d rows are read.", first + len(batch))
            first += len(batch)
    except Exception as fault:
        faults.append(fault)
        raise


def _edges(database: duckdb.DuckDBPyConnection, column: str, levels: int) -> list[float]:
    """Return the values above which the levels of a number begin, from the second on.

    At most `levels` values have a level each; of more, each level has an equal share of all events.
    """
    values = database.sql(
        f"SELECT DISTINCT {column} AS v FROM events WHERE v IS NOT NULL ORDER BY v LIMIT {levels + 1}"
    ).fetchall()
    if len(values) <= levels:
        return [value for (value,) in values[:-1]]
    # Counted by value, which goes to disk where it is much; quantiles hold all values in memory.
    shares = ", ".join(f"min(v) FILTER ({levels} * up_to >= {n} * total)" for n in range(1, levels))
    return list(
        database.sql(f"""
        SELECT {shares} FROM (
            SELECT v, sum(c) OVER (ORDER BY v) AS up_to, sum(c) OVER () AS total
            FROM (SELECT {column} AS v, count(*) AS c FROM events WHERE {column} IS NOT NULL GROUP BY 1)
        )
    """).fetchall()[0]
    )


def _number(
    database: duckdb.DuckDBPyConnection, raw: Raw, ticks: times.Ticks, edges: dict[str, list[float]], *, exact: bool
) -> None:
    """Make the tables of `Numbered` from those that were read."""
    columns = ['row, "user", item', f"{ticks.sql} AS time"]
    for own, name in raw.stored.items():
        if own in edges:
            above = " + ".join(f"CAST({own} > CAST({edge!r} AS DOUBLE) AS INTEGER)" for edge in edges[own]) or "0"
            columns.append(f"CASE WHEN {own} IS NULL THEN {raw.ordinals[name]} ELSE 1 + {above} END AS {own}")
        else:
            columns.append(own)
    # The same user, item and exact time.
    same = f'"user", item, events.time{", fraction" if exact else ""}'
    database.execute(f"""
        CREATE TABLE kept AS SELECT {", ".join(columns)} FROM events QUALIFY row_number() OVER (PARTITION BY {same} ORDER BY row) = 1
    """)
    for name, of in (("users", '"user"'), ("items", "item")):
        order = IN_ORDER.format(of)
        database.execute(f"""
            CREATE TABLE {name} AS
            SELECT {of}, row_number() OVER (ORDER BY {order}) AS number FROM (SELECT DISTINCT {of} FROM kept)
        """)
    database.execute("""
        CREATE TABLE catalogue AS SELECT items.number, items.item AS "key", published.* EXCLUDE (row, item)
        FROM items LEFT JOIN published ON items.item = published.item
        QUALIFY row_number() OVER (PARTITION BY items.item ORDER BY published.row) = 1
        ORDER BY items.number
    """)
