"""How a model grows: items that are added after its training, by their titles and categories, without any further training.

An added item gets the next number, and numbers are never given again. A user whom the model encoded before therefore stays right. Each user
carries a *mark*: a hash of the added items, in order, that the model had when it encoded the user, and of how it reads them. A model accepts
only users whose mark is one of its own.

Axis letters: I items that were there in training, PAD (number 0) included, V rows of the item table, D width of an item's vector.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from safetensors.numpy import load_file, save_file

from user_llm.common import trees
from user_llm.common.files import check_replaceable, sha256, whole_folder
from user_llm.common.mesh import fetch
from user_llm.data.catalogue_file import read_catalogue, write_catalogue
from user_llm.data.new_items import rows_of
from user_llm.data.timelines import Catalogue
from user_llm.data.vocabulary import schema_and_names
from user_llm.models import item_rows
from user_llm.models.content import Content
from user_llm.models.export import USER_FILE
from user_llm.models.user_encoder import READ_SCALE, UserEncoderConfig
from user_llm.models.user_llm import UserLLMConfig
from user_llm.serving.card import card
from user_llm.serving.predictor import Predictor
from user_llm.serving.settings import FILE, Settings, read_settings, sizes, write_settings

CATALOGUE = "catalogue.parquet"
NO_MARKS: dict[str, int] = {"": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
    """What `add_items` and `save` need of a loaded model.

    Attributes:
      directory: the model directory that the model was loaded from.
      identity: that of the model in it when it was loaded.
      counts: the number of training events of each item of the training; index 0 is PAD.
      marks: {mark: n}: the mark of the first n added items, for n = 0, 1, 2, ...; the mark of none is the empty text.
      content: the regression that computes the vectors of added items. It is fitted at the first `add_items`; None before.
      encoders: the encoders besides ours that the model was loaded with, by their kinds.
    """

    directory: Path
    identity: str
    counts: Int[np.ndarray, " I"]
    marks: dict[str, int] = dataclasses.field(default_factory=lambda: NO_MARKS)
    content: Content | None = None
    encoders: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        directory: Path,
        identity: str,
        catalogue: Catalogue,
        counts: Int[np.ndarray, " V"],
        settings: Settings,
        encoders: Mapping[str, Any] | None = None,
    ) -> "Growth":
        """Return the growth of the model of a directory, which the other arguments describe."""
        first = len(catalogue.keys) - settings.added
        marks = _marks(NO_MARKS, catalogue, first, settings.model)
        return cls(directory, identity, counts[:first], marks, encoders=encoders)

    @property
    def added(self) -> int:
        """The number of added items."""
        return len(self.marks) - 1

    def grown(self, predictor: Predictor, catalogue: Catalogue) -> tuple["Growth", Predictor]:
        """Return the growth and the predictor of the same model with the items of a larger catalogue.

        Raises:
          ValueError: the model's encoder is not one of this package, or no item has training events.
        """
        first = len(self.counts) + self.added
        path = item_rows.table_path(predictor.config)
        content = self.content
        if content is None:
            trained = fetch(trees.flatten(predictor.params)[path])[: len(self.counts)]
            content = Content.fit(catalogue, trained, self.counts)
        config = item_rows.roomy(predictor.config, len(catalogue.keys) - 1)
        schema = config.encoder.schema if config.encoder else None
        rows = content.place(catalogue, first), item_rows.features_of(schema, catalogue, first)
        params = item_rows.with_rows(config, predictor.params, first, *rows)
        graphdef = predictor.graphdef if config == predictor.config else item_rows.abstract(config)[0]
        growth = dataclasses.replace(self, marks=_marks(self.marks, catalogue, first, config), content=content)
        return growth, dataclasses.replace(predictor, config=config, graphdef=graphdef, params=params)

    def save(self, out: Path, predictor: Predictor, catalogue: Catalogue) -> None:
        """Write the model directory with all added items to `out`; a model directory there is replaced.

        Raises:
          ValueError: the directory that the model was loaded from is gone, altered or another model's by now, or `out` holds something
            else than a model.
        """
        written, settings = read_settings(self.directory, self.encoders)
        there, _ = read_catalogue(self.directory / CATALOGUE, *schema_and_names(settings.vocabulary))
        same = there.keys == catalogue.keys[: len(there.keys)] and there.titles == catalogue.titles[: len(there.keys)]
        mark = next(reversed(_marks(NO_MARKS, there, len(self.counts), settings.model)))
        if settings.identity != self.identity or not same or mark not in self.marks:
            raise ValueError(
                f"{self.directory} holds another model, or other items, than when the model was loaded: load it again."
            )
        check_replaceable(out, FILE)
        with whole_folder(out) as folder:
            for name in written["files"]:
                shutil.copy(self.directory / name, folder / name)
            if len(catalogue.keys) > len(there.keys):
                config = item_rows.resized(settings.model, len(catalogue.keys) - 1)
                self._write_items(folder, config, predictor, catalogue, len(there.keys))
                written["files"] = {name: sha256(folder / name) for name in written["files"]}
                written["model"] = sizes(config)
                written["vocabulary"]["schema"][0]["size"] = config.num_items + 1
                written["added"] = self.added
            write_settings(folder, {key: value for key, value in written.items() if key != "seal"})
            (folder / "README.md").write_text(card(written))

    def _write_items(self, folder: Path, config: UserLLMConfig, predictor: Predictor, catalogue: Catalogue, known: int) -> None:
        """Write the catalogue, and the parameters with rows for its items, over those of a copy of the directory.

        Args:
          config: the sizes of the model that is written.
          known: the number of the directory's items, PAD included.
        """
        counts = np.zeros(len(catalogue.keys), np.int64)
        counts[: len(self.counts)] = self.counts
        arrays, now = load_file(folder / USER_FILE), trees.flatten(predictor.params)
        for name in {item_rows.table_path(config), item_rows.TOWER} & arrays.keys():
            table = np.zeros((config.table_rows, arrays[name].shape[1]), arrays[name].dtype)
            table[:known] = arrays[name][:known]
            table[known : len(counts)] = fetch(now[name])[known : len(counts)]
            arrays[name] = table
        save_file(arrays, folder / USER_FILE)
        write_catalogue(folder / CATALOGUE, catalogue, counts)


def _marks(marks: dict[str, int], catalogue: Catalogue, first: int, config: UserLLMConfig) -> dict[str, int]:
    """Return marks with those of the items from number `first` on.

    A mark is a hash of the mark before it, of an item, and of the factor by which the encoder reads the item's row, if there is one.
    """
    out, last = dict(marks), next(reversed(marks))
    unscaled = config.encoder.trained_items if isinstance(config.encoder, UserEncoderConfig) else 0
    for number, row in enumerate(rows_of(catalogue, first), first):
        hashed = [last, row, READ_SCALE] if 0 < unscaled < number else [last, row]
        last = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]
        out[last] = len(out)
    return out
