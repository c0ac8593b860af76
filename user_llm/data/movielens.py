"""MovieLens as a tensorflow-datasets builder: one record per user, in array_record files, without TensorFlow.

Records keep the publisher's order of rows; how ties are broken, and which users are long enough, is decided when timelines are
loaded, so that one prepared dataset serves all protocols. Titles, genres and ids are stored with the dataset as metadata.
"""

import dataclasses
import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from user_llm.data import movielens_raw
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import GAP_BUCKETS, Catalogue, Timelines, order_events

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


@dataclasses.dataclass
class MovieLensConfig(tfds.core.BuilderConfig):
    """Where the raw files are: a directory, or a release to download from `base_url`."""

    raw_dir: str = ""
    release: str = ""
    base_url: str = BASE_URL


class MovieLens(tfds.core.GeneratorBasedBuilder):
    """One record per user: `user`, and `item`, `rating` and `timestamp` of each event in the file's order."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: list = []

    def _info(self) -> tfds.core.DatasetInfo:
        column = lambda dtype: tfds.features.Tensor(shape=(None,), dtype=dtype)  # noqa: E731
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"user": np.int64, "item": column(np.int32), "rating": column(np.int32), "timestamp": column(np.int64)}
            ),
            homepage="https://grouplens.org/datasets/movielens/",
            metadata=tfds.core.MetadataDict(),
        )

    @property
    def url_infos(self) -> dict:
        """Sizes and checksums that tfds verifies downloads against."""
        return {
            f"{self.builder_config.base_url}/{release}.zip": tfds.download.checksums.UrlInfo(
                size=tfds.core.utils.Size(known[0]), checksum=known[1], filename=f"{release}.zip"
            )
            for release, known in CHECKSUMS.items()
            if known
        }

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = self.builder_config
        directory = config.raw_dir
        if not directory:
            path = _download(dl_manager, config)
            directory = _unzip(path, path.parent / "unzipped")
        raw = movielens_raw.read(directory)
        movies = np.unique(raw.movie)
        names = sorted({name for movie in movies for name in raw.genres[int(movie)]})
        genre_id = {name: i for i, name in enumerate(names, 1)}
        self.info.metadata.update(
            keys=[str(movie) for movie in movies],
            titles=unique_titles([raw.titles[int(movie)] for movie in movies]),
            genres=[[genre_id[name] for name in raw.genres[int(movie)]] for movie in movies],
            genre_names=names,
        )
        return {"train": self._generate_examples(raw, movies)}

    def _generate_examples(self, raw: movielens_raw.RawMovieLens, movies: np.ndarray) -> Iterator[tuple[int, dict]]:
        order = np.argsort(raw.user, kind="stable")
        item = np.searchsorted(movies, raw.movie[order]) + 1
        rating, timestamp = np.round(raw.rating[order] * 2), raw.timestamp[order]
        users, starts = np.unique(raw.user[order], return_index=True)
        for user, start, stop in zip(users, starts, [*starts[1:], len(order)], strict=True):
            events = slice(start, stop)
            yield (
                int(user),
                {
                    "user": int(user),
                    "item": item[events].astype(np.int32),
                    "rating": rating[events].astype(np.int32),
                    "timestamp": timestamp[events],
                },
            )


def _download(dl_manager: tfds.download.DownloadManager, config: MovieLensConfig) -> epath.Path:
    """Return the release's zip; not download_and_extract(), which needs TensorFlow."""
    if CHECKSUMS[config.release] is None:
        logging.warning("No checksum is known for %s: its download cannot be verified.", config.release)
    url = f"{config.base_url}/{config.release}.zip"
    try:
        return epath.Path(dl_manager.download(url))
    # requests' errors are OSErrors; tfds' own have no common base.
    except (OSError, DownloadError, NonMatchingChecksumError) as error:
        raise ValueError(
            f"{url} cannot be downloaded or is not what was published; get the zip by hand and name it."
        ) from error


def unique_titles(titles: list[str]) -> list[str]:
    """Number repeated titles " [2]", " [3]", ... so that a title names one film."""
    out: dict[str, None] = {}  # in order
    for title in titles:
        numbered = (f"{title} [{n}]" for n in itertools.count(2))
        out[next(name for name in itertools.chain([title], numbered) if name not in out)] = None
    return list(out)


def load(
    source: epath.PathLike,
    prepared_dir: epath.PathLike,
    *,
    ties: str = "hashed",
    seed: int = 0,
    min_events: int = 3,
    base_url: str = BASE_URL,
) -> Timelines:
    """Prepare MovieLens once and load its timelines.

    Args:
      source: a directory or zip in any published layout, or the name of a release to download.
      prepared_dir: where the prepared dataset is kept, apart for each state of the raw files.
      ties: `hashed` (by `seed`) or `file`; see `order_events`.
      min_events: users with fewer are left out.

    Raises:
      ValueError: no such source, or a bad row, named by file and line.
    """
    builder = _prepare(str(source), epath.Path(prepared_dir), base_url)
    records = builder.as_data_source(split="train")
    # tfds writes records in an order of its own (by hash), so users are put back in the publisher's.
    records = sorted((records[i] for i in range(len(records))), key=lambda record: record["user"])
    records = [record for record in records if len(record["item"]) >= min_events]
    if not records:
        raise ValueError(f"No user in {source} has {min_events} events: lower min_events.")
    lengths = np.array([len(record["item"]) for record in records])
    user = np.repeat([record["user"] for record in records], lengths)
    item, rating, timestamp = (np.concatenate([record[name] for record in records]) for name in ("item", "rating", "timestamp"))
    order = order_events(user, item, timestamp, ties=ties, seed=seed)
    catalogue = _catalogue(builder.info.metadata)
    bags = catalogue.multi["genres"]
    schema = Schema(
        (
            Feature("item", "item", len(catalogue.titles)),
            Feature("rating", "ordinal", 11),
            Feature("genres", "multi", max(len(catalogue.vocab["genres"]), 2), bags.shape[1]),
            Feature("gap", "time", GAP_BUCKETS),
        )
    )
    return Timelines(
        name=builder.builder_config.name,
        user_keys=[str(record["user"]) for record in records],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item=item[order],
        columns={"rating": rating[order], "timestamp": timestamp[order]},
        schema=schema,
        catalogue=catalogue,
    )


def _prepare(source: str, prepared_dir: epath.Path, base_url: str) -> MovieLens:
    """Return the prepared builder of a source; tfds renames a directory into place only when it is complete."""
    path = epath.Path(source)
    if path.suffix == ".zip" and path.exists():
        path = _unzip(path, prepared_dir / "unzipped")
    if path.is_dir():
        folder = movielens_raw.find_layout(path).parent
        fingerprint = _fingerprint(folder / name for name in movielens_raw.FILES if (folder / name).exists())
        config = MovieLensConfig(name=path.absolute().name, raw_dir=str(path))
    elif source in CHECKSUMS:
        fingerprint = "download"
        config = MovieLensConfig(name=source, release=source, base_url=base_url)
    else:
        raise ValueError(f"No MovieLens at {source!r}: name a directory, a zip, or one of {', '.join(CHECKSUMS)}.")
    builder = MovieLens(config=config, data_dir=str(prepared_dir / fingerprint), file_format="array_record")
    builder.download_and_prepare()
    return builder


def _unzip(path: epath.Path, directory: epath.Path) -> epath.Path:
    """Unpack a release once, into a folder named by its content; complete when it has its name."""
    target = directory / _fingerprint([path]) / path.stem
    if not target.exists():
        unfinished = target.parent / "unfinished"
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(unfinished)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no complete zip: download it again.") from error
        unfinished.rename(target)
    return target


def _fingerprint(files: Iterable[epath.Path]) -> str:
    """Identify files by name and content; sizes and times, in whole seconds here, miss a quick edit."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _catalogue(metadata: dict) -> Catalogue:
    width = max(map(len, metadata["genres"]), default=1)
    genres = np.zeros((len(metadata["keys"]) + 1, max(width, 1)), np.int32)
    for item, bag in enumerate(metadata["genres"], 1):
        genres[item, : len(bag)] = bag
    return Catalogue(
        titles=["", *metadata["titles"]],
        keys=["", *metadata["keys"]],
        multi={"genres": genres},
        vocab={"genres": ["", *metadata["genre_names"]]},
    )
