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
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.distributed import agreed
from user_llm.common.files import sha256, whole_folder
from user_llm.common.printable import printable
from user_llm.common.trees import Params
from user_llm.data.catalogue_file import read_catalogue, write_catalogue
from user_llm.data.prompts.base import Lines
from user_llm.data.schema import Schema
from user_llm.data.tokenizer import load_tokenizer
from user_llm.data.vocabulary import Vocabulary, schema_and_names
from user_llm.models import export as formats
from user_llm.models import item_rows, pretrained
from user_llm.models.families import FAMILIES, Family
from user_llm.models.pretrained import checkpoint_hashes, decoder_config, family_at, find_checkpoint, load_decoder
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLMConfig
from user_llm.nn.stored import by_weight
from user_llm.serving.card import card
from user_llm.serving.growth import CATALOGUE, Growth
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
    sizes,
    template,
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


def load(
    directory: Path,
    *,
    llm: str = "",
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    encoders: Mapping[str, Any] | None = None,
    families: Mapping[str, Family] = FAMILIES,
) -> Personalizer:
    """Load the model of a directory. All its files are checked first.

    Args:
      llm: the directory or the hub name of the LLM that the model directory names; empty for the name in the model directory.
      mesh: the devices to compute on; jax's first device if it is not given.
      dtype: the type of the parameters in computation; that of the training if it is not given.
      encoders: the encoder of a model whose encoder is not ours, by its kind.
      families: the families of LLMs that may be read.

    Raises:
      ValueError: a file is missing, altered or of an unknown format, or the parts of the model do not fit each other.
    """
    _, settings = read_settings(directory, encoders)
    file, config = directory / FILE, settings.model
    with reading(file):
        schema, categories = schema_and_names(settings.vocabulary)
    catalogue, counts = read_catalogue(directory / CATALOGUE, schema, categories)
    with reading(file):
        vocabulary = Vocabulary.from_json(settings.vocabulary, catalogue)
        _check_sizes(settings, schema)
    source = directory if settings.llm is None else _base(settings.llm, llm)
    tokenizer = load_tokenizer(directory, source)
    tokenizer.check_fits(config.decoder.vocab_size, str(directory), AGAIN)
    with reading(file):
        lines = Lines(tokenizer, catalogue, **dataclasses.asdict(settings.lines))
        templates = {task: template(lines, task, of) for task, of in settings.prompts.items()}
        names = {task: numbered(task, of) for task, of in settings.names.items()}
        graphdef, shapes = _abstract(config)
        mesh = mesh or meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        where = meshes.shardings(_rules(settings, shapes), shapes, mesh)
    computed = _dtype(dtype or settings.dtype)
    params = _params(directory, source, settings, shapes, where, computed, families)
    # In another type it computes something else, and so it is another model.
    identity_of = settings.identity if computed == _dtype(settings.dtype) else f"{settings.identity}-{computed}"
    graph = None
    if settings.transitions:
        trained = counts[: len(counts) - settings.added]
        graph = formats.load_transitions(directory, catalogue, trained, settings.transitions)
    limits = dataclasses.asdict(settings.limits)
    predictor = Predictor(config, graphdef, params, mesh, templates, **limits, transitions=graph)
    growth = Growth.of(directory, settings.identity, catalogue, counts, settings, encoders)
    return Personalizer(identity_of, predictor, vocabulary, lines, names, dataclasses.asdict(settings.facts), growth)


def _check_sizes(settings: Settings, schema: Schema) -> None:
    """Check that the sizes of the model, its catalogue and its limits fit each other.

    Raises:
      ValueError: two of them do not fit each other.
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
        encoder is not None and encoder.longest is not None and events > encoder.longest
    ):
        raise ValueError(f"limits.max_events={events} is not what its encoder reads.")
    if settings.added >= config.num_items:
        raise ValueError(f"added: {settings.added} of {config.num_items} items, so that none is left of the training.")
    unscaled = encoder.unscaled_items if isinstance(encoder, UserEncoderConfig) else 0
    if unscaled and not config.num_items - settings.added <= unscaled < config.num_items:
        raise ValueError(f"model.encoder.unscaled_items={unscaled}: {settings.added} of {config.num_items} items were added.")
    if others := sorted(set(settings.names) - set(settings.prompts)):
        raise ValueError(f"names: the model has no task {others[0]!r}.")


def _abstract(config: UserLLMConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the structure of a model and the shapes of its parameters.

    Raises:
      ValueError: no model can have these sizes.
    """
    try:
        return item_rows.abstract(config)
    except (ValueError, TypeError, KeyError, ArithmeticError, re.error) as error:
        raise ValueError(f"model: no model has such sizes ({printable(error, 200)}).") from error


def _rules(settings: Settings, shapes: Params) -> trees.Rules:
    """Return the rules by which the parameters are divided among devices, one rule for each parameter.

    Raises:
      ValueError: a parameter has no rule, or a rule names a mesh axis twice.
    """
    for path in trees.flatten(shapes):
        if path not in settings.sharding:
            raise ValueError(f"sharding: no {path!r}.")
        named = [axis for axis in settings.sharding[path] if axis]
        if len(set(named)) != len(named):
            raise ValueError(f"sharding: {path!r} names an axis twice.")
    return [(f"^{re.escape(path)}$", axes) for path, axes in settings.sharding.items()]


def _dtype(dtype: DTypeLike) -> Any:
    """Return the type of the parameters in computation.

    Raises:
      ValueError: it is not a floating-point type.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype={dtype!r} is no type of floating-point numbers: choose float32, bfloat16 or float16.")
    return found


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
      ValueError: as in `load`.
    """
    model = load(directory, llm=llm, encoders=encoders, families=families)
    written, settings = read_settings(directory, encoders)
    source = directory if settings.llm is None else _base(settings.llm, llm)
    counts = read_catalogue(directory / CATALOGUE, *schema_and_names(settings.vocabulary))[1]
    rules = _rules(settings, model.predictor.params)
    made = Making(settings.llm, False, source, rules, settings.dtype, counts, written["facts"], families)
    save(out, model, made, whole=True)


def _params(
    directory: Path,
    source: Path,
    settings: Settings,
    shapes: Params,
    where: Params,
    dtype: Any,
    families: Mapping[str, Family],
) -> Params:
    """Return the parameters, placed on their devices.

    Args:
      source: the directory of the LLM.
      shapes: the shape of each parameter.
      where: the sharding of each parameter.

    Raises:
      ValueError: the LLM is of another architecture than the model says, or a parameter has another shape.
    """
    config, bare = settings.model.decoder, decoder_config(source, families)
    # These settings say how the LLM is computed and not what it computes, so that they may differ.
    same = dataclasses.replace(
        config, cross=None, unroll=bare.unroll, remat=bare.remat,
        block=dataclasses.replace(config.block, lora=None, quantize="", dropout=0.0, attention_kernel=bare.block.attention_kernel),
    )  # fmt: skip
    if same != bare:
        raise ValueError(f"The LLM at {source} is another one than {directory / FILE} says: {AGAIN}.")
    bare = dataclasses.replace(bare, block=dataclasses.replace(bare.block, quantize=config.block.quantize))
    like = meshes.placed(trees.in_type(shapes["decoder"], dtype), where["decoder"])
    found = {"decoder": load_decoder(source, bare, like=like, families=families)}
    side = formats.load_user_side(directory, shapes)
    if config.block.lora is not None:
        side = trees.combine(
            side, {"decoder": formats.load_adapter(directory, shapes["decoder"], config, family_at(source, families))}
        )
    places = trees.flatten(where)
    cast = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    placed = {path: cast(jax.device_put(leaf, places[path])) for path, leaf in trees.flatten(side).items()}
    return trees.combine(found, trees.unflatten(placed))


def _base(base: Base, llm: str) -> Path:
    """Return the directory of the LLM that a model directory names.

    Args:
      llm: where to look for it; empty for the name in the model directory.

    Raises:
      ValueError: the LLM cannot be found or downloaded, or its files are not those that the model was trained with.
    """
    try:
        found = find_checkpoint(llm or base.checkpoint)
    except ValueError as error:
        raise ValueError(f"This model belongs on the LLM {base.checkpoint}: {error} Or say where it is by llm=...") from error
    there = checkpoint_hashes(found)
    for name in sorted(there.keys() | base.files):
        if name.startswith("checkpoint/") and there.get(name) != base.files.get(name):
            file = name.removeprefix("checkpoint/")
            raise ValueError(f"{found} is not the LLM that this model belongs on ({base.checkpoint}): {file} is another one.")
    return found
