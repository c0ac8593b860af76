"""Events of people's own, of every kind that is easily read wrongly, with the right answer beside each."""

import dataclasses
import datetime
import decimal
import gzip
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from user_llm.data.event_files import Columns, find

HOUR = 1_714_543_200  # 2024-05-01 06:00 UTC
U = {"user": "u", "item": "i"}
T = U | {"time": "t"}
O = U | {"order": "t"}  # noqa: E741


@dataclasses.dataclass(frozen=True)
class Case:
    """Files by name (text, bytes, rows for JSON lines, or columns for Parquet) and what must come out: of `Events`, or words."""

    name: str
    files: dict
    columns: dict
    expect: dict | tuple
    source: str = ""
    bad_rows: str = "refuse"


def csv(*rows, header="u,i,t"):
    return "".join(f"{row}\n" for row in (header, *rows))


def times(values, **options):
    """Return a case's file: one user, with items a, b, c, ... at these times."""
    return {"e.parquet": {"u": ["1"] * len(values), "i": list("abcdefghijk"[: len(values)]), "t": pa.array(values, **options)}}


def int96(values):
    """Return a case's file of times as Spark and Hive have long written them: one user, with items a, b, c, ..."""
    file = io.BytesIO()
    table = pa.table(
        {"u": ["1"] * len(values), "i": list("abcdefghijk"[: len(values)]), "t": pa.array(values, pa.timestamp("us"))}
    )
    pq.write_table(table, file, use_deprecated_int96_timestamps=True)
    return {"e.parquet": file.getvalue()}


def at(*seconds):
    return {"times": {"1": list(map(float, seconds))}}


D, TS = datetime.date, datetime.datetime
SHANGHAI = datetime.timezone(datetime.timedelta(hours=8))
IDS = [  # ids of every type, and the text that they are
    ("zeros", ["007", "7"], ["007", "7"]),
    ("spaces", [" 7", "7 ", "7"], [" 7", "7", "7 "]),
    ("float", [7.0, 8.5], ["7", "8.5"]),
    ("float32", pa.array([7, 9], pa.float32()), ["7", "9"]),
    ("uint64", pa.array([2**64 - 1, 3], pa.uint64()), ["18446744073709551615", "3"]),
    ("int8", pa.array([-1, 3], pa.int8()), ["-1", "3"]),
    ("decimal", [decimal.Decimal("7.00"), decimal.Decimal("7.50")], ["7", "7.50"]),
    ("dictionary", pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y"]),
    ("large", pa.array(["x", "é"], pa.large_string()), ["x", "é"]),
    ("large_binary", pa.array([b"x", "é".encode()], pa.large_binary()), ["x", "é"]),
    ("fixed_binary", pa.array([b"ab", b"cd"], pa.binary(2)), ["ab", "cd"]),
    ("view", pa.array(["x", "y"], pa.string_view()), ["x", "y"]),
    ("bool", [True, False], ["false", "true"]),
    ("date", [D(2024, 5, 1)], ["2024-05-01"]),
    ("control", ["a\x1eb", "a\x1db", "a b", "a\nb"], ["a\nb", "a\x1db", "a\x1eb", "a b"]),
    ("null_named", ["none at all", "Nuller", "NA"], ["NA", "Nuller", "none at all"]),
]
NUMBERS = [  # numbers of every type, and whether equal ones have equal levels and larger ones larger ones; None is missing
    ("text", csv("1,a,1,4.5", "1,b,2, 1e1 ", "1,c,3,+3", "1,d,4,.5", header="u,i,t,n"), [4.5, 10, 3, 0.5]),
    (
        "missing",
        csv("1,a,1,", "1,b,2,nan", "1,c,3,-inf", "1,d,4,7", r"1,e,5,\N", header="u,i,t,n"),
        [None, None, None, 7, None],
    ),
    ("flags", csv("1,a,1,True", "1,b,2,false", "1,c,3,", header="u,i,t,n"), [1, 0, None]),
    ("beyond", csv("1,a,1,1e999", "1,b,2,5", header="u,i,t,n"), [None, 5]),
    ("decimals", [decimal.Decimal("1.10"), decimal.Decimal("1.01"), None], [1.1, 1.01, None]),
    ("uint64", pa.array([2**64 - 1, 5], pa.uint64()), [2**64 - 1, 5]),
    ("dictionary", pa.array(["2", "10"]).dictionary_encode(), [2, 10]),
    ("float16", pa.array(np.array([1, np.nan, 2], np.float16)), [1, None, 2]),
]
CASES = [
    *(Case(f"ids_{name}", {"e.parquet": {"u": v, "i": ["a"] * len(v), "t": range(len(v))}}, T, {"keys": k}) for name, v, k in IDS),
    *(Case(f"numbers_{name}", {"e.csv": v} if isinstance(v, str) else
           {"e.parquet": {"u": ["1"] * len(v), "i": list("abcde"[: len(v)]), "t": range(len(v)), "n": v}},
           T | {"numbers": ("n",)}, {"order": k}) for name, v, k in NUMBERS),
    # JSON: numbers and strings of one spelling are one id; a number keeps its digits.
    Case("json_floats", {"e.jsonl": [{"u": 7.0, "i": "a", "t": 1}, {"u": 7, "i": "b", "t": 2}, {"u": "7", "i": "c", "t": 3},
                                     {"u": "7.0", "i": "d", "t": 4}]}, T, {"users": {"7": list("abc"), "7.0": ["d"]}}),
    Case("json_digits", {"e.jsonl": '{"u":1.10,"i":"a","t":1}\n{"u":123456789012345678901234567890,"i":"b","t":2}\n{"u":1e5,"i":"c","t":3}\n'},
         T, {"users": {"1.10": ["a"], "123456789012345678901234567890": ["b"], "100000": ["c"]}}),
    Case("json_alike_then_not", {"e.jsonl": "".join(f'{{"u":{k},"i":"a","t":{k}}}\n' for k in range(9)) + '{"u":"x","i":5,"t":"12"}\n'},
         T, {"users": {str(k): ["a"] for k in range(9)} | {"x": ["5"]}}),
    Case("json_flags", {"e.jsonl": [{"u": True, "i": "a", "t": 1}, {"u": "true", "i": "b", "t": 2}]}, T, {"users": {"true": ["a", "b"]}}),
    Case("json_blank_lines", {"e.jsonl": '\n{"u":1,"i":"a","t":1}\n   \n{"u":1,"i":"b","t":2}'}, T, {"users": {"1": ["a", "b"]}}),
    Case("json_nan_number", {"e.jsonl": '{"u":1,"i":"a","t":1,"n":NaN}\n{"u":1,"i":"b","t":2,"n":3}\n{"u":1,"i":"c","t":3}\n'},
         T | {"numbers": ("n",)}, {"order": [None, 3, None]}),
    # Times: units by the whole column, offsets, fractions.
    Case("seconds", times([HOUR, HOUR + 1]), T, at(HOUR, HOUR + 1)),
    Case("milliseconds", times([HOUR * 1000 + 1, HOUR * 1000 + 2]), T, at(HOUR + 0.001, HOUR + 0.002) | {"unit": "ms"}),
    Case("nanoseconds", times([HOUR * 10**9 + 1, HOUR * 10**9 + 2]), T, {"users": {"1": ["a", "b"]}, "unit": "ns"}),
    Case("early_milliseconds", times([50, *(HOUR * 1000 + k for k in (1, 2, 3))]), T,
         at(0.05, HOUR + 0.001, HOUR + 0.002, HOUR + 0.003) | {"unit": "ms"}),
    Case("one_absurd_year", times([HOUR, HOUR + 1, 253_402_300_799_000]), T,
         at(HOUR, HOUR + 1, 253_402_300_799_000) | {"facts": {"events_after_2100": 1}}),
    Case("negative", times([-10, 5, HOUR]), T, at(-10, 5, HOUR) | {"facts": {"events_before_1970": 1}}),
    Case("unit_given", times([100, 200]), T | {"time_unit": "ms"}, at(0.1, 0.2)),
    Case("float_seconds", times([HOUR + 0.25, HOUR + 0.5, HOUR + 0.125]), T, {"users": {"1": list("cab")}} | at(HOUR + 0.125, HOUR + 0.25, HOUR + 0.5)),
    Case("decimal_text", {"e.csv": csv(f"1,a,{HOUR}.123456789", f"1,b,{HOUR}.123456788")}, T, {"users": {"1": ["b", "a"]}, "ticks": 10**9}),
    Case("exponents", {"e.csv": csv("1,a,1.714543201E9", "1,b,1.7145432E+09")}, T, {"users": {"1": ["b", "a"]}} | at(HOUR, HOUR + 1)),
    Case("compact", {"e.csv": csv("1,a,20240501060000", "1,b,20240501060001")}, T, at(HOUR, HOUR + 1) | {"unit": "YYYYMMDDHHMMSS"}),
    Case("compact_numbers", times([20240501060001, 20240501060000]), T, {"users": {"1": ["b", "a"]}} | at(HOUR, HOUR + 1)),
    Case("days", times([20240501, 20240502]), T, at(HOUR - 21600, HOUR + 64800) | {"unit": "YYYYMMDD"}),
    Case("days_but_one", times([20240501, 20240532]), T, at(20240501, 20240532) | {"unit": "s"}),
    Case("days_as_seconds", times([20240501, 20240502]), T | {"time_unit": "s"}, at(20240501, 20240502)),
    Case("compact_given", times([20240501, 21600]), T | {"time_unit": "YYYYMMDD"}, ("e.parquet", "row 2", "time", "21600")),
    Case("timestamps_with_zone", times([TS(2024, 5, 1, 14, tzinfo=SHANGHAI), TS(2024, 5, 1, 15, tzinfo=SHANGHAI)], type=pa.timestamp("ns", "Asia/Shanghai")),
         T, at(HOUR, HOUR + 3600)),
    Case("timestamps_before_1970", times([-1500, 1500], type=pa.timestamp("ms")), T, at(-1.5, 1.5)),
    Case("date32", times([D(2024, 5, 1), D(1950, 1, 1)]), T, {"users": {"1": ["b", "a"]}, "facts": {"events_before_1970": 1}}),
    Case("iso", {"e.csv": csv("1,a,2024-05-01T06:00:00Z", "1,b,2024-05-01 08:00:01+02:00", "1,c,2024-05-01T02:00:02.5-0400",
                              "1,d,2024-05-01T06:00:03", "1,e,2024-05-01 08:00:04 Europe/Berlin", "1,f,20240501T060005Z")},
         T, at(HOUR, HOUR + 1, HOUR + 2.5, HOUR + 3, HOUR + 4, HOUR + 5)),
    Case("absurd_offset_alike", {"e.csv": csv("1,a,2024-05-01 00:00:00+02:00", "1,b,2024-05-01 00:00:00+16:00")}, T, ("row 2", "no time", "+16:00")),
    Case("iso_dates", {"e.csv": csv("1,a,2024-05-02", "1,b,2024-05-01")}, T, {"users": {"1": ["b", "a"]}}),
    Case("iso_far_years", {"e.csv": csv("1,a,0001-01-01", "1,b,9999-12-31T23:59:59.5")}, T,
         at(-62135596800, 253402300799.5) | {"facts": {"events_before_1970": 1, "events_after_2100": 1}}),
    Case("leap_second", {"e.csv": csv("1,a,2016-12-31T23:59:60Z", "1,b,2016-12-31T24:00:00Z")}, T, at(1483228800, 1483228800)),
    Case("dates_and_numbers", {"e.csv": csv("1,a,2024-05-01", f"1,b,{HOUR}")}, T, ("e.csv", "row 2", "time", "first time is a date")),
    Case("same_moment", times([HOUR * 1000, HOUR * 1000 + 1, HOUR * 1000]) | {"f.parquet": {"u": ["1"], "i": ["a"], "t": [HOUR * 1000]}}, T,
         {"users": {"1": ["a", "c", "b"]}, "facts": {"duplicates_dropped": 1}}, source="."),
    # Orders: any numbers, exactly; equal ones of one item are duplicates, nothing else.
    Case("order_close", times([0.1, 0.1 + 2**-56, 0.1 - 2**-56]), O, {"users": {"1": list("cab")}, "facts": {"duplicates_dropped": 0}}),
    Case("order_mixed", {"e.csv": csv("1,a,1.5", "1,a,1.25", "1,a,-3", "1,a,1.5", "1,b,1e1")}, O,
         {"users": {"1": list("aaab")}, "facts": {"duplicates_dropped": 1}}),
    Case("order_large", times([2**62 + 1, 2**62]), O, {"users": {"1": ["b", "a"]}}),
    Case("order_is_no_date", {"e.csv": csv("1,a,2024-05-01")}, O, ("e.csv", "row 1", "order", "2024-05-01")),
    # Missing is missing.
    *(Case(f"missing_{n}", {"e.csv": csv("u,a,1", f"{word},b,2")}, T, ("e.csv", "row 2", "no user"))
      for n, word in enumerate(["", "  ", r"\N", "NULL", "None", "nan", "NaN", "inf", "-Infinity", "<NA>", "#N/A", "undefined"])),
    Case("missing_item_json", {"e.jsonl": [{"u": 1, "i": "a", "t": 1}, {"u": 1, "t": 2}]}, T, ("e.jsonl", "row 2", "no item")),
    Case("missing_time", times([float("nan"), 5.0]), T, ("e.parquet", "row 1", "no time")),
    Case("skipped", {"e.csv": csv("u,a,1", ",b,2", "u,c,x", "u,d", "u,e,5"), "f.csv": csv("u,f,6", "nan,g,7")}, T,
         {"users": {"u": ["a", "e", "f"]}, "facts": {"bad_rows_left_out": 4, "rows": 3}}, source=".", bad_rows="skip"),
    Case("skipped_json", {"e.jsonl": '{"u":1,"i":"a","t":1}\n{"u":\n[1]\n{"u":1,"i":"b","t":2}\n'}, T,
         {"users": {"1": ["a", "b"]}, "facts": {"bad_rows_left_out": 2}}, bad_rows="skip"),
    # Titles and categories.
    Case("titles", {"e.csv": csv("1,a,1,Heat", "1,b,2,HEAT", "1,c,3,Heat ", "1,d,4,\uff28eat", "1,e,5,He\u200bat", "1,f,6,\u2581Heat", header="u,i,t,n")},
         T | {"title": "n"}, {"titles": {"a": "Heat", "b": "HEAT", "c": "Heat [2]", "d": "\uff28eat [3]", "e": "He\u200bat [4]", "f": "\u2581Heat [5]"}}),
    Case("long_titles", {"e.csv": csv(f"1,a,1,{'x' * 5000}a", f"1,b,2,{'x' * 5000}b", header="u,i,t,n")}, T | {"title": "n"},
         {"titles": {"a": "x" * 256, "b": "x" * 256 + " [2]"}}),
    Case("titles_of_ids", {"e.csv": csv('1,"a\tb",1', '1,"a b",2', "1,\x01,3")}, T, {"titles": {"a\tb": "a b", "a b": "a b [2]", "\x01": "item 1"}}),
    Case("float_titles", {"e.parquet": {"u": [1, 1], "i": ["a", "b"], "t": [1, 2], "n": [1917.0, float("nan")]}}, T | {"title": "n"},
         {"titles": {"a": "1917", "b": "b"}}),
    Case("categories", {"e.parquet": {"u": [1] * 4, "i": list("abcd"), "t": range(4), "k": [["A", None, " "], [], None, ["B", "A", "B"]], "l": [5, 6, None, 7]}},
         T | {"categories": ("k", "l")}, {"categories": {"a": ["A", "5"], "b": ["6"], "c": [], "d": ["B", "A", "7"]}}),
    Case("category_numbers", {"e.jsonl": [{"u": 1, "i": "a", "t": 1, "k": 5}, {"u": 1, "i": "b", "t": 2, "k": ["x", 6]}]},
         T | {"categories": ("k",)}, {"categories": {"a": ["5"], "b": ["x", "6"]}}),
    Case("later_category", {"e.jsonl": [{"u": 1, "i": "a", "t": 1, "k": [""]}, {"u": 1, "i": "a", "t": 2, "k": "X"}]},
         T | {"categories": ("k",)}, {"categories": {"a": ["X"]}}),
    # Names and paths.
    Case("odd_names", {"e.jsonl": [{"a.b": 1, 'q"\n': "x", "": 5, "t'": 3}]}, {"user": "a.b", "item": 'q"\n', "time": "t'"}, {"users": {"1": ["x"]}}),
    Case("dotted_parquet", {"e.parquet": {"a": [{"b": 9}], "a.b": [1], "i": ["x"], "t": [1]}}, T | {"user": "a.b"}, {"users": {"1": ["x"]}}),
    Case("own_names", {"e.csv": csv("1,a,1,5,6,7", header="u,i,t,item,gap,timestamp")}, T | {"numbers": ("item", "gap", "timestamp")}, {"users": {"1": ["a"]}}),
    Case("separators", {"e.csv": csv("1;a;1", header="u;i;t"), "f.csv": csv("1\tb\t2", header="u\ti\tt")}, T, {"users": {"1": ["a", "b"]}}, source="."),
    Case("mark", {"e.csv": "\ufeff" + csv("1,a,1")}, T, {"users": {"1": ["a"]}}),
    Case("crlf", {"e.csv": csv("1,a,1").replace("\n", "\r\n")}, T, {"users": {"1": ["a"]}}),
    Case("apostrophes", {"it's [a] log/k=v/e.csv": csv("1,a,1"), "it's [a] log/.hidden.csv": "x", "it's [a] log/k=v/._e.csv": "x", "it's [a] log/deep/e.csv": "x"},
         T, {"users": {"1": ["a"]}}, source="it's [a] log"),
    Case("literal_star", {"a*.csv": csv("1,a,1"), "ab.csv": csv("1,b,2")}, T, {"users": {"1": ["a"]}}, source="a*.csv"),
    Case("optional_column", {"e.csv": csv("1,a,1,5,A", header="u,i,t,n,x"), "f.csv": csv("1,b,2")},
         T | {"numbers": ("n",), "texts": ("x",)}, {"users": {"1": ["a", "b"]}, "order": [5, None]}, source="."),
    Case("types_differ", {"a.parquet": {"u": [7], "i": [1], "t": [1]}, "b.parquet": {"u": ["7"], "i": [1.0], "t": pa.array([2], pa.int16())}},
         T, {"users": {"7": ["1", "1"]}}, source="."),
    Case("packed_by_content", {"a.csv": gzip.compress(csv("1,a,1").encode(), mtime=0), "b.csv.gz": csv("1,b,2")}, T, {"users": {"1": ["a", "b"]}}, source="."),
    Case("upper_suffix", {"E.CSV": csv("1,a,1")}, T, {"users": {"1": ["a"]}}),
    # Quotation marks: text that goes on after a closing one would swallow rows.
    Case("backslash_quotes", {"e.csv": csv(r'1,a,1,"Vinyl 12\""', "1,b,2,B", "1,c,3,C", r'1,d,4,"LP 7\""', "1,e,5,E", header="u,i,t,n")}, T,
         ("e.csv", "line 2", "closing quotation mark", "Vinyl 12")),
    Case("bare_quotes", {"e.tsv": csv('1\ta\t1\t"Heroes', "1\tb\t2\tB", '1\tc\t3\t"Low', "1\td\t4\tD", header="u\ti\tt\tn")}, T | {"title": "n"},
         ("e.tsv", "line 2", "closing quotation mark")),
    Case("quotes_in_front", {"e.csv": csv('1,"red shoes" cheap,1', "1,red shoes cheap,2")}, T, ("e.csv", "line 2", "closing quotation mark")),
    Case("quotes_that_skip", {"e.csv": csv('1,b,"2', *["1,a,1"] * 5000, '1,c,"3"')}, T, ("e.csv", "closing quotation mark"), bad_rows="skip"),
    Case("quotes_far_in", {"e.csv": csv(*[f'1,"a ""{k}"", b",{k}' for k in range(200_000)], '1,"a\nb"c,1')}, T, ("e.csv", "line 200002", "a\\nb")),
    Case("quotes_rightly", {"e.csv": "\ufeff" + csv('"1","a ""x"", y",1,5" nail', '1, "c" d,3,""', '1,b 3",4,"multi\r\nline"', '1,"z"  ,5,"x" ', header='"u",i,t,n')},
         T, {"users": {"1": ['a "x", y', ' "c" d', 'b 3"', "z  "]}}),
    # JSON: floats that have lost their last digits are no ids; a key may come late.
    Case("json_large_floats", {"e.jsonl": '{"u":1,"i":"a","t":1}\n{"u":1.090292922e+18,"i":"b","t":2}\n'}, T, ("e.jsonl", "row 2", "no user")),
    Case("json_late_key", {"e.jsonl": [{"u": 1, "i": "a", "t": k} for k in range(3000)] + [{"u": 1, "i": "b", "t": 5000, "n": "B"}]}, T | {"title": "n"},
         {"titles": {"a": "a", "b": "B"}}),
    Case("json_late_escape", {"e.jsonl": '{"u":1,"i":"a","t":1}\n' * 3000 + '{"u":1,"i":"b","t":2,"\\u006e\\u00e9":"B"}\n'}, T | {"title": "né"}, {"titles": {"a": "a", "b": "B"}}),
    Case("json_never_key", {"e.jsonl": [{"u": 1, "i": "a", "t": k, "m": "n"} for k in range(3000)]}, T | {"title": "n"}, ("no column 'n'", "'m'")),
    # Times of two units, of a type that rounds them, and beyond what nanoseconds reach.
    Case("two_units", {"a.csv": csv(*(f"1,{i},{HOUR + k}" for k, i in enumerate("abc"))), "b.csv": csv(*(f"1,{i},{1000 * (HOUR - k)}" for k, i in enumerate("defg")))},
         T, ("several units", "3 in s"), source="."),
    Case("two_units_given", {"a.csv": csv(f"1,a,{HOUR}", f"1,b,{HOUR * 1000}", f"1,c,{HOUR * 1000 + 1}")}, T | {"time_unit": "ms"}, {"users": {"1": list("abc")}, "unit": "ms"}),
    Case("int96", int96([TS(2024, 5, 1, 6), TS(9999, 12, 31), TS(1, 1, 1), TS(2300, 1, 1)]), T, {"users": {"1": list("cadb")}}),
    Case("days_since_1970", times([19844, 19845]), T, {"users": {"1": ["a", "b"]}, "facts": {"events_before_1970": 0}}),
    Case("float32_times", times([HOUR + 0.0, HOUR + 60.0, HOUR + 120.0], type=pa.float32()), T, ("e.parquet", "'t'", "rounded")),
    Case("float32_small", times([3.0, 1.5], type=pa.float32()), T, {"users": {"1": ["b", "a"]}}),
    Case("absurd_offset", {"e.csv": csv("1,a,2024-05-01T00:00:00+99:99")}, T, ("row 1", "no time", "+99:99")),
    # Missing titles and categories are missing.
    Case("missing_titles", {"e.csv": csv(r"1,a,1,\N,A", r"1,a,2,Heat,\N", "1,b,3,NULL,nan", "1,c,4,<NA>,null", header="u,i,t,n,k")}, T | {"title": "n", "categories": ("k",)},
         {"titles": {"a": "Heat", "b": "b", "c": "c"}, "categories": {"a": ["A"], "b": [], "c": []}}),
    # Parts of a folder: all are read, or none.
    Case("folder_as_a_file", {"jan.parquet": {"u": [1], "i": ["a"], "t": [1]}, "feb.parquet/part-0.parquet": {"u": [1], "i": ["b"], "t": [2]},
                              "feb.parquet/_SUCCESS": ""}, T, {"users": {"1": ["a", "b"]}}, source="."),
    Case("folders_by_glob", {"jan.parquet/part-0.parquet": {"u": [1], "i": ["a"], "t": [1]}, "feb.parquet/part-0.parquet": {"u": [1], "i": ["b"], "t": [2]}},
         T, {"users": {"1": ["a", "b"]}}, source="*.parquet"),
    Case("folders_by_deep_glob", {"jan.parquet/part-0.parquet": {"u": [1], "i": ["a"], "t": [1]}, "d=1/part-0.parquet": {"u": [1], "i": ["b"], "t": [2]}},
         O, {"users": {"1": ["a", "b"]}, "facts": {"rows": 2}}, source="**"),
    *(Case(f"packed_{n}", {"a.csv": csv("1,a,1"), f"b.csv{end}": "?"}, T, (f"b.csv{end}", "unpack it"), source=".") for n, end in enumerate([".bz2", ".zip", ".zst"])),
    Case("delta_table", {"part-0.parquet": {"u": [1], "i": ["a"], "t": [1]}, "_delta_log/00.json": "{}"}, T, ("Delta Lake", "deleted"), source="."),
    Case("delta_parts", {"d/k=1/part-0.parquet": {"u": [1], "i": ["a"], "t": [1]}, "d/_delta_log/00.json": "{}"}, T, ("Delta Lake",), source="d/k=*/*.parquet"),
    Case("archive_beside", {"events.csv": csv("1,a,1"), "events.zip": "?", "all.tar": "?"}, T, {"users": {"1": ["a"]}}, source="."),
    # What looks like one of these, and is right.
    Case("json_float_times", {"e.jsonl": [{"u": "1", "i": "a", "t": 1714550400000000000.0}, {"u": "1", "i": "b", "t": "1714550400000000001"}]}, T, {"users": {"1": ["a", "b"]}}),
    Case("json_float_numbers", {"e.jsonl": [{"u": "1", "i": "a", "t": 1, "n": 1e20}, {"u": "1", "i": "b", "t": 2, "n": "3"}]}, T | {"numbers": ("n",)}, {"order": [1e20, 3]}),
    Case("odd_unit", {"e.csv": csv(*(f"1,a,{HOUR * 1000 + k}" for k in range(300)), f"1,b,{2**31 - 1}")},
         T, {"users": {"1": ["b", *["a"] * 300]}, "unit": "ms"}, source="e.csv"),
    Case("float32_without_end", times([3.0, float("inf"), 1.5], type=pa.float32()), T, ("e.parquet", "row 2", "no time")),
    Case("names_that_read_like_nothing", {"e.csv": csv("1,a,1,None,Infinity", "1,b,2,undefined,None", header="u,i,t,n,k")}, T | {"title": "n", "categories": ("k",)},
         {"titles": {"a": "None", "b": "undefined"}, "categories": {"a": ["Infinity"], "b": ["None"]}}),
    # What cannot be read is one sentence.
    Case("ragged_after_newlines", {"e.csv": csv('1,"a\nb",1', '1,"c\n\nd",2', "1,x")}, T, ("e.csv", "row 3", "2 values")),
    Case("commas_in_numbers", {"e.csv": csv('1,a,1,"4,5"', header="u,i,t,n")}, T | {"numbers": ("n",)}, ("e.csv", "row 1", "number", "4,5")),
    Case("underscores", {"e.csv": csv("1,a,1_0")}, T, ("row 1", "no time", "1_0")),
    Case("hexadecimal", {"e.csv": csv("1,a,0x10")}, T, ("row 1", "no time", "0x10")),
    Case("latin_1", {"e.csv": csv("1,a,1").encode() + "1,é,2\n".encode("latin-1")}, T, ("e.csv", "row 2", "no item")),
    Case("surrogate", {"e.jsonl": '{"u":1,"i":"a","t":1}\n{"u":1,"i":"\\ud83d","t":2}\n'}, T, ("e.jsonl", "row 2", "no item")),
    Case("surrogate_title", {"e.jsonl": '{"u":1,"i":"a","t":1,"n":"\\udc00"}\n'}, T | {"title": "n"}, ("row 1", "no title")),
    Case("struct", {"e.parquet": {"u": [{"x": 1}], "i": ["a"], "t": [1]}}, T, ("e.parquet", "'u'", "struct<x: int64>")),
    Case("list_user", {"e.parquet": {"u": [[1]], "i": ["a"], "t": [1]}}, T, ("'u'", "list<")),
    Case("object_json", {"e.jsonl": [{"u": {"x": 1}, "i": "a", "t": 1}]}, T, ("row 1", "no user")),
    Case("list_of_lists", {"e.parquet": {"u": [1], "i": ["a"], "t": [1], "k": [[["A"]]]}}, T | {"categories": ("k",)}, ("'k'", "list<")),
    Case("time_of_day", times([datetime.time(5)]), T, ("'t'", "time64")),
    Case("timestamp_number", {"e.parquet": {"u": [1], "i": ["a"], "t": [1], "n": [TS(2024, 5, 1)]}}, T | {"numbers": ("n",)}, ("'n'", "timestamp")),
    Case("large_float_ids", {"e.parquet": {"u": [2.0**60], "i": ["a"], "t": [1]}}, T, ("row 1", "no user")),
    Case("uint64_time", times([2**64 - 1], type=pa.uint64()), T, ("row 1", "no time")),
    Case("two_of_a_name", {"e.csv": csv("1,a,1,2", header="u,i,t,t")}, T, ("e.csv", "2 columns 't'")),
    Case("no_header", {"e.csv": ""}, T, ("e.csv", "no header")),
    Case("header_alone", {"e.csv": "u,i,t\n"}, T, ("holds no events",)),
    Case("no_lines", {"e.jsonl": ""}, T, ("holds no events",)),
    Case("no_column_anywhere", {"e.csv": csv("1,a,1")}, T | {"title": "n"}, ("no column 'n'", "'u', 'i', 't'")),
    Case("array", {"e.json": "[\n" + '{"u":1}\n]'}, T, ("e.json", "row 1", "one object a line")),
    Case("open_quote", {"e.csv": csv("1,a,1", '1,"b,2', *["1,c,3"] * 20_000)}, T, ("e.csv", "row 2", "2 values")),
]  # fmt: skip


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pq.write_table(pa.table({key: pa.array(v) if isinstance(v, range) else v for key, v in content.items()}), path)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def missing_last(values):
    """Return numbers of which a missing one is larger than all."""
    return np.array([np.inf if value is None else value for value in values])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_events_are_read_as_they_are(tmp_path, numbered, case):
    write(tmp_path, case.files)
    source = os.path.join(tmp_path, case.source or next(iter(case.files)))
    if isinstance(case.expect, tuple):
        with pytest.raises(ValueError) as caught:
            numbered(find(source, Columns(**case.columns), name="case", bad_rows=case.bad_rows))
        assert all(word in str(caught.value) for word in case.expect), caught.value
        return
    events = numbered(find(source, Columns(**case.columns), name="case", bad_rows=case.bad_rows))
    audit = events.facts["audit"]
    for name, wanted in case.expect.items():
        if name == "keys":
            assert sorted(events.users) == sorted(wanted)
        elif name == "unit":
            assert audit["time_unit"] == wanted
        elif name == "ticks":
            assert events.facts["ticks_per_second"] == wanted
        elif name == "facts":
            assert {key: audit[key] for key in wanted} == wanted
        elif name == "order":
            (levels,) = events.levels.values()
            have, numbers = np.array(levels["1"]), missing_last(wanted)
            assert ((have[:, None] < have) == (numbers[:, None] < numbers)).all(), have
        else:
            assert getattr(events, name) == wanted
