"""Quotation marks in CSV: a value in them ends at its closing one, or the rows that follow would be taken for a part of it."""

import io
import re
from typing import BinaryIO

from user_llm.data.opening import LONGEST_LINE
from user_llm.data.values import shown

REMEDY = (
    'write each quotation mark within a value twice (in Spark by .option("escape", \'"\')), put values that begin with one in quotation '
    "marks, or save as Parquet"
)


class Misquoted(ValueError):
    """What is wrong with a value in quotation marks, and its line; the reader adds the file."""


class Quoted(io.RawIOBase):
    """A CSV file's bytes. Reading raises `Misquoted` where a value goes on after its closing quotation mark.

    Programs that write such values escape by a backslash or not at all. What their rows are, nobody can tell: the parser takes the next
    quotation mark, rows later, for the closing one.
    """

    def __init__(self, stream: BinaryIO, separator: str):
        end = b"[" + re.escape(separator).encode() + b"\r\n]"
        other = b"[^" + end[1:]
        value = b'"[^"]*+(?:""[^"]*+)*+'
        # What is right: text without quotation marks; whole values in them, with spaces behind; and marks in the midst of a value without.
        self._right = re.compile(b'(?:[^"]++|(?<!' + other + b")" + value + b'"(?= *' + end + b")|(?<=" + other + b')")*+')
        self._unfinished = re.compile(value + b'(?:" *)?\\Z')
        self._stream, self._rest, self._start, self._first = stream, b"", 0, True
        self._ends = [0, 0]  # of lines so far: LF, and CR

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self._check(bytes(buffer[:size]))
        return size

    def _check(self, data: bytes) -> None:
        """Check what has come; what may go on in the next bytes is kept, and the byte before it."""
        if self._first:
            data, self._first = data.removeprefix(b"\xef\xbb\xbf"), False
        data, start = self._rest + data, self._start
        match = self._right.match(data, start) if b'"' in data else None
        place = match.end() if match else len(data)
        if place < len(data) and not self._unfinished.match(data, place):
            line = 1 + max(self._count(data, start, place))
            value = data[place : place + 40].decode(errors="replace")
            raise Misquoted(f"line {line}: a value goes on after its closing quotation mark, in {shown(value)}: {REMEDY}")
        if len(data) - place > LONGEST_LINE:  # never closed: the parser says so
            place = len(data)
        self._ends = self._count(data, start, place)
        self._start = min(place, 1)
        self._rest = data[place - self._start :]

    def _count(self, data: bytes, start: int, place: int) -> list[int]:
        """Return the ends of lines up to a place, LF and CR; a file has the one, the other, or both at each line."""
        return [before + data.count(end, start, place) for before, end in zip(self._ends, (b"\n", b"\r"), strict=True)]
