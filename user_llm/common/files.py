"""Files that are whole or not there, though several processes may want to write them, and that are still what was written."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from etils import epath

from user_llm.common.distributed import is_first


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
    with open_own(folder / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_own(path: Path) -> TextIO:
    """Open a file of our own for reading and writing, made if missing and not emptied.

    Raises:
      OSError: a link, which would be written through.
      ValueError: what is no regular file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file: delete it.")
    return os.fdopen(descriptor, "r+")


def make_once(path: Path, make: Callable[[Path], Any]) -> Path:
    """Return a local folder that `make` fills, made by the first of this machine's processes that asks for it."""
    with lock(path.parent):
        if not path.exists():
            unfinished = path.parent / f"{path.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(path)
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a local folder to fill, which takes the place of `path` when it is complete; a kill never leaves a half one there.

    A kill while the two change places leaves the older one as `NAME.replaced`, which the next call puts back. A link stays, and what it
    leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    unfinished, replaced = (path.parent / f"{path.name}.{state}" for state in ("unfinished", "replaced"))
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    for left in (unfinished, replaced):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(path: Path, mark: str) -> None:
    """Refuse to replace what a user names where it is another thing than our own.

    Args:
      mark: the name of the file that a folder of our own holds.

    Raises:
      ValueError: a file is there, or a folder that holds files, hidden ones aside, and not that one.
    """
    path = Path(os.path.realpath(path))
    for folder in (path, path.parent / f"{path.name}.replaced"):  # see `whole_folder`
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder.")
        if folder.is_dir() and not (folder / mark).exists() and any(not one.name.startswith(".") for one in folder.iterdir()):
            raise ValueError(f"{folder} holds files, and no {mark}, so it is not replaced: name another folder.")


def check_regular(path: epath.PathLike) -> None:
    """Refuse what is no regular file: reading a pipe or a device may never end.

    Raises:
      ValueError: there is no such file, it cannot be read, or it is of another kind.
    """
    if is_remote(path):
        return
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.R_OK)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    if not regular:
        raise ValueError(f"{path} is no regular file that can be read: name a file.")


def leads_out(path: epath.PathLike, folder: epath.PathLike) -> bool:
    """Return whether a path in a folder is a link, or lies behind one, to what is not in that folder."""
    return not is_remote(path) and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_own(path: Path, folder: Path) -> None:
    """Refuse a file of a model that lies elsewhere: a copy of the model would hold a file of somebody else.

    Raises:
      ValueError: a link that leads out of the folder, or what is no regular file.
    """
    check_regular(path)
    # The hub's cache keeps the content of all snapshots of a model beside them.
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if leads_out(path, home):
        raise ValueError(f"{path} is a link that leads out of {home}: put a copy in its place.")


def sha256(path: epath.PathLike) -> str:
    """Return the SHA-256 of a regular file's content, in hex."""
    check_regular(path)
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
