"""Downloads, verified where a checksum is known, and archives unpacked once."""

import zipfile
import zlib

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

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


def unzip(path: epath.Path, directory: epath.Path) -> epath.Path:
    """Unpack an archive once, into a folder named by its content; complete when it has its name."""
    target = directory / fingerprint([path]) / path.stem
    if not target.exists():
        unfinished = target.parent / "unfinished"
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(unfinished)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no complete zip: download it again.") from error
        unfinished.rename(target)
    return target
