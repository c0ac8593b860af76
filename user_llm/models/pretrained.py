"""Foreign weights to our tree: Hugging Face Llama checkpoints (config.json and safetensors).

One table says, for each of our parameters, the checkpoint's name, its shape there and its shape here. Nothing is
ignored: a setting or tensor that the decoder lacks is refused by name. Left out: other families, downloads.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16, which safetensors asks for
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from user_llm.common import trees
from user_llm.models.decoder import DecoderConfig
from user_llm.nn.transformer import BlockConfig

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# Settings of transformers' LlamaConfig that change nothing about the function a checkpoint computes.
NEUTRAL = frozenset({
    "_name_or_path", "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "is_llama_config", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type",
})  # fmt: skip


def decoder_config(path: str | os.PathLike, **overrides: Any) -> DecoderConfig:
    """Read a checkpoint's config.json; `overrides` replace fields of the DecoderConfig, such as `cross`.

    Raises:
      ValueError: no such file, another family, or a setting that the decoder does not implement.
    """
    file = Path(path) / "config.json"
    raw = _read_json(file)
    if raw.get("model_type") != "llama":
        raise ValueError(f"{file}: model_type {raw.get('model_type')!r} is not supported, only 'llama'.")

    def need(name: str) -> Any:
        if name not in raw:
            raise ValueError(f"{file}: the setting {name!r} is missing.")
        return raw.pop(name)

    width, heads = need("hidden_size"), need("num_attention_heads")
    kv_heads, head_dim, activation = raw.pop("num_key_value_heads", None), raw.pop("head_dim", None), need("hidden_act")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{file}: hidden_act {activation!r} is not supported, only {', '.join(ACTIVATIONS)}.")
    fields = {
        "vocab_size": need("vocab_size"),
        "num_layers": need("num_hidden_layers"),
        "block": BlockConfig(
            width=width,
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim or width // heads,
            mlp_width=need("intermediate_size"),
            rope_theta=_pop_rope_theta(raw, file),
            activation=ACTIVATIONS[activation],
            norm_eps=need("rms_norm_eps"),
        ),
        "tie_embeddings": raw.pop("tie_word_embeddings", False),
    }
    # What is left and switched on would change the function, and is not implemented.
    for name, value in raw.items():
        if name not in NEUTRAL and value not in (None, False, 0, {}, []):
            raise ValueError(f"{file}: the setting {name!r} = {value!r} is not supported.")
    return DecoderConfig(**{**fields, **overrides})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"No checkpoint at {file.parent}: {file.name} cannot be read ({error.strerror}).") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}).") from error


def _pop_rope_theta(raw: dict[str, Any], file: Path) -> float:
    """Take rope_theta, which transformers 5 writes inside `rope_parameters`; refuse any scaling."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        settings = dict(raw.pop(name, None) or {})
        kind = settings.pop("rope_type", settings.pop("type", "default"))
        if kind != "default":
            raise ValueError(f"{file}: the setting {name!r} of type {kind!r} is not supported, only 'default'.")
        rope |= settings
    theta = raw.pop("rope_theta", None)
    theta = rope.pop("rope_theta", theta)
    if rope:
        raise ValueError(f"{file}: the setting {next(iter(rope))!r} of rotary positions is not supported.")
    return 10_000.0 if theta is None else float(theta)  # the default of transformers' LlamaConfig


class Source(NamedTuple):
    """Where one parameter comes from; a matrix is stored [out, in] there, and transposed it reshapes to `ours`."""

    name: str
    theirs: tuple[int, ...]
    ours: tuple[int, ...]
    transposed: bool = False


def llama_table(c: DecoderConfig) -> tuple[dict[str, Source], dict[str, Source]]:
    """Return the sources of the parameters outside the layers and of those of layer `{}`, by our path."""
    b, vocab = c.block, c.vocab_size
    width, heads, kv_heads, dim, mlp = b.width, b.heads, b.kv_heads, b.head_dim, b.mlp_width

    def matrix(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Source:
        return Source(name, (int(np.prod(outputs)), int(np.prod(inputs))), (*inputs, *outputs), transposed=True)

    whole = {
        "embed": Source("model.embed_tokens.weight", (vocab, width), (vocab, width)),
        "norm/scale": Source("model.norm.weight", (width,), (width,)),
    }
    if not c.tie_embeddings:
        whole["head"] = matrix("lm_head.weight", (width,), (vocab,))
    layer = {
        "attn_norm/scale": Source("model.layers.{}.input_layernorm.weight", (width,), (width,)),
        "attn/q": matrix("model.layers.{}.self_attn.q_proj.weight", (width,), (heads, dim)),
        "attn/k": matrix("model.layers.{}.self_attn.k_proj.weight", (width,), (kv_heads, dim)),
        "attn/v": matrix("model.layers.{}.self_attn.v_proj.weight", (width,), (kv_heads, dim)),
        "attn/o": matrix("model.layers.{}.self_attn.o_proj.weight", (heads, dim), (width,)),
        "mlp_norm/scale": Source("model.layers.{}.post_attention_layernorm.weight", (width,), (width,)),
        "mlp/gate_proj": matrix("model.layers.{}.mlp.gate_proj.weight", (width,), (mlp,)),
        "mlp/up": matrix("model.layers.{}.mlp.up_proj.weight", (width,), (mlp,)),
        "mlp/down": matrix("model.layers.{}.mlp.down_proj.weight", (mlp,), (width,)),
    }
    return whole, layer


def load_decoder(path: str | os.PathLike, config: DecoderConfig, *, dtype: DTypeLike = np.float32) -> dict[str, Any]:
    """Load the weights as the parameters of a `Decoder`, cross-attention left out (a checkpoint has none).

    Raises:
      ValueError: unreadable files, or tensors that are missing, left over or of another shape, all of them named.
    """
    whole, layer = llama_table(config)
    depth = config.num_layers
    # name in the checkpoint -> (its source, our path, the layer or all)
    wanted: dict[str, tuple[Source, str, Any]] = {source.name: (source, path, ...) for path, source in whole.items()}
    for i in range(depth):
        wanted |= {s.name.format(i): (s, f"stack/blocks/{ours}", i) for ours, s in layer.items()}
    params = {ours: np.empty(source.ours, dtype) for ours, source in whole.items()}
    params |= {f"stack/blocks/{ours}": np.empty((depth, *source.ours), dtype) for ours, source in layer.items()}

    files = _tensor_files(Path(path))
    _check_tensors(Path(path), {name: source.theirs for name, (source, *_) in wanted.items()}, files)
    by_file = defaultdict(list)
    for name in wanted:
        by_file[files[name][0]].append(name)
    for file, names in by_file.items():
        with safe_open(file, "np") as tensors:
            for name in names:
                source, ours, at = wanted[name]
                tensor = tensors.get_tensor(name)
                params[ours][at] = (tensor.T if source.transposed else tensor).reshape(source.ours)
    return trees.unflatten(params)


def _tensor_files(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Return the file and shape of every tensor; several files must be those that the index names."""
    index = path / "model.safetensors.index.json"
    names = set(_read_json(index)["weight_map"].values()) if index.exists() else ["model.safetensors"]
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in (path / name for name in sorted(names)):
        if not file.exists():
            raise ValueError(f"No weights at {file}: a checkpoint in safetensors format is needed.")
        try:
            with safe_open(file, "np") as tensors:
                found |= {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}): download it again.") from error
    # Older checkpoints store the rotary frequencies, which follow from rope_theta.
    return {name: where for name, where in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_tensors(path: Path, wanted: dict[str, tuple[int, ...]], files: dict[str, tuple[Path, tuple[int, ...]]]) -> None:
    problems = [f"missing {name}" for name in wanted if name not in files]
    problems += [f"left over {name}" for name in files if name not in wanted]
    problems += [
        f"{name} is {list(files[name][1])} and not {list(shape)}"
        for name, shape in wanted.items()
        if name in files and files[name][1] != shape
    ]
    if problems:
        raise ValueError(f"The weights at {path} do not fit the config: {'; '.join(problems)}.")
