"""How a model grows: items that are added after its training, by their titles and categories, without any further training.

A further item gets the next number, and numbers are never given again. A user whom the model encoded before therefore stays right. A
*mark* names the further items that a user was encoded with, so that two models with different further items do not mix their users.

Axis letters: I items of the training and PAD, V rows of the item table, D width of an item's vector.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors.numpy import load_file, save_file

from user_llm.common import trees
from user_llm.common.files import sha256, whole_folder
from user_llm.common.mesh import fetch
from user_llm.data.catalogue_file import read_catalogue, write_catalogue
from user_llm.data.new_items import rows_of
from user_llm.data.timelines import Catalogue
from user_llm.data.vocabulary import schema_and_names
from user_llm.models import item_rows
from user_llm.models.content import Content
from user_llm.models.export import USER_FILE
from user_llm.serving.card import card
from user_llm.serving.predictor import Predictor
from user_llm.serving.settings import plain, read_settings, write_settings

CATALOGUE = "catalogue.parquet"
NO_MARKS: dict[str, int] = {"": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
    """What a model needs in order to grow.

    Attributes:
      directory: the model directory that the model was loaded from.
      counts: the number of training events of each item of the training; index 0 is PAD.
      marks: each mark, in order, with the number of further items that it stands for; the mark of none is the empty text.
      content: what places items; None until it is needed.
    """

    directory: Path
    counts: Int[np.ndarray, " I"]
    marks: dict[str, int] = dataclasses.field(default_factory=lambda: NO_MARKS)
    content: Content | None = None

    @classmethod
    def of(cls, directory: Path, catalogue: Catalogue, counts: Int[np.ndarray, " V"], added: int) -> "Growth":
        """Return the growth of a model that was loaded from a directory, and has so many further items already."""
        trained = len(catalogue.keys) - added
        return cls(directory, counts[:trained], _marks(NO_MARKS, catalogue, trained))

    @property
    def added(self) -> int:
        """The number of further items."""
        return len(self.marks) - 1

    def grown(self, predictor: Predictor, catalogue: Catalogue) -> tuple["Growth", Predictor]:
        """Return the growth and the predictor of the same model with the items of a larger catalogue.

        Raises:
          ValueError: the model's encoder is not one of this package, or no item has training events.
        """
        first = len(self.counts) + self.added
        path = item_rows.table_path(predictor.config)
        trained = fetch(trees.flatten(predictor.params)[path])[: len(self.counts)]
        content = self.content or Content.fit(catalogue, trained, self.counts)
        config = item_rows.roomy(predictor.config, len(catalogue.keys) - 1)
        rows = content.place(catalogue, first), item_rows.features_of(config, catalogue, first)
        params = item_rows.with_rows(config, predictor.params, first, *rows)
        graphdef = predictor.graphdef if config == predictor.config else item_rows.abstract(config)[0]
        growth = dataclasses.replace(self, marks=_marks(self.marks, catalogue, first), content=content)
        return growth, dataclasses.replace(predictor, config=config, graphdef=graphdef, params=params)

    def save(self, out: Path, predictor: Predictor, catalogue: Catalogue) -> None:
        """Write the model directory with all further items to `out`; a directory there is replaced.

        Raises:
          ValueError: the directory that the model was loaded from is gone, altered or another model's by now.
        """
        written, settings = read_settings(self.directory)
        there, _ = read_catalogue(self.directory / CATALOGUE, *schema_and_names(settings.vocabulary))
        known = len(there.keys)
        if there.keys != catalogue.keys[:known] or there.titles != catalogue.titles[:known]:
            raise ValueError(f"{self.directory} holds other items than it did when the model was loaded: load it again.")
        config = item_rows.resized(settings.model, len(catalogue.keys) - 1)
        counts = np.zeros(len(catalogue.keys), np.int64)
        counts[: len(self.counts)] = self.counts
        arrays, now = load_file(self.directory / USER_FILE), trees.flatten(predictor.params)
        for name in {item_rows.table_path(config), item_rows.TOWER} & arrays.keys():
            table = np.zeros((config.table_rows, arrays[name].shape[1]), arrays[name].dtype)
            table[:known] = arrays[name][:known]
            table[known : len(counts)] = fetch(now[name])[known : len(counts)]
            arrays[name] = table
        with whole_folder(out) as folder:
            for name in written["files"]:
                shutil.copy(self.directory / name, folder / name)
            save_file(arrays, folder / USER_FILE)
            write_catalogue(folder / CATALOGUE, catalogue, counts)
            written["files"] = {name: sha256(folder / name) for name in written["files"]}
            written["model"] = plain(dataclasses.asdict(config))
            written["vocabulary"]["schema"][0]["size"] = config.num_items + 1
            written["added"] = self.added
            write_settings(folder, {key: value for key, value in written.items() if key != "seal"})
            (folder / "README.md").write_text(card(written))


def _marks(marks: dict[str, int], catalogue: Catalogue, first: int) -> dict[str, int]:
    """Return marks with those of the items from number `first` on. A mark is a hash of the mark before it and of an item."""
    out, last = dict(marks), next(reversed(marks))
    for row in rows_of(catalogue, first):
        last = hashlib.sha256(json.dumps([last, row], sort_keys=True).encode()).hexdigest()[:16]
        out[last] = len(out)
    return out
