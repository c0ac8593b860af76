"""The directory of a run while the run writes to it: held against other runs, missed when it is removed, left by no name."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from absl import logging
from etils import epath

from user_llm.common.distributed import agreed
from user_llm.common.files import is_remote, leads_out, open_own

LOCK = "run.lock"
LONGEST_NAME = 200  # bytes; file systems take 255, of which suffixes need some
REMOVED = "{} was removed or moved while the run was writing to it: what is lost must be run again."


def path_part(name: str, what: str) -> str:
    """Return `name` if it can be one part of a path: a file or folder of this name lies in the folder that it is joined to.

    Args:
      what: says in an error what the name is of.

    Raises:
      ValueError: an empty name, `.` or `..`, a slash or backslash, a control character, spaces around it, or too long a name.
    """
    faults = {
        "is empty": not name.strip(),
        "means another folder": name.strip() in (".", ".."),
        "has a slash or a backslash": "/" in name or "\\" in name,
        "has a character that cannot be printed": not name.isprintable(),
        "begins or ends with a space": name != name.strip(),
        f"is longer than {LONGEST_NAME} bytes": len(name.encode(errors="replace")) > LONGEST_NAME,
    }
    for fault, true in faults.items():
        if true:
            shown = name if len(name) <= 60 else f"{name[:60]}..."
            raise ValueError(f"{what} {shown!r} {fault}, and folders are named by it: choose another.")
    return name


def check_tree(folder: epath.Path) -> None:
    """Refuse a folder of a run that holds anything but folders and regular files of its own.

    A link that leads out of it would show, or overwrite, what belongs to somebody else; a pipe is waited for without end.

    Raises:
      ValueError: the first such path.
    """
    for parent, folders, names in [] if is_remote(folder) else os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink() and leads_out(path, folder):
                raise ValueError(f"{path} is a link that leads out of {folder}: put a copy in its place, or delete it.")
            if os.path.lexists(path) and not (path.is_dir() or path.is_file()):
                raise ValueError(f"{path} is neither a file nor a folder: delete it.")


@contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
    """Hold a run's directory, made if missing, against other runs, until the block ends; the lock ends with its process.

    Of several processes of one run the first holds it. A directory on a remote store cannot be locked: that is logged.

    Raises:
      ValueError: another run holds it, or it cannot be written.
      FileNotFoundError: it was removed meanwhile, whatever else went wrong because of that.
    """
    with ExitStack() as stack:

        def take() -> None:
            if is_remote(workdir):
                logging.info("%s is on a remote store, where no lock keeps a second run out: start no other there.", workdir)
            else:
                stack.enter_context(_locked(workdir))

        agreed(take)
        if is_remote(workdir):
            yield
        else:
            with standing(workdir, LOCK):
                yield


@contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open_own(Path(workdir) / LOCK)
    except OSError as error:
        raise ValueError(f"Cannot write the run to --workdir={workdir}: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use by another run ({file.read(200).strip()}): wait for it, or choose another --workdir."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logging.warning("%s is on a file system without locks: nothing keeps a second run out.", workdir)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        check_tree(workdir)
        yield


@contextmanager
def standing(folder: epath.Path, mark: str = "") -> Iterator[Callable[[], None]]:
    """Yield a check that a folder still stands where it was, which is made once more at the end of the block.

    Whatever fails after the folder was removed is said to have failed for that.

    Args:
      mark: a file in the folder that nobody but who removes the folder would remove; a library that writes at the same moment may
        keep the folder itself alive.

    Raises:
      FileNotFoundError: the folder was removed, moved or replaced.
    """
    if is_remote(folder):
        yield lambda: None
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # while it is open, no other folder gets its number

    def check(cause: Exception | None = None) -> None:
        try:
            stands = os.path.samestat(os.stat(folder), os.fstat(descriptor)) and (folder / mark).exists()
        except OSError:
            stands = False
        if not stands:
            raise FileNotFoundError(REMOVED.format(folder)) from cause

    try:
        yield check
        check()
    except Exception as error:
        check(error)
        raise
    finally:
        os.close(descriptor)
