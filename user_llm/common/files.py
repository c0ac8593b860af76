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


def write_json(path: epath.Path, value: Any) -> None:
    """Write JSON, by the first process alone; a kill leaves the file as it was."""
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{path.name}.tmp"
        temporary.write_text(json.dumps(value, indent=1))
        temporary.replace(path)


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


def local_folder(workdir: epath.Path) -> Path:
    """Return where this machine keeps what it makes of the data: the workdir, or for one on gs:// a cache of its own."""
    if "://" not in str(workdir):
        return Path(workdir)
    return Path.home() / ".cache" / "user_llm" / hashlib.sha256(str(workdir).encode()).hexdigest()[:12]
