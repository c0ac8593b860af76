"""Files that are whole or not there, though several processes may want to write them."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
