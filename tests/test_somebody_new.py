"""The uses of a model on a machine that has only the model directory, for a user and an item that no training saw.

| layout       | cross-attention | soft prompt | both    |
|--------------|-----------------|-------------|---------|
| movielens    | small           | adapters    | small   |
| amazon       | adapters        | small *     | adapters|
| google_local | small           | adapters    | small   |
| events       | adapters *      | small       | adapters|

"small" is an LLM that the directory holds; "adapters" are LoRA adapters on a checkpoint in Hugging Face's layout, which the
directory names. Each pair of layout and injection, of layout and LLM, and of injection and LLM is in the table. All cells are of
`test_a_new_user_needs_only_the_model_directory`, with drawn parameters. Cells with * run always, the others are slow.

What trained models answer, beside what their run has measured: `test_synthetic_variants.py` (google_local and events with
cross-attention; amazon with a soft prompt) and `test_main.py` (movielens, the quick start). Checkpoints that transformers wrote, in
every family, with adapters too: `test_export.py`, both injections. Models without an encoder: `serving/test_personalizer.py`.
"""

import dataclasses
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from model_directories import making
from served import raw_rows
from somebody_new import away, check_somebody_new
from tiny_models import make_models

import user_llm
from user_llm.common import trees
from user_llm.data import amazon, event_files, google_local, movielens, prepare, synthetic_files
from user_llm.data.event_files import Columns
from user_llm.models import export as formats
from user_llm.nn.lora import LoRAConfig
from user_llm.serving import artifact

READERS = {
    "movielens": lambda folder: movielens.find(folder, folder),
    "amazon": lambda folder: amazon.find(folder, synthetic_files.NAME),
    "google_local": lambda folder: google_local.find(folder, (synthetic_files.NAME,)),
    "events": lambda folder: event_files.find(str(folder), Columns(**synthetic_files.COLUMNS), name="events"),
}
INJECTIONS = {"cross": (True, False), "soft": (False, True), "both": (True, True)}
VARIANTS = {
    f"{injection} {llm}": dict(
        cross=cross, soft=soft, resampler=True, objective="autoregressive", text_items=0,
        lora=LoRAConfig(2, 4.0, 0.0, ".*") if llm == "adapters" else None,
    )
    for injection, (cross, soft) in INJECTIONS.items() for llm in ("small", "adapters")
}  # fmt: skip
ALWAYS = ("amazon-soft", "events-cross")
CELLS = [
    pytest.param(
        layout, injection, ("small", "adapters")[(row + column) % 2], id=f"{layout}-{injection}",
        marks=[] if f"{layout}-{injection}" in ALWAYS else pytest.mark.slow,
    )
    for row, layout in enumerate(READERS) for column, injection in enumerate(INJECTIONS)
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, drawn):
    """Return `get(layout)`: the folder with all that a run has, and a function that makes a model from its variant."""
    found = {}

    def get(layout):
        if layout not in found:
            folder = tmp_path_factory.mktemp("worlds") / layout
            synthetic_files.write(folder / "raw", layout=layout, num_users=8, num_items=30, events_per_user=8, seed=5)
            timelines = prepare.load(READERS[layout](folder / "raw"), folder / "prepared")
            found[layout] = folder, make_models(timelines, drawn, folder / "models", VARIANTS)
        return found[layout]

    return get


@pytest.mark.parametrize(("layout", "injection", "llm"), CELLS)
def test_a_new_user_needs_only_the_model_directory(world, tmp_path, layout, injection, llm):
    folder, make = world(layout)
    made = make(f"{injection} {llm}")
    model = made.written
    if llm == "adapters":
        counts = np.arange(len(made.timelines.catalogue.keys))
        how = dataclasses.replace(making(write_bare_llm(made, tmp_path / "llm")), counts=counts)
        model = artifact.save(made.directory, dataclasses.replace(model, identity=""), how)
        assert not (made.directory / "model.safetensors").exists()
    shutil.copytree(made.directory, tmp_path / "model")
    with away(folder) as (moved,):
        loaded = user_llm.load(tmp_path / "model")
        fields = loaded.vocabulary.fields
        of_user = defaultdict(list)
        for row in raw_rows(moved / "raw", [fields.user, fields.item, fields.time]):
            of_user[row[fields.user]].append(row)
        history = next(iter(of_user.values()))
        check_somebody_new(loaded, history)
        users = [of.encode(history) for of in (model, loaded)]
        rankings = [of.recommend(user, 30) for of, user in zip((model, loaded), users, strict=True)]
        assert [item[:2] for item in rankings[0]] == [item[:2] for item in rankings[1]]
        np.testing.assert_allclose(*([item.score for item in ranking] for ranking in rankings), atol=1e-5)


def write_bare_llm(made, folder: Path) -> Path:
    """Write a model's LLM without its adapters as a checkpoint in Hugging Face's layout."""
    folder.mkdir()
    predictor = made.written.predictor
    bare = {
        path: leaf
        for path, leaf in trees.flatten(predictor.params).items()
        if formats.is_bare_llm(path) and "/lora/" not in path
    }
    formats.save_decoder(folder, trees.unflatten(bare)["decoder"], formats.without_adapters(predictor.config).decoder)
    for file in formats.tokenizer_files(made.directory):
        shutil.copy(file, folder / file.name)
    return folder
