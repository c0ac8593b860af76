"""Downloads, verified where a checksum is known, and archives unpacked once."""

import zipfile
import zlib
from collections.abc import Collection
from pathlib import PurePosixPath

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from user_llm.data.opening import ALWAYS_ALLOWED, MOST_GROWTH
from user_llm.data.prepare import fingerprint


def fetch(url: str, directory: epath.PathLike, known: tuple[int, str] | None) -> epath.Path:
    """Return the downloaded file, fetched once; `known` is its size and sha256.

    Raises:
      ValueError: it cannot be had, or is not what was published.
    """
    name = url.rpartition("/")[2]
    if known is None:
        logging.warning("No checksum is known for %s: its download cannot be verified.", name)
        infos = {}
    else:
        infos = {url: tfds.download.checksums.UrlInfo(size=tfds.core.utils.Size(known[0]), checksum=known[1], filename=name)}
    try:
        manager = tfds.download.DownloadManager(
            download_dir=directory, url_infos=infos, force_checksums_validation=known is not None
        )
        return epath.Path(manager.download(url))
    # requests' errors are OSErrors; tfds' own have no common base.
    except (OSError, DownloadError, NonMatchingChecksumError) as error:
        raise ValueError(f"{url} cannot be downloaded or is not what was published; get it by hand and name it.") from error


def unzip(path: epath.Path, directory: epath.Path, names: Collection[str]) -> epath.Path:
    """Unpack the files of these names once, into a folder named by the archive's content; complete when it has its name.

    What lies deeper than in one folder of the archive, or elsewhere than below it, is left where it is.

    Raises:
      ValueError: no zip, or one that is cut off, encrypted, or grows beyond all data.
    """
    target = directory / fingerprint([path]) / path.stem
    if not target.exists():
        unfinished = target.parent / "unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        most = max(ALWAYS_ALLOWED, MOST_GROWTH * path.stat().length)
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    parts = PurePosixPath(entry.filename).parts
                    if parts and parts[-1] in names and len(parts) <= 2 and not {"..", "/"} & set(parts):
                        most -= extract(archive, entry, unfinished.joinpath(*parts), most)
        # A method of packing that Python does not know, or a file that needs a password.
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path} is no complete zip without a password ({error}): download it again.") from error
        unfinished.rename(target)
    return target


def extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: epath.Path, most: int) -> int:
    """Unpack one file and return its size.

    Raises:
      ValueError: it is larger than `most` bytes.
    """
    size = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("wb") as file:
        while data := source.read(1 << 20):
            size += len(data)
            if size > most:
                raise ValueError(
                    f"{archive.filename}, {entry.filename}: unpacked it is more than {MOST_GROWTH} times as large, which no data is: "
                    "unpack it by hand."
                )
            file.write(data)
    return size
