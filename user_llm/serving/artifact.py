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
import hashlib
import json
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
from user_llm.common.errors import naming
from user_llm.common.files import sha256
from user_llm.common.hashes import content_hashes
from user_llm.common.records import anything, misfit, positive_whole_number, read_json, text, true_or_false
from user_llm.common.trees import Params
from user_llm.common.workdir import path_part
from user_llm.config.reader import read_record
from user_llm.data.catalogue_file import read_catalogue, write_catalogue
from user_llm.data.prompts.base import Lines, Question, Template
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.tokenizer import load_tokenizer
from user_llm.data.vocabulary import Vocabulary, schema_and_names
from user_llm.models import export as formats
from user_llm.models.pretrained import decoder_config, find_checkpoint, load_decoder
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.predictor import Predictor

FORMAT = 1
FILE = "user_llm.json"
CATALOGUE = "catalogue.parquet"
KINDS: dict[str, Any] = {"next_item": NextItem, "question": Question}
AGAIN = "get the model directory again"
FORM = {
    "format": positive_whole_number, "identity": text, "seal": text, "model": {}, "vocabulary": {},
    "lines": {"max_title_tokens": positive_whole_number, "history": text, "text_items": anything},
    "prompts": anything, "names": anything,
    "limits": {"max_events": anything, "batch_size": positive_whole_number, "beams": positive_whole_number, "after_instruction": true_or_false, "ranks": true_or_false, "pad_whole": true_or_false},
    "dtype": text, "sharding": anything, "files": anything, "llm": anything, "facts": anything,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Base:
    """An LLM as it came.

    Attributes:
      checkpoint: its name on the hub, or its directory.
      files: the content hashes of its weights and settings, and of its tokenizer's files, by name.
    """

    checkpoint: str
    files: Mapping[str, str]


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
    unfinished = directory.parent / f"{directory.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    formats.save_user_side(unfinished, params)
    settings = _settings(model, made)
    if held:
        kept = made.source if (made.source / "config.json").is_file() else None
        formats.save_decoder(unfinished, params["decoder"], config.decoder, like=kept)
        settings["model"] = dataclasses.asdict(formats.without_adapters(config))
    elif adapters:
        formats.save_adapter(unfinished, params["decoder"], config.decoder, made.base.checkpoint if made.base else "")
    for file in formats.tokenizer_files(made.source):
        shutil.copy(file, unfinished / file.name)
    write_catalogue(unfinished / CATALOGUE, model.vocabulary.catalogue, made.counts)
    names = sorted(path.name for path in unfinished.iterdir())
    settings["files"] = {name: sha256(unfinished / name) for name in names}
    settings["llm"] = None if held or made.base is None else dataclasses.asdict(made.base)
    identity = model.identity or _hash(
        {key: value for key, value in settings.items() if key not in ("limits", "facts", "sharding")}
    )
    settings |= {"format": FORMAT, "identity": identity}
    (unfinished / FILE).write_text(json.dumps(settings | {"seal": _hash(settings)}, indent=1))
    model = dataclasses.replace(model, identity=identity)
    (unfinished / "README.md").write_text(card(settings))
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)
    return model


def _settings(model: Personalizer, made: Making) -> dict[str, Any]:
    predictor, lines = model.predictor, model.lines
    kinds = {of: kind for kind, of in KINDS.items()}
    prompts = {task: {"kind": kinds[type(of)]} | of.settings for task, of in predictor.templates.items()}
    names = ("max_events", "batch_size", "beams", "after_instruction", "ranks", "pad_whole")
    settings = {
        "model": dataclasses.asdict(predictor.config), "vocabulary": model.vocabulary.to_json(),
        "lines": {"max_title_tokens": lines.max_title_tokens, "history": lines.kind, "text_items": lines.text_items},
        "prompts": prompts, "names": {task: {str(n): name for n, name in of.items()} for task, of in model.names.items()},
        "limits": {name: getattr(predictor, name) for name in names}, "dtype": made.dtype,
        "sharding": [[pattern, list(axes)] for pattern, axes in made.sharding], "facts": dict(made.facts),
    }  # fmt: skip
    return json.loads(json.dumps(settings))  # tuples become lists, as they will be read


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load(directory: Path, *, llm: str = "", mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> Personalizer:
    """Return the model of a directory, which is checked as a whole before anything is computed.

    Args:
      llm: where the LLM is that the directory names; empty for what it is called there.
      mesh: the devices; the first one if not given.
      dtype: of the parameters in computation; as in training if not given.

    Raises:
      ValueError: what is missing, altered or of an unknown version, in one sentence.
    """
    settings = _read_settings(directory)
    name = str(directory / FILE)
    with naming(name):
        config = read_record(UserLLMConfig, settings["model"], "model")
        catalogue, _ = read_catalogue(directory / CATALOGUE, *schema_and_names(settings["vocabulary"]))
        vocabulary = Vocabulary.from_json(settings["vocabulary"], catalogue)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, and the LLM's table {config.decoder.vocab_size}; {AGAIN}."
        )
    lines = Lines(tokenizer, catalogue, **settings["lines"])
    mesh = mesh or meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    graphdef, shapes = trees.abstract(lambda: UserLLM(config, rngs=nnx.Rngs(params=0)))
    rules = [(pattern, tuple(axes)) for pattern, axes in settings["sharding"]]
    with naming(name):
        where = meshes.shardings(rules, shapes, mesh)
    params = _params(directory, settings, config, shapes, where, llm, jnp.dtype(dtype or settings["dtype"]))
    with naming(name):
        templates = {task: _template(lines, of) for task, of in settings["prompts"].items()}
    predictor = Predictor(config, graphdef, params, mesh, templates, **settings["limits"])
    names = {task: {int(n): word for n, word in of.items()} for task, of in settings["names"].items()}
    return Personalizer(settings["identity"], predictor, vocabulary, lines, names, settings["facts"])


def export(directory: Path, out: Path, *, llm: str = "") -> None:
    """Write the model of a directory to another one, with the whole LLM, adapters merged, for what loads Hugging Face's checkpoints.

    It is the same model, of the same identity: users that one of the two has encoded are users of the other.

    Raises:
      ValueError: as in `load`.
    """
    model, settings = load(directory, llm=llm), _read_settings(directory)
    base = settings["llm"] and Base(**settings["llm"])
    source = directory if base is None else _base(base, llm)
    counts = read_catalogue(directory / CATALOGUE, *schema_and_names(settings["vocabulary"]))[1]
    made = Making(base, False, source, settings["sharding"], settings["dtype"], counts, settings["facts"])
    save(out, model, made, whole=True)


def _read_settings(directory: Path) -> dict[str, Any]:
    """Return what user_llm.json says, once it and all files that it lists are as they were written."""
    if not (directory / FILE).is_file():
        raise ValueError(f"{directory} holds no {FILE}: name the directory of a model, such as RUN/user_llm/model.")
    settings = read_json(directory / FILE, {"format": positive_whole_number}, AGAIN)
    if settings["format"] != FORMAT:
        raise ValueError(
            f"{directory / FILE} is of format {settings['format']}, and this version reads {FORMAT}: update user_llm."
        )
    if wrong := misfit(settings, FORM):
        raise ValueError(f"{directory / FILE}: {wrong}; {AGAIN}.")
    if settings["seal"] != _hash({key: value for key, value in settings.items() if key != "seal"}):
        raise ValueError(f"{directory / FILE} is not as it was written: {AGAIN}.")
    for name, digest in settings["files"].items():
        file = directory / path_part(name, f"{directory / FILE}: the file")
        if not file.is_file() or sha256(file) != digest:
            raise ValueError(f"{file} is {'not as it was written' if file.is_file() else 'missing'}: {AGAIN}.")
    return settings


def _template(lines: Lines, settings: Mapping[str, Any]) -> Template:
    kind = settings["kind"]
    if kind not in KINDS:
        raise ValueError(f"prompts: unknown kind {kind!r}; choose {' or '.join(KINDS)}")
    return KINDS[kind](lines, **{key: value for key, value in settings.items() if key != "kind"})


def _params(
    directory: Path, settings: Mapping[str, Any], config: UserLLMConfig, shapes: Params, where: Params, llm: str, dtype: Any
) -> Params:
    """Return the parameters in their shardings."""
    base = settings["llm"]
    source = directory if base is None else _base(Base(**base), llm)
    bare = decoder_config(source)
    sound = dataclasses.replace(config.decoder, cross=None, block=dataclasses.replace(config.decoder.block, lora=None))
    if (bare.vocab_size, bare.num_layers, bare.block.width) != (sound.vocab_size, sound.num_layers, sound.block.width):
        raise ValueError(f"The LLM at {source} has other sizes than {directory / FILE} says: {AGAIN}.")
    found = {"decoder": load_decoder(source, bare, shardings=where["decoder"])}
    side = formats.load_user_side(directory, shapes)
    if config.decoder.block.lora is not None:
        side = trees.combine(side, {"decoder": formats.load_adapter(directory, shapes["decoder"], config.decoder)})
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
    for name, digest in base.files.items():
        kind, _, file = name.partition("/")
        if kind == "checkpoint" and (not (found / file).is_file() or content_hashes([found / file])[0] != digest):
            raise ValueError(f"{found} is not the LLM that this model belongs on ({base.checkpoint}): {file} is another one.")
    return found


def card(settings: Mapping[str, Any]) -> str:
    """Return the model card."""
    facts = settings["facts"]
    base = facts.get("llm") or "a small LLM, trained from scratch on the catalogue"
    lines = [
        "---", "library_name: user_llm", f"license: {facts.get('license') or 'other'}", *([f"base_model: {facts['llm']}"] if facts.get("llm") else []), "---", "",
        f"# {facts.get('phase', 'user_llm')} on {facts['dataset']}", "",
        f"An LLM that answers for a user whose events it has encoded ([User-LLM](https://arxiv.org/abs/2402.13598)): {base}.", "",
        "```python", "import user_llm", "", 'model = user_llm.load("THIS DIRECTORY")', "user = model.encode(events)", "model.recommend(user, k=10)", "```", "",
        f"Trained on {facts['dataset']}: {facts['users']:,} users, {facts['events']:,} events in training, {facts['items']:,} items. "
        "Their parameters hold no user; what they have learned of all users together cannot be taken out again.", "",
        f"Events have the columns {', '.join(facts['columns'])}.", "",
        "| task | method | metric | value | 95% interval | n |", "|---|---|---|---|---|---|",
        *(f"| {row['task']} | {row['method']} | {row['metric']} | {row['value']:.4f} | {_interval(row)} | {row['n']:,} |" for row in facts["rows"]), "",
        f"Licence of the LLM: {facts.get('license') or 'see where it comes from'}. Identity: `{settings['identity']}`. Command: `{facts['command']}`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['interval'][0]:.4f} to {row['interval'][1]:.4f}" if row.get("interval") else ""
