"""A model directory, read back into a model. What such a directory holds stands in `artifact.py`; all of its files are checked."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.printable import printable
from user_llm.common.trees import Params
from user_llm.data.catalogue_file import read_catalogue
from user_llm.data.prompts.base import Lines
from user_llm.data.schema import Schema
from user_llm.data.tokenizer import load_tokenizer
from user_llm.data.vocabulary import Vocabulary, schema_and_names
from user_llm.models import export as formats
from user_llm.models import item_rows
from user_llm.models.families import FAMILIES, Family
from user_llm.models.pretrained import checkpoint_hashes, decoder_config, family_at, find_checkpoint, load_decoder
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLMConfig
from user_llm.serving.growth import CATALOGUE, Growth
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.predictor import Predictor
from user_llm.serving.settings import AGAIN, FILE, Base, Settings, numbered, read_settings, reading, template


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
    source = directory if settings.llm is None else llm_directory(settings.llm, llm)
    tokenizer = load_tokenizer(directory, source)
    tokenizer.check_fits(config.decoder.vocab_size, str(directory), AGAIN)
    with reading(file):
        lines = Lines(tokenizer, catalogue, **dataclasses.asdict(settings.lines))
        templates = {task: template(lines, task, of) for task, of in settings.prompts.items()}
        names = {task: numbered(task, of) for task, of in settings.names.items()}
        graphdef, shapes = _abstract(config)
        mesh = mesh or meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        where = meshes.shardings(sharding_rules(settings, shapes), shapes, mesh)
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
    unscaled = encoder.trained_items if isinstance(encoder, UserEncoderConfig) else 0
    if unscaled and not config.num_items - settings.added <= unscaled < config.num_items:
        raise ValueError(f"model.encoder.trained_items={unscaled}: {settings.added} of {config.num_items} items were added.")
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


def sharding_rules(settings: Settings, shapes: Params) -> trees.Rules:
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


def llm_directory(base: Base, llm: str) -> Path:
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
