"""The settings of a checkpoint: a config.json turned into a DecoderConfig, and back.

`transformers` completes a config.json and turns older spellings into today's. What the config class of a family declares is read
here, or is refused by name where it is switched on. What no model reads is ignored, and a line of the log says so.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from absl import logging

from user_llm.common.printable import printable
from user_llm.common.records import misfit, number, positive_number, positive_whole_number, text, true_or_false, whole_number
from user_llm.models.decoder import DecoderConfig
from user_llm.models.families import FAMILIES, WRAPPERS, Family, family_like, family_of
from user_llm.nn.attention import RopeScaling
from user_llm.nn.transformer import BlockConfig

MOST_LAYERS = 1000  # the deepest open models have some 130
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def number_of_at_least_1(value: Any) -> bool:
    """Return whether a value is a number that is at least 1."""
    return number(value) and value >= 1


def token_id_or_list_of_them(value: Any) -> bool:
    """Return whether a value is a whole number, or a list of whole numbers."""
    return all(whole_number(token) for token in (value if isinstance(value, list) else [value]))


# What settings must be if they are there; these have a say in how much memory is taken.
SETTINGS = {
    "hidden_size": positive_whole_number, "intermediate_size": positive_whole_number, "num_hidden_layers": positive_whole_number,
    "vocab_size?": positive_whole_number, "num_attention_heads?": positive_whole_number,
    "num_key_value_heads?": positive_whole_number, "head_dim?": positive_whole_number, "sliding_window?": positive_whole_number,
    "rms_norm_eps?": positive_number, "query_pre_attn_scalar?": positive_number, "tie_word_embeddings?": true_or_false,
    "layer_types?": [text], **{f"{role}_token_id?": token_id_or_list_of_them for role in ("bos", "eos", "pad")},
}  # fmt: skip
ROPE = {
    "rope_theta": positive_number, "rope_type?": text, "type?": text, "factor?": number_of_at_least_1, "low_freq_factor?": positive_number,
    "high_freq_factor?": positive_number, "original_max_position_embeddings?": positive_whole_number,
}  # fmt: skip
# Of classifiers; transformers would make as many labels as a config asks for.
LABELS = frozenset({"id2label", "label2id", "num_labels", "problem_type"})
# These settings say how weights are stored, and where texts begin and end. Other files say both. They are not given to transformers,
# which refuses some of their forms.
ASIDE = frozenset({"dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"})

# Settings that change nothing about the function a checkpoint computes, or that transformers has turned into others here.
NEUTRAL = LABELS | ASIDE | frozenset({
    "_name_or_path", "architectures", "model_type", "transformers_version", "use_cache",
    "initializer_range", "max_position_embeddings", "pretraining_tp",
    "is_llama_config", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "cache_implementation", "transformers.js_config",
    "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq",
})  # fmt: skip

# Settings that change the function although no config class of FAMILIES declares them: of other models, of code that a checkpoint
# brings along, of weights that are stored in another form.
FOREIGN = frozenset({
    "auto_map", "quantization_config", "compression_config", "attention_multiplier", "clip_qkv", "embedding_multiplier",
    "is_encoder_decoder", "logit_scale", "logits_scaling", "no_rope_layers", "num_experts", "num_local_experts",
    "original_max_position_embeddings", "partial_rotary_factor", "qk_layernorm", "residual_multiplier", "rope_interleaved",
    "use_mrope",
})  # fmt: skip
# Settings of a wrapper that hold for the language model in it.
OUTER = (
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "dtype", "torch_dtype", "quantization_config",
    "tie_word_embeddings",
)  # fmt: skip
# What to bring in place of quantised weights, by the method that a config.json names.
ORIGINAL = "bring the checkpoint in bfloat16 that it was made from"
DEQUANTISED = f"{ORIGINAL}, or load it by transformers, call `model.dequantize()` and save it"
INSTEAD = {"gptq": ORIGINAL, "awq": ORIGINAL, "bitsandbytes": DEQUANTISED, "fp8": DEQUANTISED, "mxfp4": DEQUANTISED}


def language_model(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the settings of the language model that a config.json describes: its own, or those of a part of it.

    Raises:
      ValueError: a wrapper that does not describe its language model.
    """
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return dict(settings)
    part = settings.get("text_config")
    if not isinstance(part, dict):
        raise ValueError(f"{source}: 'text_config' is no object; get the checkpoint again.")
    outer = {name: settings[name] for name in OUTER if settings.get(name) is not None}
    return {"model_type": WRAPPERS[kind], **part, **outer}


def config_from_settings(
    settings: dict[str, Any], source: str, families: Mapping[str, Family] = FAMILIES, **overrides: Any
) -> DecoderConfig:
    """Turn what a config.json holds into a DecoderConfig; `source` is named in errors.

    Raises:
      ValueError: another family, or a setting that is missing or that the decoder does not implement.
    """
    settings = language_model(settings, source)
    family = family_of(settings, source, families)
    present = {name: value for name, value in settings.items() if value is not None and name not in LABELS}
    if wrong := misfit(present, SETTINGS):
        raise ValueError(f"{source}: {wrong}; get the checkpoint again.")
    if present["num_hidden_layers"] > MOST_LAYERS:
        raise ValueError(f"{source}: the setting 'num_hidden_layers' = {present['num_hidden_layers']} is above {MOST_LAYERS}.")
    if present.get("rms_norm_eps", 0) >= 1:
        raise ValueError(f"{source}: the setting 'rms_norm_eps' = {present['rms_norm_eps']} is not below 1.")
    raw = _with_defaults({name: value for name, value in present.items() if name not in ASIDE}, source, family)
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
    _check_rest(raw, source, family)
    return DecoderConfig(**{**fields, **overrides})


def _check_rest(rest: Mapping[str, Any], source: str, family: Family) -> None:
    """Refuse settings that are not read above and switch on what the decoder lacks."""
    if rest.get("is_causal") is False:
        raise ValueError(f"{source}: the setting 'is_causal' = False is not supported: every token would see those after it.")
    ignored = []
    for name, value in rest.items():
        if name in NEUTRAL or value in (None, False, 0, {}, []) or _is_whole(name, value):
            continue
        if name == "quantization_config":
            _refuse_quantised(value, source)
        if name in FOREIGN or _declares(family, name):
            raise ValueError(f"{source}: the setting {name!r} = {value!r} is not supported.")
        ignored.append(name)
    if ignored:
        _log_ignored(source, tuple(sorted(ignored)))


def _declares(family: Family, name: str) -> bool:
    """Return whether a model may read a setting: one of `FAMILIES` does, or the family is none of transformers."""
    if family.defaults is not None:
        return not name.startswith("_")
    return name in _declared()


@functools.cache
def _declared() -> frozenset[str]:
    from transformers import CONFIG_MAPPING  # here, since it takes seconds

    classes = {part for name in FAMILIES for part in CONFIG_MAPPING[name].__mro__}  # not all versions have dataclasses
    names = {name for part in classes for name in inspect.signature(vars(part).get("__init__", object.__init__)).parameters}
    return frozenset(names - {"self", "args", "kwargs"})


@functools.cache
def _log_ignored(source: str, names: tuple[str, ...]) -> None:
    logging.info("%s: settings that no model reads are ignored: %s.", source, printable(", ".join(names), 500))


def _is_whole(name: str, value: Any) -> bool:
    """Return whether a `quantization_config` says that the weights are not quantised."""
    if name != "quantization_config" or not isinstance(value, dict):
        return False
    bits = value.get("bits")
    loads = [value.get(f"load_in_{few}bit") for few in (4, 8)]
    return (isinstance(bits, int) and bits >= 16) or (loads != [None, None] and not any(loads))


def _refuse_quantised(value: Any, source: str) -> None:
    method = value.get("quant_method") if isinstance(value, dict) else None
    said = f"= {value!r} is not supported" if method is None else f"names the method {method!r}, which is not supported"
    raise ValueError(f"{source}: the setting 'quantization_config' {said}: {INSTEAD.get(str(method), ORIGINAL)}.")


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
        return AutoConfig.for_model(**copy.deepcopy(settings)).to_dict()  # it writes into what it is given
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
    older = settings.pop("type", "default")
    theta, kind = float(settings.pop("rope_theta")), settings.pop("rope_type", older)
    names = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
             "original_max_position_embeddings": "original_length"}  # fmt: skip
    known = {"default": 0, "linear": 1, "llama3": 4}
    if kind not in known:
        raise ValueError(f"{source}: rotary positions of type {kind!r} are not supported, only {', '.join(known)}.")
    fields = {names[name]: settings.pop(name) for name in list(names)[: known[kind]] if name in settings}
    if settings:
        raise ValueError(f"{source}: the setting {next(iter(settings))!r} of {kind} rotary positions is not supported.")
    if missing := [name for name in list(names)[: known[kind]] if names[name] not in fields]:
        raise ValueError(f"{source}: the setting {missing[0]!r} of {kind} rotary positions is missing.")
    if theta < 1:
        raise ValueError(f"{source}: rotary positions with 'rope_theta' = {theta} are not supported, only with 1 or more.")
    scaling = RopeScaling(kind, **fields) if fields else None
    if scaling and kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(f"{source}: the rotary positions: 'high_freq_factor' is not above 'low_freq_factor'.")
    return theta, scaling


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
    block = dataclasses.replace(c.block, lora=None, quantize="", dropout=0.0, attention_kernel="auto")
    return dataclasses.replace(c, cross=None, unroll=False, remat="none", block=block)
