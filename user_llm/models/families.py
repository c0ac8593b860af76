"""The open decoder families in Hugging Face's terms: Llama (and SmolLM2), Qwen2.5, Qwen3 and Gemma 3.

A family is what sets its checkpoints apart from Llama's: a few fields of our DecoderConfig, and names of tensors. The rest is read from
config.json alike for all, and a table says for each of our parameters the checkpoint's name, its shape there and its shape here. A
setting that the decoder lacks is refused by name.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from user_llm.common.records import misfit, positive_number, positive_whole_number, text, true_or_false
from user_llm.models.decoder import DecoderConfig
from user_llm.nn.attention import RopeScaling
from user_llm.nn.transformer import BlockConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of an open decoder family differ from Llama's.

    Attributes:
      architecture: the class of transformers that reads them, as config.json's `architectures` names it.
      qk_norm, qkv_bias, post_norms, norm_offset: of `BlockConfig`.
      scaled_embeddings: whether embeddings are multiplied by the square root of their width.
      activation: the key of config.json that names the activation.
      query_scale: the key of config.json whose value to the power of -1/2 scales queries; None for the head's size.
      names: what a checkpoint calls our parameters, where it is not as in LLAMA_NAMES.
      layer: what the names of a layer's tensors begin with; {} stands for the layer's number.
      defaults: settings for which config.json may say nothing; None where transformers knows the family and completes them.

    Raises:
      ValueError: `names` has what is no parameter of a decoder, or lacks one that has no name in LLAMA_NAMES.
    """

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    activation: str = "hidden_act"
    query_scale: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer: str = "layers.{}."
    defaults: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        known = {*LLAMA_NAMES, *POST_NORMS}
        if unknown := sorted(set(self.names) - known):
            raise ValueError(
                f"names has {unknown[0]!r}, which is no parameter of a decoder: choose {', '.join(sorted(known))}."
            )
        if missing := sorted(set(POST_NORMS) - set(self.names)) if self.post_norms else []:
            raise ValueError(f"names lacks {missing[0]!r}, which a family with post_norms has.")

    def name(self, path: str) -> str:
        """Return what a checkpoint calls a parameter; of a layer's, what follows `layer`."""
        return self.names.get(path) or LLAMA_NAMES[path]


# What a checkpoint calls our parameters, after what the names of its language model begin with.
LLAMA_NAMES = {
    "embed": "embed_tokens.weight",
    "norm/scale": "norm.weight",
    "head": "lm_head.weight",  # its name has no prefix such as `model.`
    "attn_norm/scale": "input_layernorm.weight",
    **{f"attn/{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn/{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"attn/{x}_norm/scale": f"self_attn.{x}_norm.weight" for x in "qk"},
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate_proj": "mlp.gate_proj.weight",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
}
POST_NORMS = ("attn_post_norm/scale", "mlp_post_norm/scale")
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", qk_norm=True, post_norms=True, norm_offset=1.0, scaled_embeddings=True,
        activation="hidden_activation", query_scale="query_pre_attn_scalar",
        names={
            "mlp_norm/scale": "pre_feedforward_layernorm.weight",
            "attn_post_norm/scale": "post_attention_layernorm.weight",
            "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
        },
    ),
}  # fmt: skip
MOST_LAYERS = 1000  # the deepest open models have some 130
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# What settings must be if they are there; these have a say in how much memory is taken.
SETTINGS = {
    "hidden_size": positive_whole_number, "intermediate_size": positive_whole_number, "num_hidden_layers": positive_whole_number,
    "vocab_size?": positive_whole_number, "num_attention_heads?": positive_whole_number,
    "num_key_value_heads?": positive_whole_number, "head_dim?": positive_whole_number, "sliding_window?": positive_whole_number,
    "rms_norm_eps?": positive_number, "query_pre_attn_scalar?": positive_number, "tie_word_embeddings?": true_or_false,
    "layer_types?": [text],
}  # fmt: skip
ROPE = {
    "rope_theta": positive_number, "rope_type?": text, "factor?": positive_number, "low_freq_factor?": positive_number,
    "high_freq_factor?": positive_number, "original_max_position_embeddings?": positive_whole_number,
}  # fmt: skip
# Of classifiers; transformers would make as many labels as a config asks for.
LABELS = frozenset({"id2label", "label2id", "num_labels", "problem_type"})

# Settings that change nothing about the function a checkpoint computes, or that transformers has turned into others here.
NEUTRAL = LABELS | frozenset({
    "_name_or_path", "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "is_llama_config", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "cache_implementation", "transformers.js_config",
    "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq",
})  # fmt: skip


def config_from_settings(
    settings: dict[str, Any], source: str, families: Mapping[str, Family] = FAMILIES, **overrides: Any
) -> DecoderConfig:
    """Turn what a config.json holds into a DecoderConfig; `source` is named in errors.

    Raises:
      ValueError: another family, or a setting that is missing or that the decoder does not implement.
    """
    if settings.get("model_type") == "gemma3":  # with images; its language model's settings are a part
        settings = {"model_type": "gemma3_text", **settings.get("text_config", {})}
    family = family_of(settings, source, families)
    present = {name: value for name, value in settings.items() if value is not None and name not in LABELS}
    if wrong := misfit(present, SETTINGS):
        raise ValueError(f"{source}: {wrong}; get the checkpoint again.")
    if present["num_hidden_layers"] > MOST_LAYERS:
        raise ValueError(f"{source}: the setting 'num_hidden_layers' = {present['num_hidden_layers']} is above {MOST_LAYERS}.")
    raw = _with_defaults(present, source, family)
    activation = raw.pop(family.activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{source}: the activation {activation!r} is not supported, only {', '.join(ACTIVATIONS)}.")
    width, heads, depth = raw.pop("hidden_size"), raw.pop("num_attention_heads"), raw.pop("num_hidden_layers")
    kv_heads = raw.pop("num_key_value_heads", None) or heads
    head_dim = raw.pop("head_dim", None) or width // heads
    if heads % kv_heads or head_dim % 2 or not head_dim:
        raise ValueError(
            f"{source}: {heads} heads of {head_dim} numbers and {kv_heads} key-value heads do not make an attention: the second "
            "must be even, and the third divide the first."
        )
    windowed, window = _windows(raw, depth, source)
    ropes = _ropes(raw, source)
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=raw.pop("intermediate_size"),
        window=window,
        activation=ACTIVATIONS[activation],
        norm_eps=raw.pop("rms_norm_eps"),
        norm_offset=family.norm_offset,
        post_norms=family.post_norms,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        query_scale=raw.pop(family.query_scale) ** -0.5 if family.query_scale else None,
        **ropes,
    )
    fields = {
        "vocab_size": raw.pop("vocab_size"),
        "num_layers": depth,
        "block": block,
        "tie_embeddings": raw.pop("tie_word_embeddings"),
        "embed_scale": width**0.5 if family.scaled_embeddings else 1.0,
        "windowed": windowed,
    }
    # What is left and switched on would change the function, and is not implemented.
    for name, value in raw.items():
        if name not in NEUTRAL and value not in (None, False, 0, {}, []):
            raise ValueError(f"{source}: the setting {name!r} = {value!r} is not supported.")
    return DecoderConfig(**{**fields, **overrides})


def family_of(settings: Mapping[str, Any], source: str, families: Mapping[str, Family]) -> Family:
    """Return the family that config.json names.

    Raises:
      ValueError: another one.
    """
    name = settings.get("model_type")
    name = "gemma3_text" if name == "gemma3" else name
    if not isinstance(name, str) or name not in families:
        raise ValueError(
            f"{source}: model_type {name!r} is not supported, only {', '.join(families)}, and those that families=... gives."
        )
    return families[name]


def family_like(c: DecoderConfig) -> tuple[str, Family]:
    """Return the family of FAMILIES whose blocks are like those of a decoder, and its name."""
    b = c.block
    traits = (b.qk_norm, b.qkv_bias, b.post_norms)
    found = ((name, of) for name, of in FAMILIES.items() if (of.qk_norm, of.qkv_bias, of.post_norms) == traits)
    return next(found, ("llama", FAMILIES["llama"]))


def _with_defaults(settings: dict[str, Any], source: str, family: Family) -> dict[str, Any]:
    """Complete settings by the family's defaults, older spellings turned into today's."""
    if family.defaults is not None:
        found = {"tie_word_embeddings": False, **family.defaults, **settings}
        for name in ("vocab_size", "num_attention_heads", "rms_norm_eps", family.activation, family.query_scale):
            if name is not None and name not in found:
                raise ValueError(f"{source}: the setting {name!r} is missing, and the family's defaults do not have it.")
        return {"rope_parameters": {"rope_theta": found.pop("rope_theta", 10_000.0)}, **found}
    from transformers import AutoConfig  # here, since it takes seconds

    try:
        return AutoConfig.for_model(**settings).to_dict()
    except Exception as error:  # whatever its validation raises
        raise ValueError(f"{source} is no valid {settings['model_type']} config: {' '.join(str(error).split())}.") from error


def _windows(raw: dict[str, Any], depth: int, source: str) -> tuple[tuple[bool, ...], int | None]:
    kinds, window = raw.pop("layer_types", None) or ["full_attention"] * depth, raw.pop("sliding_window", None)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != depth:
        raise ValueError(f"{source}: the setting 'layer_types' of {len(kinds)} layers, {sorted(set(kinds))}, is not supported.")
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if any(windowed):
        return windowed, window
    if window is not None:
        raise ValueError(f"{source}: the setting 'sliding_window' = {window} without layers that have it is not supported.")
    return (), None


def _ropes(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Take the rotary settings: one for all layers, or one for each kind of layer."""
    rope = raw.pop("rope_parameters")
    if not isinstance(rope, dict) or "full_attention" not in rope:
        theta, scaling = _rope(rope, source)
        return {"rope_theta": theta, "rope_scaling": scaling}
    theta, scaling = _rope(rope["full_attention"], source)
    window_theta, window_scaling = _rope(rope.get("sliding_attention"), source)
    if window_scaling is not None:
        raise ValueError(f"{source}: scaled rotary positions in layers with a window are not supported.")
    return {"rope_theta": theta, "rope_scaling": scaling, "window_rope_theta": window_theta}


def _rope(settings: Any, source: str) -> tuple[float, RopeScaling | None]:
    if wrong := misfit(settings, ROPE):
        raise ValueError(f"{source}: the rotary positions: {wrong}.")
    settings = dict(settings)
    theta, kind = float(settings.pop("rope_theta")), settings.pop("rope_type", "default")
    names = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
             "original_max_position_embeddings": "original_length"}  # fmt: skip
    known = {"default": 0, "linear": 1, "llama3": 4}
    if kind not in known:
        raise ValueError(f"{source}: rotary positions of type {kind!r} are not supported, only {', '.join(known)}.")
    fields = {names[name]: settings.pop(name) for name in list(names)[: known[kind]] if name in settings}
    if settings:
        raise ValueError(f"{source}: the setting {next(iter(settings))!r} of {kind} rotary positions is not supported.")
    return theta, RopeScaling(kind, **fields) if fields else None


class Tensor(NamedTuple):
    """One parameter, or one layer's part of it, here and in a checkpoint; a matrix is stored [out, in] there.

    Attributes:
      path: of our parameter within a `Decoder`.
      layer: which part of a stacked parameter; None for a parameter outside the layers.
      name: in the checkpoint, after the prefix of the language model.
    """

    path: str
    layer: int | None
    name: str
    theirs: tuple[int, ...]
    ours: tuple[int, ...]
    transposed: bool

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Return a checkpoint's tensor as ours; a view."""
        return (tensor.T if self.transposed else tensor).reshape(self.ours)

    def write(self, array: np.ndarray) -> np.ndarray:
        """Undo `read`."""
        return np.ascontiguousarray(array.reshape(self.theirs[::-1]).T) if self.transposed else array.reshape(self.theirs)


def table(c: DecoderConfig, family: Family | None = None) -> Iterator[Tensor]:
    """List the tensors of a checkpoint of this config.

    Args:
      family: of the checkpoint; the one of FAMILIES that is like the decoder if it is not given.
    """
    b, vocab, family = c.block, c.vocab_size, family or family_like(c)[1]
    width, heads, kv_heads, dim, mlp = b.width, b.heads, b.kv_heads, b.head_dim, b.mlp_width

    def vector(path: str, *shape: int) -> Tensor:
        return Tensor(path, None, family.name(path), (math.prod(shape),), shape, False)

    def matrix(path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
        return Tensor(path, None, family.name(path), (math.prod(outputs), math.prod(inputs)), (*inputs, *outputs), True)

    yield Tensor("embed", None, family.name("embed"), (vocab, width), (vocab, width), False)
    yield vector("norm/scale", width)
    if not c.tie_embeddings:
        yield matrix("head", (width,), (vocab,))
    layer = [
        vector("attn_norm/scale", width),
        matrix("attn/q", (width,), (heads, dim)),
        matrix("attn/k", (width,), (kv_heads, dim)),
        matrix("attn/v", (width,), (kv_heads, dim)),
        matrix("attn/o", (heads, dim), (width,)),
        vector("mlp_norm/scale", width),
        matrix("mlp/gate_proj", (width,), (mlp,)),
        matrix("mlp/up", (width,), (mlp,)),
        matrix("mlp/down", (mlp,), (width,)),
    ]
    if b.post_norms:
        layer += [vector("attn_post_norm/scale", width), vector("mlp_post_norm/scale", width)]
    if b.qk_norm:
        layer += [vector(f"attn/{x}_norm/scale", dim) for x in "qk"]
    if b.qkv_bias:
        layer += [vector(f"attn/{x}_bias", count, dim) for x, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
    for i in range(c.num_layers):
        for t in layer:
            yield t._replace(path=f"stack/blocks/{t.path}", layer=i, name=family.layer.format(i) + t.name)


def settings_from_config(c: DecoderConfig) -> dict[str, Any]:
    """Return what a config.json says of a decoder: the inverse of `config_from_settings`.

    Raises:
      ValueError: a decoder that no family of `FAMILIES` describes, such as one with gated residuals.
    """
    b, (name, family) = c.block, family_like(c)
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    settings: dict[str, Any] = {
        "model_type": name, "architectures": [family.architecture], "vocab_size": c.vocab_size, "hidden_size": b.width, "intermediate_size": b.mlp_width,
        "num_hidden_layers": c.num_layers, "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads,
        "head_dim": b.head_dim, "rms_norm_eps": b.norm_eps, "tie_word_embeddings": c.tie_embeddings,
        family.activation: activations[b.activation],
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": b.rope_theta}
    if b.rope_scaling is not None:
        s = b.rope_scaling
        rope |= {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor,
                     "original_max_position_embeddings": s.original_length}  # fmt: skip
    settings["rope_parameters"] = rope
    if family.query_scale:
        local = {"rope_type": "default", "rope_theta": b.window_rope_theta}
        settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        settings[family.query_scale] = b.head_dim if b.query_scale is None else round(b.query_scale**-2)
    if any(c.windowed):
        settings["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in c.windowed]
        settings |= {"sliding_window": b.window, "use_sliding_window": True}
    if config_from_settings(settings, "this decoder") != bare(c):
        raise ValueError(f"No family of {', '.join(FAMILIES)} describes this decoder: {bare(c)}.")
    return settings


def bare(c: DecoderConfig) -> DecoderConfig:
    """Return what a config.json can say of a decoder: no way to its user, no adapters, and nothing of how it is computed."""
    block = dataclasses.replace(c.block, lora=None, dropout=0.0, attention_kernel="auto")
    return dataclasses.replace(c, cross=None, unroll=False, remat="none", block=block)
