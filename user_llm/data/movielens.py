"""MovieLens by directory, zip or name of a release to download (Harper and Konstan 2015)."""

import os
from pathlib import Path

from etils import epath

from user_llm.data import movielens_raw
from user_llm.data.download import fetch, unzip
from user_llm.data.raw import Raw

BASE_URL = "https://files.grouplens.org/datasets/movielens"
# Size and sha256 of each zip, from tensorflow_datasets/url_checksums/movielens.txt (4.9.10). ml-latest changes in place, and for
# the others no checksum is published there: these are downloaded with a warning.
CHECKSUMS = {
    "ml-100k": (4924029, "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),
    "ml-1m": (5917549, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    "ml-20m": (198702078, "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3"),
    "ml-25m": (261978986, "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa"),
    "ml-latest-small": (978202, "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436"),
    "ml-10m": None,
    "ml-32m": None,
    "ml-latest": None,
}


def find(source: epath.PathLike, directory: epath.PathLike, *, base_url: str = BASE_URL, bad_rows: str = "refuse") -> Raw:
    """Return MovieLens as published.

    Args:
      source: a directory or zip in any published layout, or the name of a release to download.
      directory: where downloads and what is unpacked are kept.
      bad_rows: `refuse`, or `skip` to leave rows out that cannot be read.

    Raises:
      ValueError: no such source, or one that is incomplete.
    """
    path, directory = epath.Path(source), epath.Path(directory)
    if str(source) in CHECKSUMS and not path.exists():
        path = fetch(f"{base_url}/{source}.zip", directory / "downloads", CHECKSUMS[str(source)])
    elif not path.is_dir() and not (path.suffix == ".zip" and path.exists()):
        raise ValueError(f"No MovieLens at {str(source)!r}: name a directory, a zip, or one of {', '.join(CHECKSUMS)}.")
    folder = path if path.is_dir() else unzip(path, directory / "unzipped", movielens_raw.ALL_FILES)
    name = str(source) if str(source) in CHECKSUMS else Path(os.path.abspath(path)).stem
    return movielens_raw.open_release(folder, name=name, bad_rows=bad_rows)
