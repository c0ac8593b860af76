"""The rotary positions that a config.json describes, turned into fields of a BlockConfig, and back."""

import math
from collections.abc import Mapping
from typing import Any

from user_llm.common.records import (
    misfit,
    number,
    number_of_at_least_1,
    positive_number,
    positive_whole_number,
    text,
    true_or_false,
)
from user_llm.nn.rotary import RopeScaling
from user_llm.nn.transformer import BlockConfig

FORM = {
    "rope_theta": positive_number, "rope_type?": text, "type?": text, "partial_rotary_factor?": positive_number,
    "factor?": number_of_at_least_1, "low_freq_factor?": positive_number, "high_freq_factor?": positive_number,
    "original_max_position_embeddings?": positive_whole_number, "beta_slow?": positive_number, "beta_fast?": positive_number,
    "truncate?": true_or_false, "short_factor?": [positive_number], "attention_factor?": positive_number, "mscale?": number,
    "mscale_all_dim?": number, "llama_4_scaling_beta?": number,
}  # fmt: skip
# The fields of RopeScaling that settings are, by the kinds that have them; those that must be there end in `!`.
LENGTH = {"original_max_position_embeddings!": "original_length"}
FIELDS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor!": "factor"},
    "llama3": {"factor!": "factor", "low_freq_factor!": "low_freq_factor", "high_freq_factor!": "high_freq_factor", **LENGTH},
    "yarn": {"factor!": "factor", "beta_slow": "slow_turns", "beta_fast": "fast_turns", "truncate": "whole_numbers",
             "attention_factor": "magnitude", "llama_4_scaling_beta": "query_growth", **LENGTH},
    "longrope": {"factor": "factor", "short_factor!": "factors", "attention_factor": "magnitude", **LENGTH},
}  # fmt: skip


def ropes_from_settings(raw: dict[str, Any], head_dim: int, source: str, *, partial: bool) -> dict[str, Any]:
    """Take the rotary settings out of a config.json: one for all layers, or one for each kind of layer.

    Args:
      raw: what config.json says; the settings that are read are taken out of it.
      partial: whether the family has heads that positions turn in part.

    Raises:
      ValueError: settings that are missing, that do not fit each other, or that the decoder does not implement.
    """
    rope, reach = raw.pop("rope_parameters"), raw.get("max_position_embeddings")
    if partial:  # transformers has put these among the rotary settings
        for name in ("original_max_position_embeddings", "partial_rotary_factor"):
            raw.pop(name, None)
    if not isinstance(rope, dict) or "full_attention" not in rope:
        return _fields(rope, head_dim, reach, source, partial)
    window = _fields(rope.get("sliding_attention"), head_dim, reach, source, False)
    if window["rope_scaling"] is not None:
        raise ValueError(f"{source}: scaled rotary positions in layers with a window are not supported.")
    return {**_fields(rope["full_attention"], head_dim, reach, source, False), "window_rope_theta": window["rope_theta"]}


def _fields(settings: Any, head_dim: int, reach: int | None, source: str, partial: bool) -> dict[str, Any]:
    if wrong := misfit(settings, FORM):
        raise ValueError(f"{source}: the rotary positions: {wrong}.")
    settings = {name: value for name, value in settings.items() if value is not None}
    older = settings.pop("type", "default")
    theta, kind = float(settings.pop("rope_theta")), settings.pop("rope_type", older)
    share = settings.pop("partial_rotary_factor", 1.0) if partial else 1.0
    if kind not in FIELDS:
        raise ValueError(f"{source}: rotary positions of type {kind!r} are not supported, only {', '.join(FIELDS)}.")
    turned = int(head_dim * share)
    if share > 1 or not turned or turned % 2:
        raise ValueError(
            f"{source}: positions cannot turn {share} of {head_dim} numbers of a head: it must be an even number of them."
        )
    if theta < 1:
        raise ValueError(f"{source}: rotary positions with 'rope_theta' = {theta} are not supported, only with 1 or more.")
    return {"rope_theta": theta, "rotary_share": share, "rope_scaling": _scaling(settings, kind, theta, turned, reach, source)}


def _scaling(
    settings: dict[str, Any], kind: str, theta: float, turned: int, reach: int | None, source: str
) -> RopeScaling | None:
    """Return how `kind` scales the frequencies of `turned` numbers; settings that it does not have are refused.

    Args:
      reach: the most positions that the checkpoint is made for.
    """
    if kind == "yarn":
        scales = [settings.pop(name, 0) for name in ("mscale", "mscale_all_dim")]
        settings.pop("max_position_embeddings", None)  # it repeats the config's own
    if kind == "longrope":
        settings.pop("long_factor", None)  # of texts longer than those that are read here
    fields = {}
    for name, field in FIELDS[kind].items():
        if (plain := name.removesuffix("!")) in settings:
            fields[field] = settings.pop(plain)
        elif plain != name:
            raise ValueError(f"{source}: the setting {plain!r} of {kind} rotary positions is missing.")
    if settings:
        raise ValueError(f"{source}: the setting {next(iter(settings))!r} of {kind} rotary positions is not supported.")
    if kind == "yarn":
        fields = {"magnitude": _yarn_magnitude(fields["factor"], *scales)} | fields
    if kind == "longrope":
        factors, length = tuple(fields["factors"]), fields["original_length"]
        if len(factors) != turned // 2:
            raise ValueError(
                f"{source}: the rotary positions: 'short_factor' has {len(factors)} numbers and not {turned // 2}."
            )
        factor = fields.get("factor", (reach or length) / length)
        fields = {"magnitude": _long_magnitude(factor, length)} | fields | {"factor": factor, "factors": factors}
    scaling = RopeScaling(kind, **fields) if fields else None
    if scaling and kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(f"{source}: the rotary positions: 'high_freq_factor' is not above 'low_freq_factor'.")
    if scaling and kind == "yarn" and (theta == 1 or scaling.fast_turns <= scaling.slow_turns):
        raise ValueError(f"{source}: the rotary positions: 'rope_theta' is not above 1, or 'beta_fast' not above 'beta_slow'.")
    return scaling


def _yarn_magnitude(factor: float, scale: float, scale_of_all: float) -> float:
    """Return what rotated queries and keys are multiplied by where a config.json does not say it (Peng et al. 2023)."""
    grown = lambda scale: 0.1 * scale * math.log(factor) + 1  # noqa: E731
    return grown(scale) / grown(scale_of_all) if scale and scale_of_all else grown(1)


def _long_magnitude(factor: float, length: int) -> float:
    """Return what rotated queries and keys are multiplied by where a config.json does not say it (Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 < length else 1.0


def settings_from_ropes(block: BlockConfig, *, partial: bool) -> dict[str, Any]:
    """Return what a config.json says of the rotary positions of a decoder: the inverse of `ropes_from_settings`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": block.rope_theta}
    if partial:
        rope["partial_rotary_factor"] = block.rotary_share
    if (scaling := block.rope_scaling) is not None:
        rope["rope_type"] = scaling.kind
        rope |= {name.removesuffix("!"): getattr(scaling, field) for name, field in FIELDS[scaling.kind].items()}
        if scaling.kind == "longrope":  # it reaches as far as it is read here
            rope["short_factor"] = rope["long_factor"] = list(scaling.factors)
    if block.window_rope_theta is None:
        return {"rope_parameters": rope}
    near = {"rope_type": "default", "rope_theta": block.window_rope_theta}
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": near}}
