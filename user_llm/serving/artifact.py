"""The model directory, which holds everything that is needed to use a trained model. No code is run from it.

    README.md               the model card
    user_llm.json           format, identity, sizes, rules by which raw events become ids, prompts, checksums of the other files
    user_llm.safetensors    everything but the LLM: encoder, resampler, what links user tokens to the LLM, item head
    catalogue.parquet       the items in the order of their numbers, those that were added after the training at the end
    transitions.safetensors the steps from item to item, if the model ranks with transitions
    tokenizer*, ...         the tokenizer, in Hugging Face's layout
    config.json, model*.safetensors                    the LLM in Hugging Face's layout, if its weights were trained or are exported
    adapter_config.json, adapter_model.safetensors     the adapters of the LLM in peft's layout, if it has adapters

If the LLM's own weights are those of an existing checkpoint, the directory does not hold them. It names the checkpoint and holds
the checksums of its files.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.distributed import agreed
from user_llm.common.files import check_replaceable, sha256, whole_folder
from user_llm.common.trees import Params
from user_llm.data.catalogue_file import read_catalogue, write_catalogue
from user_llm.data.vocabulary import schema_and_names
from user_llm.models import export as formats
from user_llm.models import pretrained
from user_llm.models.families import FAMILIES, Family
from user_llm.models.pretrained import family_at
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.nn.stored import by_weight
from user_llm.serving.card import card
from user_llm.serving.growth import CATALOGUE
from user_llm.serving.loading import llm_directory, load, sharding_rules
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.settings import (
    FILE,
    FORMAT,
    Base,
    Limits,
    identity,
    kind_of,
    plain,
    read_settings,
    sizes,
    write_settings,
)  # fmt: skip

PATTERNS = (*pretrained.PATTERNS, "*.parquet", "README.md")  # globs that match the files of a model directory


@dataclasses.dataclass(frozen=True)
class Making:
    """What `save` needs to know about how a model was made.

    Attributes:
      base: the checkpoint that the LLM was made from; None if the LLM was trained from scratch.
      touched: whether the LLM's own weights differ from those of `base`, so that they must be written.
      source: the directory of that checkpoint; for an LLM that was trained from scratch, the directory of its tokenizer.
      sharding: the rules by which the parameters are divided among devices.
      dtype: the type of the parameters in computation.
      counts: the number of training events of each item; index 0 is PAD.
      facts: what the model card says: `dataset`, `users`, `events`, `items`, `command`, `phase`, `rows` of results and so on.
      families: the families of LLMs that `source` may be of.
    """

    base: Base | None
    touched: bool
    source: Path
    sharding: trees.Rules
    dtype: str
    counts: np.ndarray
    facts: Mapping[str, Any]
    families: Mapping[str, Family] = dataclasses.field(default_factory=lambda: FAMILIES)


def save(
    directory: Path,
    model: Personalizer,
    made: Making,
    *,
    whole: bool = False,
) -> Personalizer:
    """Write a model to a directory, and return the model with its identity.

    The directory appears when it is complete. It replaces a directory that was there before. In a run of several processes every
    process must call this function. Only the first process writes; the identity is the same in all of them.

    Args:
      whole: whether to write the whole LLM, with adapters merged into its weights, even where the LLM could only be named.

    Raises:
      ValueError: the first process cannot write the directory, and there are other processes.
    """
    held = whole or made.touched or made.base is None
    flat = trees.flatten(model.predictor.params)
    wanted = {path for path in flat if held or not formats.is_bare_llm(path) or "/lora/" in path}
    params = trees.unflatten({path: meshes.fetch(leaf) for path, leaf in flat.items() if path in wanted})
    return dataclasses.replace(model, identity=agreed(lambda: _write(directory, model, made, params, held=held)))


def _write(directory: Path, model: Personalizer, made: Making, params: Params, *, held: bool) -> str:
    """Write a model to a directory, and return the model's identity.

    Args:
      held: whether the directory holds the LLM; otherwise it names the LLM.
    """
    config, settings = model.predictor.config, _settings(model, made)
    with whole_folder(directory) as folder:
        formats.save_user_side(folder, params)
        if held:
            kept = made.source if (made.source / "config.json").is_file() else None
            formats.save_decoder(folder, params["decoder"], config.decoder, like=kept, families=made.families)
            settings |= {"model": sizes(formats.without_adapters(config)), "sharding": by_weight(settings["sharding"])}
        elif config.decoder.block.lora is not None:
            base, family = made.base.checkpoint if made.base else "", family_at(made.source, made.families)
            modules = pretrained.modules_at(made.source)
            formats.save_adapter(folder, params["decoder"], config.decoder, base, family, modules)
        for file in formats.tokenizer_files(made.source):
            shutil.copy(file, folder / file.name)
        write_catalogue(folder / CATALOGUE, model.vocabulary.catalogue, made.counts)
        if (graph := model.predictor.transitions) and graph.weight:
            formats.save_transitions(folder, graph)
        settings["files"] = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        settings["llm"] = None if held or made.base is None else plain(dataclasses.asdict(made.base))
        settings |= {"format": FORMAT, "identity": model.identity or identity(settings)}
        write_settings(folder, settings)
        (folder / "README.md").write_text(card(settings))
    return settings["identity"]


def copy_to_store(directory: Path, target: epath.Path) -> None:
    """Copy a model directory to a folder of a remote store, in place of a model that is there.

    A store cannot rename a folder. The file `user_llm.json` is therefore deleted first and written last. A copy that was killed does
    not load, because it lacks this file; the next call deletes what is left of it.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / FILE).unlink(missing_ok=True)
    for left in target.iterdir():
        left.rmtree() if left.is_dir() else left.unlink()
    for file in sorted(directory.iterdir(), key=lambda file: (file.name == FILE, file.name)):
        epath.Path(file).copy(target / file.name, overwrite=True)


def _settings(model: Personalizer, made: Making) -> dict[str, Any]:
    predictor, lines = model.predictor, model.lines
    limits = (field.name for field in dataclasses.fields(Limits))
    kind, graph = (predictor.config.encoder or UserEncoderConfig).kind, predictor.transitions
    return plain({
        **({} if kind == UserEncoderConfig.kind else {"encoder": kind}), "model": sizes(predictor.config), "vocabulary": model.vocabulary.to_json(),
        "lines": {"max_title_tokens": lines.max_title_tokens, "history": lines.kind, "text_items": lines.text_items},
        "prompts": {task: {"kind": kind_of(of)} | of.settings for task, of in predictor.templates.items()},
        "names": model.names, "limits": {name: getattr(predictor, name) for name in limits}, "dtype": made.dtype,
        "sharding": trees.flatten(trees.match(made.sharding, predictor.params)), "facts": made.facts,
        **({"added": model.growth.added} if model.growth and model.growth.added else {}),
        **({"transitions": graph.weight} if graph and graph.weight else {}),
    })  # fmt: skip


def export(
    directory: Path,
    out: Path,
    *,
    llm: str = "",
    encoders: Mapping[str, Any] | None = None,
    families: Mapping[str, Family] = FAMILIES,
) -> None:
    """Copy a model directory to `out` with the whole LLM in it, for programs that load Hugging Face checkpoints.

    Adapters are merged into the LLM's weights. The copy has the same identity: a user that one of the two models encoded can be
    used with the other. A directory at `out` is replaced.

    Args:
      llm, encoders, families: as in `load`.

    Raises:
      ValueError: as in `load`, or `out` holds something else than a model.
    """
    check_replaceable(out, FILE)
    model = load(directory, llm=llm, encoders=encoders, families=families)
    written, settings = read_settings(directory, encoders)
    source = directory if settings.llm is None else llm_directory(settings.llm, llm)
    counts = read_catalogue(directory / CATALOGUE, *schema_and_names(settings.vocabulary))[1]
    rules = sharding_rules(settings, model.predictor.params)
    made = Making(settings.llm, False, source, rules, settings.dtype, counts, written["facts"], families)
    save(out, model, made, whole=True)
