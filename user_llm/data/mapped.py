"""Columns in files that are mapped into memory: a process holds the pages that it reads, and shares them with its neighbours.

A folder holds one file per array, numbers one after another without a header, and `columns.json`, which says the type, shape and
checksum of each. The folder is written once, and its checksums are compared whenever it is opened: an altered one is written again.
"""

import concurrent.futures
import contextlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging

from user_llm.common.files import lock
from user_llm.common.records import parse, read_file

FACTS = "columns.json"
BLOCK = 1 << 22  # bytes that are read at a time for a checksum


def stored(folder: Path, pieces: Callable[[], Iterable[Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Return the arrays of a folder, mapped read-only. They are written first if they are missing or not as they were written.

    Args:
      pieces: returns the arrays stretch by stretch; a stretch may hold some of the names only.

    Raises:
      ValueError: the folder does not keep what is written to it.
    """
    for _ in range(2):
        if not _altered(folder):
            return _mapped(folder)
        with lock(folder.parent):
            if altered := _altered(folder):  # and no other process has written it since
                if folder.exists():
                    logging.warning("%s is not as it was written: %s is made again.", folder / altered, folder)
                unfinished = folder.parent / f"{folder.name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                _write(unfinished, pieces())
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)
    if not _altered(folder):
        return _mapped(folder)
    raise ValueError(f"{folder} does not keep what is written to it: check the disk, or prepare the data on another one.")


def _write(folder: Path, pieces: Iterable[Mapping[str, np.ndarray]]) -> None:
    folder.mkdir()
    arrays: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for piece in pieces:
            for name, array in piece.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / name).open("wb"))
                    arrays[name] = {"dtype": array.dtype.str, "shape": [0, *array.shape[1:]], "crc32": 0}
                facts, data = arrays[name], np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                if (array.dtype.str, [*array.shape[1:]]) != (facts["dtype"], facts["shape"][1:]):
                    raise TypeError(f"The stretches of {name} differ: {array.dtype} {array.shape} after {facts}.")
                files[name].write(data)
                facts["shape"][0] += len(array)
                facts["crc32"] = zlib.crc32(data, facts["crc32"])
    (folder / FACTS).write_text(json.dumps({"arrays": arrays, "crc32": _of_facts(arrays)}, indent=1))


def _of_facts(arrays: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(arrays, sort_keys=True).encode())


def _altered(folder: Path) -> str | None:
    """Return the name of a file of the folder that is not as it was written."""
    try:
        facts = parse(read_file(folder / FACTS))
        arrays = facts["arrays"]
        if facts["crc32"] != _of_facts(arrays):
            return FACTS
    except (ValueError, KeyError, TypeError):
        return FACTS
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sound = pool.map(lambda name: _checksum(folder / name) == arrays[name]["crc32"], arrays)
        return next((name for name, same in zip(arrays, sound, strict=True) if not same), None)


def _checksum(path: Path) -> int | None:
    checksum = 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                checksum = zlib.crc32(block, checksum)
    except OSError:
        return None
    return checksum


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    arrays = parse(read_file(folder / FACTS))["arrays"]
    return {name: _map(folder / name, np.dtype(facts["dtype"]), tuple(facts["shape"])) for name, facts in arrays.items()}


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if not math.prod(shape):
        return np.empty(shape, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))  # a plain array over the file, quicker to slice


class Column:
    """A stored column in another order: entry n is row `rows[n]`. It is indexed like an array, and copies the chosen entries."""

    def __init__(self, values: np.ndarray, rows: np.ndarray):
        self._values, self._rows = values, rows

    @property
    def dtype(self) -> np.dtype:
        """The type of the entries."""
        return self._values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of entries, then the shape of one."""
        return (len(self._rows), *self._values.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._values[self._rows[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __eq__(self, other: object) -> Any:  # entry by entry, as of arrays
        return np.asarray(self) == other

    def __ne__(self, other: object) -> Any:
        return np.asarray(self) != other

    __hash__ = None  # type: ignore[assignment]

    def tolist(self) -> list[Any]:
        """Return all entries."""
        return self[:].tolist()


class Seconds(Column):
    """Times in seconds, of times in ticks."""

    def __init__(self, ticks: np.ndarray, rows: np.ndarray, ticks_per_second: int):
        super().__init__(ticks, rows)
        self._ticks_per_second = ticks_per_second

    @property
    def dtype(self) -> np.dtype:
        """The type of the entries."""
        return np.dtype(np.float64)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) / self._ticks_per_second


class Texts(Column):
    """A stored column of texts: row r is the UTF-8 of bytes[offsets[r] : offsets[r + 1]]."""

    def __init__(self, offsets: np.ndarray, content: np.ndarray, rows: np.ndarray):
        self._offsets, self._rows = offsets, rows
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
        self._texts = pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, buffers)

    @property
    def dtype(self) -> np.dtype:
        """The type of the entries."""
        return np.dtypes.StringDType()

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of entries."""
        return (len(self._rows),)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        if not np.ndim(rows):
            return self._texts[int(rows)].as_py()
        texts = self._texts.take(pa.array(rows.reshape(-1)))
        return np.array(texts.to_pylist(), self.dtype).reshape(rows.shape)

    def filled(self, index: Any) -> np.ndarray:
        """Say which of the chosen texts are not empty, without reading them."""
        rows = self._rows[index].astype(np.int64)
        return self._offsets[rows + 1] > self._offsets[rows]


class Keys(Sequence[str]):
    """A column of texts as a sequence of strings, which equals any other of the same strings."""

    def __init__(self, texts: Texts):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._texts[index]
        return chosen if isinstance(chosen, str) else chosen.tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment]


def filled(column: Any, index: Any) -> np.ndarray:
    """Say which of the chosen entries of a column of texts are not empty."""
    return column.filled(index) if isinstance(column, Texts) else column[index] != ""
