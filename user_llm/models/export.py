"""Our trees to open layouts: the LLM as a Hugging Face checkpoint or a PEFT adapter, the user's side as safetensors.

    DIR/config.json, model*.safetensors            the LLM, its adapters merged: `transformers` loads it
    DIR/adapter_config.json, adapter_model...      or the adapters alone, in the layout of the peft library
    DIR/user_llm.safetensors                       what no other library knows: encoder, resampler, ways into the LLM, item head

Tensors are written in the types they have here. Left out: other layouts, quantised weights.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from user_llm.common import trees
from user_llm.common.trees import Params
from user_llm.models.decoder import DecoderConfig
from user_llm.models.families import settings_from_config, table
from user_llm.models.user_llm import UserLLMConfig
from user_llm.nn.lora import merge_lora

SHARD_BYTES = 5_000_000_000  # of one file, as Hugging Face splits them
USER_FILE = "user_llm.safetensors"


def is_bare_llm(path: str) -> bool:
    """Tell whether a parameter of a `UserLLM` is one of the LLM as other libraries know it, adapters excepted."""
    return path.startswith("decoder/") and "/cross/" not in path and "/lora/" not in path


def without_adapters(config: UserLLMConfig) -> UserLLMConfig:
    """Return the config of the model that a merged one is."""
    block = dataclasses.replace(config.decoder.block, lora=None)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, block=block))


def save_decoder(directory: Path, params: Params, config: DecoderConfig) -> None:
    """Write a decoder as a Hugging Face checkpoint, adapters merged.

    Raises:
      ValueError: a decoder that no open family describes.
    """
    settings = settings_from_config(config)
    if config.block.lora is not None:
        params = merge_lora(params, config.block.lora)
    flat = trees.flatten(params)
    names: dict[str, str] = {}
    shards: list[dict[str, np.ndarray]] = [{}]
    for t in table(config):
        array = jax.device_get(flat[t.path] if t.layer is None else flat[t.path][t.layer])
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > SHARD_BYTES:
            shards.append({})
        name = t.name if t.name == "lm_head.weight" else f"model.{t.name}"
        shards[-1][name] = t.write(array)
    directory.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(a.nbytes for shard in shards for a in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(settings, indent=1))


def save_adapter(directory: Path, params: Params, config: DecoderConfig, base_model: str) -> None:
    """Write a decoder's adapters in the layout of the peft library; `base_model` is the checkpoint that they adapt.

    Raises:
      ValueError: a decoder without adapters.
    """
    lora = config.block.lora
    if lora is None:
        raise ValueError("This decoder has no adapters: it was not trained by the strategy lora.")
    flat = trees.flatten(params)
    tensors, modules = {}, set()
    for t in table(config):
        module, _, weight = t.path.rpartition("/")
        a, b = (flat.get(f"{module}/lora/{weight}/{part}") for part in "ab")
        if a is None or b is None or t.layer is None:
            continue
        name = f"base_model.model.model.{t.name.removesuffix('.weight')}"
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(np.asarray(a[t.layer]).reshape(-1, lora.rank).T)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(np.asarray(b[t.layer]).reshape(lora.rank, -1).T)
        modules.add(t.name.split(".")[-2])
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": sorted(modules), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1))


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
      ValueError: no such file, or one for a model with other parameters, all of them named.
    """
    file = directory / USER_FILE
    if not file.exists():
        raise ValueError(f"No {USER_FILE} in {directory}: export a contextualized LLM there first.")
    found = load_file(file)
    wanted = {path: leaf.shape for path, leaf in trees.flatten(like).items() if not is_bare_llm(path) and "/lora/" not in path}
    problems = [f"missing {path}" for path in wanted if path not in found]
    problems += [f"left over {path}" for path in found if path not in wanted]
    problems += [
        f"{p} is {list(found[p].shape)} and not {list(s)}" for p, s in wanted.items() if p in found and found[p].shape != s
    ]
    if problems:
        raise ValueError(f"{file} does not fit the model: {'; '.join(problems)}.")
    return trees.unflatten(found)
