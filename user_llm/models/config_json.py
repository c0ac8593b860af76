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
from user_llm.common.records import misfit, positive_number, positive_whole_number, text, true_or_false, whole_number
from user_llm.models.decoder import DecoderConfig
from user_llm.models.families import FAMILIES, OPTIONAL, WRAPPERS, Family, families_like, family_of
from user_llm.models.layer_settings import experts_from_settings, unrotated_from_settings, windows_from_settings
from user_llm.models.rotary_settings import ropes_from_settings, settings_from_ropes
from user_llm.nn.transformer import BlockConfig

MOST_LAYERS = 1000  # the deepest open models have some 130
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def token_id_or_list_of_them(value: Any) -> bool:
    """Return whether a value is a whole number, or a list of whole numbers."""
    return all(whole_number(token) for token in (value if isinstance(value, list) else [value]))


# What settings must be if they are there; these have a say in how much memory is taken.
SETTINGS = {
    "hidden_size": positive_whole_number, "intermediate_size": positive_whole_number, "num_hidden_layers": positive_whole_number,
    "vocab_size?": positive_whole_number, "num_attention_heads?": positive_whole_number,
    "num_key_value_heads?": positive_whole_number, "head_dim?": positive_whole_number, "sliding_window?": positive_whole_number,
    "rms_norm_eps?": positive_number, "query_pre_attn_scalar?": positive_number, "tie_word_embeddings?": true_or_false,
    "layer_types?": [text], "no_rope_layers?": [whole_number], "num_experts?": positive_whole_number,
    "num_local_experts?": positive_whole_number, "num_experts_per_tok?": positive_whole_number,
    "moe_intermediate_size?": positive_whole_number, "norm_topk_prob?": true_or_false,
    "attn_logit_softcapping?": positive_number, "final_logit_softcapping?": positive_number, "attention_multiplier?": positive_number,
    "embedding_multiplier?": positive_number, "residual_multiplier?": positive_number, "logits_scaling?": positive_number,
    **{f"{role}_token_id?": token_id_or_list_of_them for role in ("bos", "eos", "pad")},
}  # fmt: skip
# Of these null says that there is none, and not that the family's default holds.
OR_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
# Of classifiers; transformers would make as many labels as a config asks for.
LABELS = frozenset({"id2label", "label2id", "num_labels", "problem_type"})
# These settings say how weights are stored, and where texts begin and end. Other files say both. They are not given to transformers,
# which refuses some of their forms.
ASIDE = frozenset({"dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"})

# Settings that change nothing about the function a checkpoint computes, or that transformers has turned into others here.
NEUTRAL = LABELS | ASIDE | frozenset({
    "_name_or_path", "architectures", "model_type", "transformers_version", "use_cache",
    "initializer_range", "max_position_embeddings", "pretraining_tp",
    "attention_dropout", "embd_pdrop", "resid_pdrop",  # of a training; ours has its own
    "no_rope_layer_interval", "output_router_logits", "router_aux_loss_coef",
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
    known = present | {name: None for name in OR_NONE if name in settings and settings[name] is None}
    raw = _with_defaults({name: value for name, value in known.items() if name not in ASIDE}, source, family)
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
    by_layer = "layer_types" in family.reads or family.defaults is not None
    windowed, window = windows_from_settings(raw, depth, source, everywhere="sliding_window" in family.reads, by_layer=by_layer)
    ropes = ropes_from_settings(raw, head_dim, source, partial="partial_rotary_factor" in family.reads)
    own = {field: raw.pop(key) for key, field in family.fields.items()}
    experts, mlp_width = None, raw.pop("intermediate_size")
    if "num_experts" in family.reads:
        experts, mlp_width = experts_from_settings(raw, source), raw.pop("moe_intermediate_size")
    if family.query_scale:
        own["query_scale"] = raw.pop(family.query_scale) ** -0.5
    of_block = {field.name for field in dataclasses.fields(BlockConfig)} & own.keys()
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        window=window,
        activation=ACTIVATIONS[activation],
        norm_eps=raw.pop("rms_norm_eps"),
        norm_offset=family.norm_offset,
        pre_norms=family.pre_norms,
        post_norms=family.post_norms,
        qk_norm=family.qk_norm,
        qk_norm_over_heads=family.qk_norm_over_heads,
        qkv_bias=family.qkv_bias,
        experts=experts,
        **ropes,
        **{field: own.pop(field) for field in of_block},
    )
    fields = {
        "vocab_size": raw.pop("vocab_size"),
        "num_layers": depth,
        "block": block,
        "tie_embeddings": raw.pop("tie_word_embeddings"),
        "embed_scale": width**0.5 if family.scaled_embeddings else 1.0,
        "windowed": windowed,
        "unrotated": unrotated_from_settings(raw, depth, source) if "no_rope_layers" in family.reads else (),
        **own,
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
        needed = ["vocab_size", "num_attention_heads", "rms_norm_eps", family.activation, family.query_scale, *family.fields]
        needed += [name for option in family.reads for name in OPTIONAL[option]]
        for name in needed:
            if name is not None and name not in found:
                raise ValueError(f"{source}: the setting {name!r} is missing, and the family's defaults do not have it.")
        return {"rope_parameters": {"rope_theta": found.pop("rope_theta", 10_000.0)}, **found}
    from transformers import AutoConfig  # here, since it takes seconds

    try:
        return AutoConfig.for_model(**copy.deepcopy(settings)).to_dict()  # it writes into what it is given
    except Exception as error:  # whatever its validation raises
        raise ValueError(f"{source} is no valid {settings['model_type']} config: {' '.join(str(error).split())}.") from error


def settings_from_config(c: DecoderConfig) -> dict[str, Any]:
    """Return what a config.json says of a decoder: the inverse of `config_from_settings`.

    Raises:
      ValueError: a decoder that no family of `FAMILIES` describes, such as one with gated residuals.
    """
    for name, family in families_like(c):
        settings = _settings_of(c, name, family)
        try:
            if config_from_settings(settings, "this decoder") == bare(c):
                return settings
        except ValueError:  # this family has no such setting
            continue
    raise ValueError(f"No family of {', '.join(FAMILIES)} describes this decoder: {bare(c)}.")


def _settings_of(c: DecoderConfig, name: str, family: Family) -> dict[str, Any]:
    """Return what a config.json of a family says of a decoder, as far as the family can say it."""
    b = c.block
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    settings: dict[str, Any] = {
        "model_type": name, "architectures": [family.architecture], "vocab_size": c.vocab_size, "hidden_size": b.width, "intermediate_size": b.mlp_width,
        "num_hidden_layers": c.num_layers, "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads,
        "head_dim": b.head_dim, "rms_norm_eps": b.norm_eps, "tie_word_embeddings": c.tie_embeddings,
        family.activation: activations[b.activation], **settings_from_ropes(b, partial="partial_rotary_factor" in family.reads),
    }  # fmt: skip
    if family.query_scale:
        settings[family.query_scale] = b.head_dim if b.query_scale is None else round(b.query_scale**-2)
    settings |= {key: getattr(b if hasattr(b, field) else c, field) for key, field in family.fields.items()}
    if "num_experts" in family.reads and (e := b.experts):
        settings |= {"num_experts": e.count, "num_experts_per_tok": e.per_token, "norm_topk_prob": e.normalised,
                     "moe_intermediate_size": b.mlp_width}  # fmt: skip
    if "no_rope_layers" in family.reads:
        settings["no_rope_layers"] = [int(not still) for still in c.unrotated or (False,) * c.num_layers]
    if b.rope_scaling is not None and (longest := b.rope_scaling.longest):
        settings |= {"max_position_embeddings": longest, "original_max_position_embeddings": longest}
    if "sliding_window" in family.reads:
        return settings | {"sliding_window": b.window}
    if any(c.windowed):
        settings["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in c.windowed]
        settings |= {"sliding_window": b.window, "use_sliding_window": True}
    return settings


def bare(c: DecoderConfig) -> DecoderConfig:
    """Return what a config.json can say of a decoder: no way to its user, no adapters, and nothing of how it is computed."""
    block = dataclasses.replace(c.block, lora=None, quantize="", dropout=0.0, attention_kernel="auto")
    return dataclasses.replace(c, cross=None, unroll=False, remat="none", block=block)
