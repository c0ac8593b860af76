"""Which content files have: SHA-256 of large files, computed once and remembered while a file has not been touched.

A file counts as untouched as long as its size, its place on the disk and both of its times (of the content and of the record of the
file, which no program can set back) are what they were, in nanoseconds. Times tick coarsely on some file systems, so that a file
which was touched less than SETTLED_S before it was read is read again the next time.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from user_llm.common.checksums import READERS
from user_llm.common.distributed import is_first
from user_llm.common.files import is_remote, lock, sha256, whole
from user_llm.common.records import parse, read_file

SETTLED_S = 2.0  # the coarsest tick of a file system in use, that of FAT
REMEMBERED = "hashes.json"

Touched = tuple[int, ...]
_known: dict[str, tuple[Touched, str]] = {}  # of this process


def content_hashes(paths: Sequence[epath.PathLike], folder: Path | None = None) -> list[str]:
    """Return the SHA-256 of each file in hex.

    Args:
      folder: local; keeps what is known of files in `hashes.json`, for later processes. None to remember in this process alone.
    """
    names = [str(path) if is_remote(path) else os.path.abspath(path) for path in paths]
    if folder is not None:
        _known.update({name: entry for name, entry in _read(folder / REMEMBERED).items() if name not in _known})
    with ThreadPoolExecutor(READERS) as pool:
        hashes = list(pool.map(_content_hash, names))
    if folder is not None and is_first():
        _remember(folder, [name for name in names if name in _known])
    return hashes


def data_hashes(files: Iterable[epath.PathLike], folder: Path) -> dict[str, str]:
    """Return the content hashes of a dataset's files by their names below the folder that they share, as `data/...`.

    Args:
      folder: as in `content_hashes`.
    """
    paths = list(files)
    return dict(zip(_names(paths), content_hashes(paths, folder), strict=True))


def _names(paths: list[epath.PathLike]) -> list[str]:
    texts = [os.fspath(path) for path in paths]
    if len(set(map(os.path.basename, texts))) == len(texts):
        return [f"data/{os.path.basename(text)}" for text in texts]
    shared = os.path.commonpath(texts)
    return [f"data/{os.path.relpath(text, shared)}" for text in texts]


def _content_hash(name: str) -> str:
    if is_remote(name):
        return sha256(name)
    touched = _touched(name)
    if name in _known and _known[name][0] == touched:
        return _known[name][1]
    begun = time.time_ns()
    digest = sha256(name)
    _known.pop(name, None)
    if _touched(name) == touched and max(touched[:2]) < begun - SETTLED_S * 1e9:
        _known[name] = touched, digest
    return digest


def _touched(name: str) -> Touched:
    facts = os.stat(name)
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino, facts.st_dev


def _read(path: Path) -> Mapping[str, tuple[Touched, str]]:
    """Return what earlier processes remembered; nothing from a file that is missing or damaged."""
    try:
        return {name: (tuple(touched), digest) for name, (touched, digest) in parse(read_file(path)).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _remember(folder: Path, names: Sequence[str]) -> None:
    with lock(folder):
        known = dict(_read(folder / REMEMBERED))
        changed = {name: _known[name] for name in names if known.get(name) != _known[name]}
        if changed:
            with whole(epath.Path(folder) / REMEMBERED) as target:
                target.write_text(json.dumps(known | changed, indent=1))
