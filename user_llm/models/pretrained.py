"""Open checkpoints in Hugging Face layout: from a directory or the hub, tensor by tensor straight into their shardings.

Nothing is ignored: a tensor that is missing, left over or of another shape is named, the image side of a Gemma 3 checkpoint
excepted. A tensor is found whatever stands before its name. What settings mean is in `models/config_json.py`, and what names of
tensors mean in `models/families.py`.
"""

import functools
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - teaches numpy bfloat16, which safetensors asks for
import numpy as np
from flax import nnx
from huggingface_hub import errors as hub_errors
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.files import check_regular
from user_llm.common.hashes import content_hashes
from user_llm.common.records import read_json
from user_llm.common.trees import Params
from user_llm.common.workdir import path_part
from user_llm.models import gguf_file
from user_llm.models.config_json import DEQUANTISED, ORIGINAL, config_from_settings
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.families import FAMILIES, Family, Tensor, family_of, modules_of, table
from user_llm.nn.stored import blocks_axis, quantize

# What a Gemma 3 checkpoint with images holds besides its language model.
IMAGE_SIDE = ("vision_tower.", "multi_modal_projector.")
# Rotary frequencies and their cosines, which older checkpoints store; they follow from rope_theta.
ROTARY = re.compile(r"(^|\.)rotary_emb(_local)?\.(inv_freq|cos_cached|sin_cached)$")
# Parts of names that training tools add: torch.compile, FSDP, checkpointing and DDP.
TRAINING = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(?:module\.)+")
FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 6  # faults that a sentence names; more are counted
AGAIN = "get the checkpoint again"
# What names of tensors end with that only checkpoints of another kind hold, and what to bring in their place.
OTHER_KINDS = {
    r"qweight|qzeros|g_idx": f"quantised weights (GPTQ or AWQ): {ORIGINAL}",
    r"absmax|quant_map|quant_state\..*|SCB": f"quantised weights (bitsandbytes): {DEQUANTISED}",
    r"weight_scale|weight_scale_inv|weight_packed|input_scale|.*_blocks|.*_scales": f"quantised weights: {DEQUANTISED}",
    r"lora_[AB]\.(.*\.)?weight": "adapters that are not merged into the weights: call peft's `merge_and_unload()` and save the model",
}
# Globs that match the files of a tokenizer, and those of a checkpoint.
TOKENIZER_PATTERNS = ("*token*", "*.jinja", "vocab*", "merges.txt", "*.model", "*.tiktoken", "generation_config.json")
PATTERNS = ("*.json", "*.safetensors", "*.txt", *TOKENIZER_PATTERNS)
TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json", "generation_config.json")


def is_hub_name(name: str) -> bool:
    """Return whether a text can be the name of a model on the hub, ORGANISATION/NAME."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name) is not None


def find_checkpoint(name: str | os.PathLike, patterns: Sequence[str] = PATTERNS) -> Path:
    """Return the directory of a checkpoint: `name` itself, what a GGUF file holds, or a download of the hub's model of that name.

    The hub's own settings hold: HF_TOKEN for gated models, HF_HOME for where downloads are kept, HF_ENDPOINT for a mirror.

    Args:
      patterns: of the files that are downloaded.

    Raises:
      ValueError: neither a directory nor a model that the hub gives out here.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        return gguf_file.unpacked(path)
    if not is_hub_name(str(name)):
        raise ValueError(f"No checkpoint at {name}: a directory in Hugging Face layout or a model's name on the hub is needed.")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(patterns)))
    except hub_errors.GatedRepoError as error:
        raise ValueError(f"{name} is gated: accept its licence on the hub, and set HF_TOKEN to a token of yours.") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no model {name} on the hub, and no such directory; a private one needs HF_TOKEN."
        ) from error
    except (OSError, hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"Cannot download {name} ({reason}): download it elsewhere and name its directory.") from error


def checkpoint_hashes(directory: Path, folder: Path | None = None) -> dict[str, str]:
    """Return the content hashes of the files of an open LLM that are read, as `checkpoint/...` and `tokenizer/...`.

    Args:
      folder: as in `content_hashes`.
    """
    weights = [
        path for path in sorted(directory.iterdir()) if re.fullmatch(r"config\.json|.*\.safetensors(\.index\.json)?", path.name)
    ]
    hashes = content_hashes(weights, folder)
    return {f"checkpoint/{path.name}": digest for path, digest in zip(weights, hashes, strict=True)} | tokenizer_hashes(
        directory
    )


def tokenizer_hashes(directory: Path) -> dict[str, str]:
    """Return the content hashes of the files of a tokenizer, as `tokenizer/...`."""
    names = [name for name in TOKENIZER if (directory / name).exists()]
    if TOKENIZER[0] not in names:  # one that transformers reads, from whichever of its files
        patterns = r".*(token|vocab|merges|spiece).*|.*\.(model|tiktoken)|generation_config\.json"
        names = [path.name for path in sorted(directory.iterdir()) if re.fullmatch(patterns, path.name)]
    return dict(zip((f"tokenizer/{name}" for name in names), content_hashes([directory / name for name in names]), strict=True))


def decoder_config(path: str | os.PathLike, families: Mapping[str, Family] = FAMILIES, **overrides: Any) -> DecoderConfig:
    """Read a checkpoint's config.json; `overrides` replace fields of the DecoderConfig, such as `cross`.

    Raises:
      ValueError: no such file, another family, or a setting that the decoder does not implement.
    """
    file = Path(path) / "config.json"
    return config_from_settings(read_json(file, {}, AGAIN), str(file), families, **overrides)


def family_at(path: Path, families: Mapping[str, Family]) -> Family:
    """Return the family of a checkpoint.

    Raises:
      ValueError: as `decoder_config`.
    """
    return family_of(read_json(path / "config.json", {}, AGAIN), str(path / "config.json"), families)


def modules_at(path: Path) -> str:
    """Return what the names of a checkpoint's modules begin with in transformers, such as `model.`."""
    return modules_of(read_json(path / "config.json", {}, AGAIN))


def load_decoder(
    path: str | os.PathLike,
    config: DecoderConfig,
    *,
    like: Params | None = None,
    dtype: DTypeLike = jnp.float32,
    families: Mapping[str, Family] = FAMILIES,
) -> Params:
    """Load the weights as the parameters of a `Decoder`; what a checkpoint lacks (cross-attention, adapters) is left out.

    Tensors are read one by one, and quantised one by one where the config says so. Besides the parameters themselves, host memory
    holds two tensors at a time.

    Args:
      like: the shapes, types and shardings of the parameters; None for all of them on the first device, in `dtype`.
      dtype: of the parameters, whatever the checkpoint's.

    Raises:
      ValueError: unreadable files, or tensors that are missing, left over or of another shape, all of them named.
    """
    family = family_at(Path(path), families)
    tensors, files, names = _find_tensors(Path(path), config, family)
    wanted = trees.flatten(_on_first_device(config, jnp.dtype(dtype)) if like is None else like)
    params: dict[str, jax.Array] = {}
    for name, sharing in itertools.groupby(tensors, lambda named: named[0]):
        stored = _read_tensor(files[name])
        for _, t in sharing:
            for place, part in _parts(t.read(stored), t, wanted, config.block.quantize).items():
                if not t.at:
                    params[place] = part
                    continue
                if place not in params:
                    full = wanted[place]
                    empty = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=full.sharding)
                    params[place] = empty(full.shape, full.dtype)
                params[place] = _set_part(params[place], part, t.at)
    if config.tie_embeddings and names["head"] in files:
        _check_tied(files[names["head"]], files[names["embed"]])
    return trees.unflatten(params)


def _on_first_device(config: DecoderConfig, dtype: np.dtype) -> Params:
    """Return the shapes of a decoder's parameters, all on the first device, those that are no part of codes in `dtype`."""
    shapes = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))[1]
    device = SingleDeviceSharding(jax.devices()[0])
    return meshes.placed(trees.in_type(shapes, dtype), jax.tree.map(lambda _: device, shapes))


def _parts(value: np.ndarray, t: Tensor, wanted: Mapping[str, jax.ShapeDtypeStruct], kind: str) -> dict[str, jax.Array]:
    """Put a tensor, or one layer's part of it, in its sharding, and return it by its path; or its codes and scales by theirs.

    What is not wanted is left out.
    """
    there = [wanted.get(path) for path in (t.path, f"{t.path}/codes", f"{t.path}/scale")]
    plain, codes, scale = (leaf and _of_part(leaf, len(t.at)) for leaf in there)
    if plain is not None:
        return {t.path: _put(value, plain.sharding, plain.dtype)}
    if codes is None or scale is None:
        return {}
    in_codes = jax.jit(quantize, static_argnames=("kind", "axis"), out_shardings=(codes.sharding, scale.sharding))
    parts = in_codes(_put(value, codes.sharding, value.dtype), kind=kind, axis=blocks_axis(codes.shape, scale.shape))
    return {f"{t.path}/{part}": array for part, array in zip(("codes", "scale"), parts, strict=True)}


def in_stored_types(
    path: str | os.PathLike, shapes: Params, config: DecoderConfig, families: Mapping[str, Family] = FAMILIES
) -> Params:
    """Return the shapes of a decoder's parameters with each matrix in the type that the checkpoint holds it in, if that has 2 bytes.

    Norms and biases are left in theirs, and so is a matrix whose type differs from layer to layer. A directory without weights, which
    stands in for a checkpoint, changes nothing.

    Raises:
      ValueError: as `load_decoder`.
    """
    if not any(Path(path).glob("*.safetensors")):
        return shapes
    tensors, files, _ = _find_tensors(Path(path), config, family_at(Path(path), families))
    types: dict[str, set[str]] = {}
    for name, t in tensors:
        if len(t.theirs) > 1:
            types.setdefault(t.path, set()).add(files[name].dtype)
    halves = {"BF16": jnp.bfloat16, "F16": jnp.float16}
    narrow = {found: halves[of.pop()] for found, of in types.items() if len(of) == 1 and of <= halves.keys()}
    flat = trees.flatten(shapes)
    return trees.replace(
        shapes, {found: jax.ShapeDtypeStruct(flat[found].shape, dtype) for found, dtype in narrow.items() if found in flat}
    )


def check_weights(path: str | os.PathLike, families: Mapping[str, Family] = FAMILIES) -> None:
    """See that the weights of a checkpoint fit its config.json; no tensor is read.

    Raises:
      ValueError: as `decoder_config` and `load_decoder`.
    """
    _find_tensors(Path(path), decoder_config(path, families), family_at(Path(path), families))


class Stored(NamedTuple):
    """Where a tensor lies, its name there, its shape and its type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _find_tensors(
    path: Path, config: DecoderConfig, family: Family
) -> tuple[list[tuple[str, Tensor]], dict[str, Stored], dict[str, str]]:
    """Return the tensors that a checkpoint must have with their names, those that it has, and what it calls embeddings and output table.

    The names are the checkpoint's, without what a training put into them.
    """
    files = _tensor_files(path)
    names, in_layer = {}, re.compile(rf"(^|\.){re.escape(family.layer).replace(re.escape('{}'), '[0-9]+')}")
    for role, usual in (("embed", "model."), ("head", "")):
        last = family.name(role)
        found = [last] if last in files else [name for name in files if name.endswith(f".{last}") and not in_layer.search(name)]
        if len(found) > 1:
            raise ValueError(f"The weights at {path} do not fit the config: both {found[0]} and {found[1]} may be {last}.")
        names[role] = found[0] if found else usual + last
    prefix = names["embed"].removesuffix(family.name("embed"))
    tensors = [(names["head"] if t.path == "head" else prefix + t.name, t) for t in table(config, family)]
    wanted = {name: t.theirs for name, t in tensors}
    there = {name: stored.shape for name, stored in files.items() if name in wanted or name != names["head"]}
    if problems := misfits(wanted, there):
        raise ValueError(f"The weights at {path} do not fit the config: {problems}.")
    return tensors, files, names


def _put(value: np.ndarray, sharding: Sharding, dtype: DTypeLike) -> jax.Array:
    """Put a host array in its sharding, shard by shard, and convert it there."""
    array = jax.make_array_from_callback(value.shape, sharding, lambda index: np.ascontiguousarray(value[index]))
    return array.astype(dtype)


def _of_part(stacked: jax.ShapeDtypeStruct, axes: int) -> jax.ShapeDtypeStruct:
    """Return what one layer, or one expert of a layer, is of an array whose leading axes, so many, are whole."""
    where = stacked.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[axes:]))
    return jax.ShapeDtypeStruct(stacked.shape[axes:], stacked.dtype, sharding=where)


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(stacked: jax.Array, part: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    return stacked.at[at].set(part)


def _read_tensor(stored: Stored) -> np.ndarray:
    # Opened anew for each, or the pages already read would stay mapped.
    with safe_open(stored.file, "np") as tensors:
        tensor = tensors.get_tensor(stored.name)
    if not np.isfinite(tensor).all():
        raise ValueError(f"{stored.file}: {stored.name} holds NaN or an infinity; {AGAIN}.")
    return tensor


def _tensor_files(path: Path) -> dict[str, Stored]:
    """Return where each tensor is stored, by its name without what a training put into it.

    Several files must be those that the index names. Left out are tensors that no language model needs.
    """
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index, {"weight_map": {}}, AGAIN)["weight_map"]
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str):
                raise ValueError(f"{index}: weight_map {name!r} is no text; {AGAIN}.")
        names = [path_part(name, f"{index}: the file") for name in sorted(set(weight_map.values()))]
    found: dict[str, Stored] = {}
    for file in (path / name for name in names):
        if not file.exists():
            raise ValueError(f"No weights at {file}: a checkpoint in safetensors format is needed.")
        check_regular(file)
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    plain = TRAINING.sub("", name)
                    if ROTARY.search(plain) or any(part in plain for part in IMAGE_SIDE):
                        continue
                    if plain in found:
                        raise ValueError(f"{file}: {name} is the same tensor as {found[plain].name}; {AGAIN}.")
                    tensor = tensors.get_slice(name)
                    _check_kind(file, name, tensor.get_dtype())
                    found[plain] = Stored(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}): download it again.") from error
    return found


def _check_kind(file: Path, name: str, dtype: str) -> None:
    """Refuse a tensor that is no weight as it is computed with."""
    for ending, kind in OTHER_KINDS.items():
        if re.search(rf"(^|\.)({ending})$", name):
            raise ValueError(f"{file}: {name} belongs to {kind}.")
    if dtype not in FLOATS:
        raise ValueError(f"{file}: {name} is of type {dtype}, and only {', '.join(FLOATS)} are read: {ORIGINAL}.")


def misfits(wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> str:
    """Say which tensors are missing, left over or of another shape: the first ones, and how many more; nothing if all fit."""
    problems = [f"missing {name}" for name in wanted if name not in there]
    problems += [f"left over {name}" for name in there if name not in wanted]
    problems += [
        f"{name} is {list(there[name])} and not {list(shape)}"
        for name, shape in wanted.items()
        if name in there and there[name] != shape
    ]
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "; ".join(problems[:SHOWN] + more)


def _check_tied(head: Stored, embed: Stored) -> None:
    """Some checkpoints with tied embeddings store them twice: see that they are the same."""
    if not np.array_equal(_read_tensor(head), _read_tensor(embed)):
        raise ValueError(f"{head.file}: the embeddings are tied, but {head.name} differs from them.")
