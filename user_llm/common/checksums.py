"""The checksums of a folder's files, kept beside them: what is read later is what was written."""

import json
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from user_llm.common.files import files_below, sha256, whole
from user_llm.common.records import parse, read_file

MANIFEST = "checksums.json"
READERS = 8  # files that are hashed at a time


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
    if not manifest.exists():
        raise ValueError(f"{folder} has no {MANIFEST}: it was not written to its end, or files were deleted.")
    try:
        entries = parse(read_file(manifest))
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
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
