"""Files that are whole or not there, though several processes may want to write them, and that are still what was written."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from user_llm.common.distributed import is_first

MANIFEST = "checksums.json"
READERS = 8  # files that are hashed at a time


@contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
    """Yield the path to write to, which takes the place of `path` when it is complete; a kill leaves that as it was.

    On a remote store it is the path itself: there, what is not written to its end does not exist.
    """
    if is_remote(path):
        yield path
        return
    temporary = path.parent / f"{path.name}.tmp"
    temporary.unlink(missing_ok=True)  # a link that stands there would be written through
    yield temporary
    temporary.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
    """Write JSON, by the first process alone; a kill leaves the file as it was."""
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as target:
            target.write_text(json.dumps(value, indent=1))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a local folder, made if missing, against other processes; the lock ends with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_once(path: Path, make: Callable[[Path], Any]) -> Path:
    """Return a local folder that `make` fills, made by the first of this machine's processes that asks for it."""
    with lock(path.parent):
        if not path.exists():
            unfinished = path.parent / f"{path.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(path)
    return path


def sha256(path: epath.PathLike) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: epath.PathLike) -> None:
    """Write the size and SHA-256 of every file below a folder, hidden ones left out, to its `checksums.json`.

    Call it in one process, once the folder is complete.
    """
    folder = epath.Path(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    paths.pop(MANIFEST, None)
    with ThreadPoolExecutor(READERS) as pool:
        hashes = pool.map(sha256, paths.values())
        entries = {
            name: {"bytes": path.stat().length, "sha256": digest}
            for (name, path), digest in zip(paths.items(), hashes, strict=True)
        }
    with whole(folder / MANIFEST) as target:
        target.write_text(json.dumps(entries, indent=1))


def check_manifest(folder: epath.PathLike, *, part: int = 0, parts: int = 1) -> None:
    """Compare every file that `write_manifest` listed with what it was then; files that came later are not looked at.

    Args:
      part, parts: of `parts` callers that share the work, each checks its own part of the files.

    Raises:
      ValueError: no manifest, or a file that is missing, cut off or changed, in one sentence that names it.
    """
    folder = epath.Path(folder)
    manifest = folder / MANIFEST
    try:
        entries = json.loads(manifest.read_text())
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MANIFEST}: it was not written to its end, or files were deleted.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is damaged: it lists no checksums.") from error
    mine = sorted(expected)[part::parts]
    with ThreadPoolExecutor(READERS) as pool:
        for fault in pool.map(lambda name: _fault(folder / name, *expected[name]), mine):
            if fault:
                raise ValueError(fault)


def _fault(path: epath.Path, size: int, digest: str) -> str:
    """Return what is wrong with a file in one sentence, or nothing."""
    try:
        if (found := path.stat().length) != size:
            return f"{path} is damaged: it has {found:,} bytes, and {size:,} were written."
        return "" if sha256(path) == digest else f"{path} is damaged: its checksum is not that of what was written."
    except FileNotFoundError:
        return f"{path} is missing: it was deleted since it was written."


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield all files below a folder, by name; hidden files and folders are left out."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            yield from files_below(path) if path.is_dir() else (path,)


def is_remote(path: epath.PathLike) -> bool:
    """Return whether a path is that of a store such as gs://, whose files can be neither appended to nor locked."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Return a path that holds wherever the process goes."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).absolute()


def local_folder(workdir: epath.PathLike) -> Path:
    """Return where this machine keeps what it makes for itself: the workdir, or for a remote one a cache of its own."""
    if not is_remote(workdir):
        return Path(workdir)
    return Path.home() / ".cache" / "user_llm" / hashlib.sha256(str(workdir).encode()).hexdigest()[:12]
