"""How the layers of an LLM differ, as a config.json says it: which have a window, which no rotary positions, and what experts they have.

Every function takes the settings that it reads out of `raw`, what config.json says; `source` is named in errors.
"""

from typing import Any

from user_llm.nn.experts import ExpertsConfig


def experts_from_settings(raw: dict[str, Any], source: str) -> ExpertsConfig:
    """Take the settings of a mixture of experts, which all layers must have."""
    every, dense = raw.pop("decoder_sparse_step", 1), raw.pop("mlp_only_layers", None)
    if every != 1 or dense:
        raise ValueError(
            f"{source}: layers without experts among those with them ('decoder_sparse_step' = {every}, 'mlp_only_layers' = "
            f"{dense}) are not supported."
        )
    older = raw.pop("num_local_experts", None)
    count, few = raw.pop("num_experts", None) or older, raw.pop("num_experts_per_tok")
    if few > count:
        raise ValueError(f"{source}: the setting 'num_experts_per_tok' = {few} is above the number of experts, {count}.")
    return ExpertsConfig(count, few, raw.pop("norm_topk_prob"))


def unrotated_from_settings(raw: dict[str, Any], depth: int, source: str) -> tuple[bool, ...]:
    """Take the setting that says which layers have rotary positions (1) and which have none (0)."""
    rotated = raw.pop("no_rope_layers")
    if len(rotated) != depth or set(rotated) - {0, 1}:
        raise ValueError(
            f"{source}: the setting 'no_rope_layers' = {rotated} is not supported: a 0 or 1 for each layer is needed."
        )
    return () if all(rotated) else tuple(not one for one in rotated)


def windows_from_settings(
    raw: dict[str, Any], depth: int, source: str, *, everywhere: bool, by_layer: bool
) -> tuple[tuple[bool, ...], int | None]:
    """Take the settings that say which layers have a window, and how long it is.

    Args:
      everywhere: whether all layers of the family have a window if there is one.
      by_layer: whether each layer of the family has a window if `layer_types` says so.
    """
    window, given = raw.pop("sliding_window", None), raw.pop("layer_types", None)
    kinds = ["sliding_attention" if everywhere and window is not None else "full_attention"] * depth
    if everywhere and given not in (None, kinds):
        raise ValueError(f"{source}: the setting 'layer_types' is not supported: a model of this family has one kind of layer.")
    kinds = given or kinds
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != depth:
        raise ValueError(f"{source}: the setting 'layer_types' of {len(kinds)} layers, {sorted(set(kinds))}, is not supported.")
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if any(windowed) and not (everywhere or by_layer):
        raise ValueError(f"{source}: the setting 'layer_types' has layers with a window, which models of this family ignore.")
    if any(windowed) and window is None:
        raise ValueError(f"{source}: the setting 'sliding_window' is missing, and 'layer_types' has layers with one.")
    if any(windowed):
        return windowed, window
    if window is not None:
        raise ValueError(f"{source}: the setting 'sliding_window' = {window} without layers that have it is not supported.")
    return (), None
