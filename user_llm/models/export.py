"""Our trees to open layouts: the LLM as a Hugging Face checkpoint or a PEFT adapter, the user's side as safetensors.

    DIR/config.json, model*.safetensors            the LLM, its adapters merged: `transformers` loads it
    DIR/adapter_config.json, adapter_model...      or the adapters alone, in the layout of the peft library
    DIR/user_llm.safetensors                       what no other library knows: encoder, resampler, ways into the LLM, item head
    DIR/transitions.safetensors                    the steps from item to item that are counted in training

Tensors are written in the types they have here, and quantised weights as plain numbers. Left out: other layouts.
"""

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
import scipy.sparse as sparse
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from user_llm.common import trees
from user_llm.common.files import check_own, check_regular
from user_llm.common.records import read_json
from user_llm.common.trees import Params
from user_llm.data.timelines import Catalogue
from user_llm.models.config_json import bare, config_from_settings, language_model, settings_from_config
from user_llm.models.decoder import DecoderConfig
from user_llm.models.families import FAMILIES, Family, Tensor, family_of, table
from user_llm.models.pretrained import TOKENIZER_PATTERNS, misfits
from user_llm.models.transitions import Transitions, shares
from user_llm.models.user_llm import UserLLMConfig
from user_llm.nn.lora import merge_lora
from user_llm.nn.stored import restored

SHARD_BYTES = 5_000_000_000  # of one file, as Hugging Face splits them
USER_FILE = "user_llm.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
TRANSITIONS_FILE = "transitions.safetensors"
ADAPTED = r"^base_model\.model\.model\.(language_model\.)?"  # what the names of an adapter's tensors begin with
# Settings of a checkpoint that a decoder of other sizes keeps.
KEPT_FOR_ANY = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "transformers_version")
# Settings of the checkpoint's weights, which the written weights do not share.
OF_WEIGHTS = ("quantization_config", "dtype", "torch_dtype")


def is_bare_llm(path: str) -> bool:
    """Tell whether a parameter of a `UserLLM` is one of the LLM as other libraries know it, adapters excepted."""
    return path.startswith("decoder/") and "/cross/" not in path and "/lora/" not in path


def without_adapters(config: UserLLMConfig) -> UserLLMConfig:
    """Return the config of the model that a merged one is, all weights plain numbers."""
    block = dataclasses.replace(config.decoder.block, lora=None, quantize="")
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, block=block))


def save_decoder(
    directory: Path,
    params: Params,
    config: DecoderConfig,
    *,
    like: Path | None = None,
    families: Mapping[str, Family] = FAMILIES,
) -> None:
    """Write a decoder as a Hugging Face checkpoint, adapters merged; of quantised weights the numbers that their codes stand for.

    Args:
      like: a checkpoint of the same decoder, whose settings are kept: stop ids, context length, and the type of its weights where
        all of them can be written in it without loss.

    Raises:
      ValueError: a decoder that no open family describes.
    """
    settings, dtype = _settings_like(like, config, families)
    family = family_of(settings, "", families)
    if config.block.quantize:
        params = restored(params, config.block.quantize, params["norm"]["scale"].dtype)
    if config.block.lora is not None:
        params = merge_lora(params, config.block.lora)
    flat = trees.flatten(params)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, parts in itertools.groupby(table(config, family), lambda t: t.name):
            written = [t.write(jax.device_get(flat[t.path][t.at])) for t in parts]
            yield name, written[0] if len(written) == 1 else np.concatenate(written)

    if dtype is not None and not all(np.array_equal(array.astype(dtype).astype(array.dtype), array) for _, array in tensors()):
        dtype = None
    names: dict[str, str] = {}
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors():
        array = array if dtype is None else array.astype(dtype)
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name if name == family.name("head") else f"model.{name}"] = array
    types = {str(array.dtype) for shard in shards for array in shard.values()}
    written = types.pop() if len(types) == 1 else "float32"  # which holds the numbers of every type
    directory.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    # Even one file has an index: without it vLLM takes every other safetensors file beside it for one of the LLM's.
    total = sum(a.nbytes for shard in shards for a in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(settings | {"dtype": written}, indent=1))


def _settings_like(
    like: Path | None, config: DecoderConfig, families: Mapping[str, Family]
) -> tuple[dict[str, Any], np.dtype | None]:
    """Return what the config.json of a decoder says, with the settings of a checkpoint that is like it, and the type of its weights."""
    if like is None:
        return settings_from_config(config), None
    file = like / "config.json"
    whole = read_json(file, {}, "get the checkpoint again")
    theirs = language_model(whole, str(file))
    dtype = theirs.get("torch_dtype") or theirs.get("dtype")
    kept = {key: value for key, value in theirs.items() if key not in OF_WEIGHTS}
    if whole.get("model_type") != kept.get("model_type"):  # the class that is named reads the wrapper
        kept["architectures"] = [family_of(kept, str(file), families).architecture]
    try:
        same = config_from_settings(kept, str(file), families) == bare(config)
    except ValueError:  # settings of a decoder that is not read here
        same = False
    settings = kept if same else {key: kept[key] for key in KEPT_FOR_ANY if key in kept} | settings_from_config(config)
    return settings, np.dtype(dtype) if dtype in ("bfloat16", "float16") else None


def save_adapter(
    directory: Path,
    params: Params,
    config: DecoderConfig,
    base_model: str,
    family: Family | None = None,
    modules_of_llm: str = "model.",
) -> None:
    """Write a decoder's adapters in the layout of the peft library; `base_model` is the checkpoint that they adapt.

    Args:
      modules_of_llm: what the names of the decoder's modules begin with where transformers has loaded `base_model`.

    Raises:
      ValueError: a decoder without adapters.
    """
    lora = config.block.lora
    if lora is None:
        raise ValueError("This decoder has no adapters: it was not trained by the strategy lora.")
    flat = trees.flatten(params)
    tensors, ranks = {}, {}
    for stored, parts in itertools.groupby(table(config, family), lambda t: t.name):
        shared = [(t, *pair) for t in parts if (pair := _adapters(flat, t)) is not None]
        if not shared:
            continue
        name = f"base_model.model.{modules_of_llm}{stored.removesuffix('.weight')}"
        # Weights that share a tensor share an adapter of as many times the rank: each reads and writes its own part of it.
        below = np.zeros((shared[0][0].theirs[0], len(shared) * lora.rank), shared[0][2].dtype)
        for number, (t, _, b) in enumerate(shared):
            below[t.first : t.first + t.part[0], number * lora.rank : (number + 1) * lora.rank] = b.T
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(np.concatenate([a.T for _, a, _ in shared]))
        tensors[f"{name}.lora_B.weight"] = below
        ranks[stored.split(".")[-2]] = len(shared) * lora.rank
    # By their last names peft would find the modules of a wrapper's image side, too.
    last = "|".join(sorted(ranks))
    targets = sorted(ranks) if modules_of_llm == "model." else rf"{re.escape(modules_of_llm)}.*\.({last})"
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": targets, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    if larger := {module: rank for module, rank in ranks.items() if rank != lora.rank}:
        settings["rank_pattern"] = larger
        settings["alpha_pattern"] = {module: lora.alpha * rank / lora.rank for module, rank in larger.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def _adapters(flat: Mapping[str, Any], t: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the two matrices of a weight's adapter, [inputs, rank] and [rank, outputs]; None for a weight without one."""
    module, _, weight = t.path.rpartition("/")
    a, b = (flat.get(f"{module}/lora/{weight}/{part}") for part in "ab")
    if a is None or b is None:
        return None
    a, b = np.asarray(a[t.at]), np.asarray(b[t.at])
    return a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)


def load_adapter(directory: Path, like: Params, config: DecoderConfig, family: Family | None = None) -> Params:
    """Read what `save_adapter` wrote, as the adapters of a decoder whose parameters have the shapes of `like`.

    Raises:
      ValueError: no such file, or adapters that are missing, left over or of another shape.
    """
    file = directory / ADAPTER_FILE
    check_regular(file)
    with _named(file):
        found = {re.sub(ADAPTED, "", name): tensor for name, tensor in load_file(file).items()}
    flat = trees.flatten(like)
    out: dict[str, list[np.ndarray]] = {path: [] for path in flat if "/lora/" in path}
    for stored, parts in itertools.groupby(table(config, family), lambda t: t.name):
        shared = [(t, f"{module}/lora/{weight}") for t in parts for module, _, weight in [t.path.rpartition("/")]]
        if not (shared := [(t, path) for t, path in shared if f"{path}/a" in out]):
            continue
        module, nothing, (first, path) = stored.removesuffix(".weight"), np.zeros(0), shared[0]
        above, below = (found.pop(f"{module}.lora_{x}.weight", nothing) for x in "AB")
        rank = flat[f"{path}/a"].shape[-1]
        if (above.shape, below.shape) != ((len(shared) * rank, first.theirs[1]), (first.theirs[0], len(shared) * rank)):
            raise ValueError(f"{file} does not fit the model: {path} of layer {first.at[0]} is missing or of another shape.")
        for number, (t, path) in enumerate(shared):
            own = slice(number * rank, (number + 1) * rank)
            out[f"{path}/a"].append(above[own].T.reshape(flat[f"{path}/a"].shape[1:]))
            out[f"{path}/b"].append(below[t.first : t.first + t.part[0], own].T.reshape(flat[f"{path}/b"].shape[1:]))
    if found or any(len(layers) != len(flat[path]) for path, layers in out.items()):
        raise ValueError(f"{file} does not fit the model: it has other adapters.")
    return trees.unflatten({path: np.stack(layers) for path, layers in out.items()})


def save_user_side(directory: Path, params: Params) -> None:
    """Write all parameters of a `UserLLM` that are not the LLM's own: what personalises any copy of that LLM."""
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items() if not is_bare_llm(path)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {path: np.ascontiguousarray(array) for path, array in flat.items() if "/lora/" not in path}, directory / USER_FILE
    )


def load_user_side(directory: Path, like: Params) -> Params:
    """Read what `save_user_side` wrote, for a model whose parameters have the shapes of `like`.

    Raises:
      ValueError: no such file, or one for a model with other parameters.
    """
    file = directory / USER_FILE
    if not file.exists():
        raise ValueError(f"No {USER_FILE} in {directory}: name the directory of a model.")
    check_regular(file)
    with _named(file):
        found = load_file(file)
    wanted = {path: leaf.shape for path, leaf in trees.flatten(like).items() if not is_bare_llm(path) and "/lora/" not in path}
    if problems := misfits(wanted, {path: array.shape for path, array in found.items()}):
        raise ValueError(f"{file} does not fit the model: {problems}.")
    return trees.unflatten(found)


def save_transitions(directory: Path, transitions: Transitions) -> None:
    """Write the steps of transitions: `item` and `chance` of all steps, and `first`, the place of the first step from each item."""
    steps = transitions.chance
    arrays = {"first": steps.indptr.astype(np.int64), "item": steps.indices.astype(np.int32), "chance": steps.data}
    save_file(arrays, directory / TRANSITIONS_FILE)


def load_transitions(directory: Path, catalogue: Catalogue, counts: Int[np.ndarray, " I"], weight: float) -> Transitions:
    """Read what `save_transitions` wrote.

    Args:
      catalogue: the items; those behind the first I were added after the training.
      counts: the number of training events of each of the I items; index 0 is PAD.
      weight: an attribute of the `Transitions`.

    Raises:
      ValueError: no such file, or one that holds no steps between these items.
    """
    file = directory / TRANSITIONS_FILE
    if not file.exists():
        raise ValueError(f"{file} is missing: get the model again.")
    check_regular(file)
    with _named(file):
        found = load_file(file)
    first, item, chance = (found.get(name, np.zeros(0)) for name in ("first", "item", "chance"))
    fits = (
        (first.dtype, item.dtype, chance.dtype) == (np.int64, np.int32, np.float32)
        and first.shape == (len(counts) + 1,)
        and item.shape == chance.shape == (first[-1],)
        and first[0] == 0
        and bool((np.diff(first) >= 0).all() and (item > 0).all() and (item < len(counts)).all() and (chance > 0).all())
    )
    steps = sparse.csr_array((chance, item, first), shape=(len(counts),) * 2) if fits else None
    if steps is None or steps.sum(axis=1).max(initial=0) > 1:
        raise ValueError(f"{file} does not fit the model: it holds no steps between its {len(counts) - 1} items.")
    return Transitions.of(steps, shares(counts), catalogue, weight)


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Say of which file it is what the safetensors library finds wrong."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): get the model again.") from error


def tokenizer_files(source: Path) -> list[Path]:
    """Return the files of a tokenizer beside a checkpoint.

    Raises:
      ValueError: a file that is none of the checkpoint's own.
    """
    files = {file for pattern in TOKENIZER_PATTERNS for file in source.glob(pattern) if not file.is_dir()}
    for file in files:
        check_own(file, source)
    return sorted(files)
