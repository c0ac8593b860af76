"""The model directory: all that it takes to use a trained model, readable and checked, of which nothing runs when it is loaded.

    README.md               what people should know of the model
    user_llm.json           format, identity, sizes, rules by which raw events become ids, prompts, checksums of the other files
    user_llm.safetensors    the user's side: encoder, resampler, ways into the LLM, item head
    catalogue.parquet       the items in the order of their numbers
    config.json, model*.safetensors, tokenizer*, ...            the LLM as Hugging Face has it, where it was trained or is exported
    adapter_config.json, adapter_model.safetensors              or its adapters, in peft's layout

Where the LLM came as it is, the directory names it, with the checksums of its files, and does not hold it.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.distributed import is_first
from user_llm.common.files import sha256, whole_folder
from user_llm.common.printable import printable
from user_llm.common.trees import Params
from user_llm.data.catalogue_file import read_catalogue, write_catalogue
from user_llm.data.prompts.base import Lines
from user_llm.data.schema import Schema
from user_llm.data.tokenizer import load_tokenizer
from user_llm.data.vocabulary import Vocabulary, schema_and_names
from user_llm.models import export as formats
from user_llm.models import pretrained
from user_llm.models.pretrained import checkpoint_files, decoder_config, find_checkpoint, load_decoder
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.serving.card import card
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.predictor import Predictor
from user_llm.serving.settings import (
    AGAIN,
    FILE,
    FORMAT,
    Base,
    Limits,
    Settings,
    identity,
    kind_of,
    numbered,
    plain,
    read_settings,
    reading,
    template,
    write_settings,
)  # fmt: skip

CATALOGUE = "catalogue.parquet"
PATTERNS = (*pretrained.PATTERNS, "*.parquet", "README.md")  # of the files of a model directory


@dataclasses.dataclass(frozen=True)
class Making:
    """How a model came about, of which its directory keeps what is of use.

    Attributes:
      base: the LLM that it was made from, None for one that was trained from scratch.
      touched: whether the LLM's own weights were trained, so that they must be written.
      source: the directory of that LLM, or of its tokenizer alone.
      sharding: rules by which the parameters lie on several devices.
      dtype: of the parameters in computation.
      counts: each item's events in training.
      facts: for the model card: `dataset`, `users`, `events`, `items`, `command`, `phase`, `rows` of results, ...
    """

    base: Base | None
    touched: bool
    source: Path
    sharding: trees.Rules
    dtype: str
    counts: np.ndarray
    facts: Mapping[str, Any]


def save(directory: Path, model: Personalizer, made: Making, *, whole: bool = False) -> Personalizer:
    """Write a model to a directory, which appears once it is complete and takes the place of an older one; return it with its identity.

    Of several processes all call it, and the first one writes.

    Args:
      whole: write the LLM even where it could be named, adapters merged.
    """
    predictor = model.predictor
    config = predictor.config
    held = whole or made.touched or made.base is None
    adapters = config.decoder.block.lora is not None
    flat = trees.flatten(predictor.params)
    wanted = {path for path in flat if held or not formats.is_bare_llm(path) or "/lora/" in path}
    params = trees.unflatten({path: meshes.fetch(leaf) for path, leaf in flat.items() if path in wanted})
    if not is_first():
        return model
    settings = _settings(model, made)
    with whole_folder(directory) as folder:
        formats.save_user_side(folder, params)
        if held:
            kept = made.source if (made.source / "config.json").is_file() else None
            formats.save_decoder(folder, params["decoder"], config.decoder, like=kept)
            settings["model"] = plain(dataclasses.asdict(formats.without_adapters(config)))
        elif adapters:
            formats.save_adapter(folder, params["decoder"], config.decoder, made.base.checkpoint if made.base else "")
        for file in formats.tokenizer_files(made.source):
            shutil.copy(file, folder / file.name)
        write_catalogue(folder / CATALOGUE, model.vocabulary.catalogue, made.counts)
        settings["files"] = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        settings["llm"] = None if held or made.base is None else plain(dataclasses.asdict(made.base))
        settings |= {"format": FORMAT, "identity": model.identity or identity(settings)}
        write_settings(folder, settings)
        (folder / "README.md").write_text(card(settings))
    return dataclasses.replace(model, identity=settings["identity"])


def _settings(model: Personalizer, made: Making) -> dict[str, Any]:
    predictor, lines = model.predictor, model.lines
    limits = (field.name for field in dataclasses.fields(Limits))
    return plain({
        "model": dataclasses.asdict(predictor.config), "vocabulary": model.vocabulary.to_json(),
        "lines": {"max_title_tokens": lines.max_title_tokens, "history": lines.kind, "text_items": lines.text_items},
        "prompts": {task: {"kind": kind_of(of)} | of.settings for task, of in predictor.templates.items()},
        "names": model.names, "limits": {name: getattr(predictor, name) for name in limits}, "dtype": made.dtype,
        "sharding": trees.flatten(trees.match(made.sharding, predictor.params)), "facts": made.facts,
    })  # fmt: skip


def load(directory: Path, *, llm: str = "", mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> Personalizer:
    """Return the model of a directory, which is checked as a whole before anything is computed.

    Args:
      llm: where the LLM is that the directory names; empty for what it is called there.
      mesh: the devices; the first one if not given.
      dtype: of the parameters in computation; as in training if not given.

    Raises:
      ValueError: what is missing, altered or of an unknown version, in one sentence.
    """
    _, settings = read_settings(directory)
    file, config = directory / FILE, settings.model
    with reading(file):
        schema, categories = schema_and_names(settings.vocabulary)
    catalogue, _ = read_catalogue(directory / CATALOGUE, schema, categories)
    with reading(file):
        vocabulary = Vocabulary.from_json(settings.vocabulary, catalogue)
        _check_sizes(settings, schema)
    tokenizer = load_tokenizer(directory)
    rows, highest = config.decoder.vocab_size, max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= rows:
        raise ValueError(f"{directory}: the tokenizer has {highest + 1} tokens, and the LLM's table {rows}; {AGAIN}.")
    with reading(file):
        lines = Lines(tokenizer, catalogue, **dataclasses.asdict(settings.lines))
        templates = {task: template(lines, task, of) for task, of in settings.prompts.items()}
        names = {task: numbered(task, of) for task, of in settings.names.items()}
        graphdef, shapes = _abstract(config)
        mesh = mesh or meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        where = meshes.shardings(_rules(settings, shapes), shapes, mesh)
    params = _params(directory, settings, shapes, where, llm, _dtype(dtype or settings.dtype))
    predictor = Predictor(config, graphdef, params, mesh, templates, **dataclasses.asdict(settings.limits))
    return Personalizer(settings.identity, predictor, vocabulary, lines, names, dataclasses.asdict(settings.facts))


def _check_sizes(settings: Settings, schema: Schema) -> None:
    """See that the parts of a model fit one another.

    Raises:
      ValueError: two that do not.
    """
    config, events = settings.model, settings.limits.max_events
    encoder = config.encoder
    if not schema.num_items == config.num_items < config.table_rows:
        raise ValueError(
            f"model: {config.num_items} items in {config.table_rows} rows, and {schema.num_items} in the catalogue."
        )
    if encoder is not None and encoder.schema != schema:
        raise ValueError("model.encoder: its schema is not that of the vocabulary.")
    if (events > 0) != (encoder is not None) or (
        encoder is not None and encoder.positions == "learned" and events > encoder.max_events
    ):
        raise ValueError(f"limits.max_events={events} is not what its encoder reads.")
    if others := sorted(set(settings.names) - set(settings.prompts)):
        raise ValueError(f"names: the model has no task {others[0]!r}.")


def _abstract(config: UserLLMConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the structure of a model and the shapes of its parameters.

    Raises:
      ValueError: sizes that no model has.
    """
    try:
        return trees.abstract(lambda: UserLLM(config, rngs=nnx.Rngs(params=0)))
    except (ValueError, TypeError, KeyError, ArithmeticError, re.error) as error:
        raise ValueError(f"model: no model has such sizes ({printable(error, 200)}).") from error


def _rules(settings: Settings, shapes: Params) -> trees.Rules:
    """Return the rules by which each parameter lies on several devices.

    Raises:
      ValueError: a parameter without a rule, or one that names an axis twice.
    """
    for path in trees.flatten(shapes):
        if path not in settings.sharding:
            raise ValueError(f"sharding: no {path!r}.")
        named = [axis for axis in settings.sharding[path] if axis]
        if len(set(named)) != len(named):
            raise ValueError(f"sharding: {path!r} names an axis twice.")
    return [(f"^{re.escape(path)}$", axes) for path, axes in settings.sharding.items()]


def _dtype(dtype: DTypeLike) -> Any:
    """Return the type of parameters in computation.

    Raises:
      ValueError: it is no type of floating-point numbers.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype={dtype!r} is no type of floating-point numbers: choose float32, bfloat16 or float16.")
    return found


def export(directory: Path, out: Path, *, llm: str = "") -> None:
    """Write the model of a directory to another one, with the whole LLM, adapters merged, for what loads Hugging Face's checkpoints.

    It is the same model, of the same identity: users that one of the two has encoded are users of the other.

    Raises:
      ValueError: as in `load`.
    """
    model, (written, settings) = load(directory, llm=llm), read_settings(directory)
    source = directory if settings.llm is None else _base(settings.llm, llm)
    counts = read_catalogue(directory / CATALOGUE, *schema_and_names(settings.vocabulary))[1]
    rules = _rules(settings, model.predictor.params)
    made = Making(settings.llm, False, source, rules, settings.dtype, counts, written["facts"])
    save(out, model, made, whole=True)


def _params(directory: Path, settings: Settings, shapes: Params, where: Params, llm: str, dtype: Any) -> Params:
    """Return the parameters in their shardings.

    Raises:
      ValueError: an LLM of another architecture, or parameters of other shapes.
    """
    source = directory if settings.llm is None else _base(settings.llm, llm)
    config, bare = settings.model.decoder, decoder_config(source)
    # What says how it is computed, and not what, is ours to choose.
    same = dataclasses.replace(
        config, cross=None, unroll=bare.unroll, remat=bare.remat,
        block=dataclasses.replace(config.block, lora=None, dropout=0.0, attention_kernel=bare.block.attention_kernel),
    )  # fmt: skip
    if same != bare:
        raise ValueError(f"The LLM at {source} is another one than {directory / FILE} says: {AGAIN}.")
    found = {"decoder": load_decoder(source, bare, shardings=where["decoder"])}
    side = formats.load_user_side(directory, shapes)
    if config.block.lora is not None:
        side = trees.combine(side, {"decoder": formats.load_adapter(directory, shapes["decoder"], config)})
    places, flat = trees.flatten(where), trees.flatten(trees.combine(found, side))
    cast = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    return trees.unflatten({path: cast(jax.device_put(leaf, places[path])) for path, leaf in flat.items()})


def _base(base: Base, llm: str) -> Path:
    """Return the directory of the LLM that a model belongs on.

    Raises:
      ValueError: it is not to be had, or another one.
    """
    try:
        found = find_checkpoint(llm or base.checkpoint)
    except ValueError as error:
        raise ValueError(f"This model belongs on the LLM {base.checkpoint}: {error} Or say where it is by llm=...") from error
    there = checkpoint_files(found)
    for name in sorted(there.keys() | base.files):
        if name.startswith("checkpoint/") and there.get(name) != base.files.get(name):
            file = name.removeprefix("checkpoint/")
            raise ValueError(f"{found} is not the LLM that this model belongs on ({base.checkpoint}): {file} is another one.")
    return found
