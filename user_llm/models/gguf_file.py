"""GGUF files, llama.cpp's layout of a model, turned into a checkpoint in Hugging Face layout.

A quantised tensor becomes the bfloat16 numbers that it stands for, one tensor after the other, and other tensors stay what they are.
The tokenizer is made from the words, merges and special tokens that the file holds. Left out: families whose tokenizer is
SentencePiece's (Llama 2, Gemma), and scaled rotary positions. Needs the package `gguf`.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from user_llm.common.files import check_regular, make_once
from user_llm.common.records import read_json
from user_llm.models.families import FAMILIES

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SHARD_BYTES = 1_000_000_000  # of one file that is written; so much is held in memory
# From a GGUF file's name of a tensor to the checkpoint's.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# The settings of a checkpoint, and the keys of a file after its architecture.
SETTINGS = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length", "sliding_window": "attention.sliding_window",
}  # fmt: skip
REMEDY = "bring the model in Hugging Face layout instead"
CONTROL, USER_DEFINED = 3, 4  # kinds of words
# How a text is cut into pieces before words are merged within them. The key is the file's `tokenizer.ggml.pre`; ByteLevel cuts as
# GPT-2 did.
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(_CUT % "{1,3}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(_CUT % ""), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}  # fmt: skip


def unpacked(file: Path) -> Path:
    """Return the checkpoint that a GGUF file holds: a folder beside the file, which the first call writes.

    Raises:
      OSError: the folder cannot be written.
      ValueError: no GGUF file, a model or a tokenizer that is not read, or a file that has changed since the folder was written.
    """
    check_regular(file)
    folder = file.with_name(f"{file.name}.checkpoint")
    stamp = {"bytes": file.stat().st_size, "modified_ns": file.stat().st_mtime_ns}
    try:
        make_once(folder, lambda path: _write(file, path, stamp))
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror or error}): copy {file.name} to where files can be written."
        ) from error
    if read_json(folder / "source.json", {}) != stamp:
        raise ValueError(f"{folder} was made from another {file.name}: delete the folder.")
    return folder


def _write(file: Path, folder: Path, stamp: dict[str, int]) -> None:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{file} needs the package gguf: pip install gguf.") from error
    try:
        reader = gguf.GGUFReader(file)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # whatever the library meets
        raise ValueError(f"{file} is truncated or no GGUF file ({error}): get it again.") from error
    with _reading(file):
        settings = _settings(facts, file)
        tokenizer, roles = _tokenizer(facts, file)
        stops = _stops(facts)
        settings["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in reader.tensors)
        settings |= {f"{role}_id": facts[key] for role, key in _roles(facts).items()}
    folder.mkdir(parents=True)
    _write_tensors(folder, _tensors(gguf, reader, settings, file))
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}, indent=1))
    if stops:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    (folder / "source.json").write_text(json.dumps(stamp))


class NotRead(ValueError):
    """A model or a tokenizer of a kind that is not read from GGUF."""


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Say of which file it is what numpy, tokenizers or gguf find wrong."""
    try:
        yield
    except NotRead:
        raise
    except Exception as error:  # whatever they meet
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} lacks what a model needs, or holds it in another form ({what}): {REMEDY}.") from error


def _settings(facts: dict[str, Any], file: Path) -> dict[str, Any]:
    kind = facts.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise NotRead(f"{file}: the architecture {kind!r} is not read from GGUF, only {', '.join(ARCHITECTURES)}: {REMEDY}.")
    if facts.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise NotRead(f"{file}: scaled rotary positions are not read from GGUF: {REMEDY}.")
    settings = {name: facts[f"{kind}.{key}"] for name, key in SETTINGS.items() if f"{kind}.{key}" in facts}
    # float32 there, and so 0.00001 would be 0.0000099999997.
    settings = {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in settings.items()}
    rotary, width = facts.get(f"{kind}.rope.dimension_count"), settings.get("head_dim")
    width = width or settings.get("hidden_size", 0) // settings.get("num_attention_heads", 1)
    if rotary not in (None, width):
        raise NotRead(f"{file}: rotary positions of {rotary} of a head's {width} numbers are not supported.")
    return {
        "model_type": kind, "architectures": [FAMILIES[kind].architecture], "hidden_act": "silu", "torch_dtype": "bfloat16",
        "vocab_size": len(facts.get("tokenizer.ggml.tokens", ())), **settings,
    }  # fmt: skip


def _tensors(gguf: Any, reader: Any, settings: dict[str, Any], file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors by their names in a checkpoint."""
    with _reading(file):
        heads = {
            "attn_q": settings["num_attention_heads"],
            "attn_k": settings.get("num_key_value_heads", settings["num_attention_heads"]),
        }
        for tensor in reader.tensors:
            *of_layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{of_layer[1]}.{LAYER[part]}" if len(of_layer) == 2 and part in LAYER else OUTER.get(part)
            if name is None:
                raise NotRead(f"{file}: the tensor {tensor.name} is not known: {REMEDY}.")
            whole = tensor.tensor_type.name in ("F32", "F16")
            array = tensor.data if whole else gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(ml_dtypes.bfloat16)
            if part in heads and settings["model_type"] == "llama":
                # A rotary pair lies side by side there, and half a head apart in a checkpoint.
                array = array.reshape(heads[part], -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            yield f"{name}.{kind}", np.ascontiguousarray(array)


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, array in tensors:
        shard[name] = array
        if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))


def _roles(facts: dict[str, Any]) -> dict[str, str]:
    """Return the keys of a file that hold ids of special tokens, by their roles in a checkpoint."""
    names = {"eos_token": "eos", "pad_token": "padding"}
    if facts.get("tokenizer.ggml.pre") != "qwen2":  # llama.cpp names one for these, whose tokenizer has none
        names["bos_token"] = "bos"
    keys = {role: f"tokenizer.ggml.{name}_token_id" for role, name in names.items()}
    return {role: key for role, key in keys.items() if key in facts}


def _stops(facts: dict[str, Any]) -> list[int]:
    """Return the ids of the tokens that end a text: of a document, of a turn, of a message, and of a document by its usual name."""
    ids = [facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    kinds = zip(facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"], strict=True)
    ids += [number for number, kind in enumerate(kinds) if kind == ("<|endoftext|>", CONTROL)]
    return list(dict.fromkeys(number for number in ids if number is not None))


def _tokenizer(facts: dict[str, Any], file: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Return the tokenizer, and what its tokenizer_config.json says: the special tokens and the chat template."""
    kind, cut = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in CUTS:
        cuts = f"cuts texts like {cut!r}" if cut else "does not say how it cuts texts"
        raise NotRead(
            f"{file}: a tokenizer of kind {kind!r} that {cuts} is not read from GGUF, only 'gpt2' with "
            f"{', '.join(CUTS)}: {REMEDY}."
        )
    words, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe"))
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(CUTS[cut])
    backend.decoder = decoders.ByteLevel()
    for special, number in ((True, CONTROL), (False, USER_DEFINED)):
        added = [
            AddedToken(word, special=special, normalized=False) for word, of in zip(words, kinds, strict=True) if of == number
        ]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    said = {role: words[facts[key]] for role, key in _roles(facts).items()}
    if "tokenizer.chat_template" in facts:
        said["chat_template"] = facts["tokenizer.chat_template"]
    return backend, said
