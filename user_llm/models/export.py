"""Our trees to open layouts: the LLM as a Hugging Face checkpoint or a PEFT adapter, the user's side as safetensors.

    DIR/config.json, model*.safetensors            the LLM, its adapters merged: `transformers` loads it
    DIR/adapter_config.json, adapter_model...      or the adapters alone, in the layout of the peft library
    DIR/user_llm.safetensors                       what no other library knows: encoder, resampler, cross-attention, item head

Tensors are written in the types they have here. Left out: other layouts, quantised weights.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from user_llm.common import trees
from user_llm.common.trees import Params
from user_llm.models.decoder import DecoderConfig
from user_llm.models.families import settings_from_config, table
from user_llm.nn.lora import LoRAConfig, merge_lora

SHARD_BYTES = 5_000_000_000  # of one file, as Hugging Face splits them
USER_FILE = "user_llm.safetensors"


def is_bare_llm(path: str) -> bool:
    """Tell whether a parameter of a `UserLLM` is one of the LLM as other libraries know it, adapters excepted."""
    return path.startswith("decoder/") and "/cross/" not in path and "/lora/" not in path


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
