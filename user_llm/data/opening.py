"""The one place that opens files of others: regular files alone, unpacked by their content, in bounded memory and time."""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from user_llm.common.files import check_regular

LONGEST_LINE = 1 << 24  # bytes; a longer one is no row of data
MOST_BLANK = 10_000  # lines in a row
CHUNK_BYTES = 1 << 25  # of the lines that are held at a time
# Packed text grows 3 to 50 times. deflate can pack 1 GB of nothing into 1 MB, 1,030 times less.
MOST_GROWTH = 300
ALWAYS_ALLOWED = 1 << 26  # bytes that may come out of a file however small it is
GZIP = b"\x1f\x8b"
OTHER_CONTENT = {
    rb"\x28\xb5\x2f\xfd": "zstd, not text: unpack it",
    rb"BZh\d1AY&SY": "bzip2, not text: unpack it",
    rb"\xfd7zXZ\0": "xz, not text: unpack it",
    rb"PK\x03\x04": "a zip, not text: unpack it",
    rb"PAR1": "Parquet, not text: name it .parquet",
    rb"\xff\xfe|\xfe\xff": "UTF-16: save it as UTF-8",
}


class Damaged(ValueError):
    """What is wrong with a packed file; the reader adds the file and the place."""


class _Unpacked(io.RawIOBase):
    """A gzip file's content, which ends in `Damaged` where the file is cut off or grows beyond all data."""

    def __init__(self, packed: BinaryIO):
        self.packed, self.stream, self.size = packed, gzip.GzipFile(fileobj=packed), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self.stream.read1(len(buffer))
        except (EOFError, zlib.error, OSError) as error:
            raise Damaged(f"{error}; the file may be cut off: get it whole") from None
        buffer[: len(data)] = data
        self.size += len(data)
        if self.size > max(ALWAYS_ALLOWED, MOST_GROWTH * self.packed.tell()):
            raise Damaged(f"unpacked it is more than {MOST_GROWTH} times as large, which no data is: unpack it by hand")
        return len(data)


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[BinaryIO]:
    """Yield a text file's bytes, unpacked if they are gzip's, whatever its name says.

    Raises:
      ValueError: no regular file, or one that holds something else than text.
      Damaged: while it is read, a packed file that is cut off or endless.
    """
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(16)
        for pattern, what in OTHER_CONTENT.items():
            if re.match(pattern, start):
                raise ValueError(f"{path} holds {what}.")
        file.seek(0)
        yield io.BufferedReader(_Unpacked(file), 1 << 20) if start.startswith(GZIP) else file


def line_chunks(path: epath.Path, rows: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number of the first line and the lines, at most `rows` of them and about CHUNK_BYTES; a byte order mark is dropped.

    Raises:
      ValueError: a line longer than LONGEST_LINE, more than MOST_BLANK blank lines, or a file that cannot be read to its end, named by the line.
    """
    with opened(path) as file:
        lines: list[bytes] = []
        first, size, blank = 1, 0, 0
        while True:
            number = first + len(lines)
            try:
                line = file.readline(LONGEST_LINE + 1)
            except Damaged as error:
                raise ValueError(f"{path}, after line {number - 1}: {error}.") from None
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB, which is no row of data.")
            blank = blank + 1 if len(line) < 3 and line.isspace() else 0
            if blank > MOST_BLANK:
                raise ValueError(f"{path}, line {number}: more than {MOST_BLANK} blank lines in a row, which no data has.")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line:
                lines.append(line)
                size += len(line)
            if lines and (not line or len(lines) >= rows or size >= CHUNK_BYTES):
                yield first, lines
                first, size, lines = first + len(lines), 0, []
            if not line:
                return
