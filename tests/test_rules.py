"""The rule lists of the shipped configs cover all parameters that models can have, and no others."""

import importlib
from pathlib import Path

import pytest
from flax import nnx
from ml_collections import ConfigDict

from user_llm.common import trees
from user_llm.data.schema import Feature, Schema
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.user_encoder import UserEncoder, UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.layers import embedding_param
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig

FILES = sorted(path.stem for path in Path(__file__).parents[1].glob("configs/*.py"))
SCHEMA = Schema((Feature("item", "item", 9), Feature("rating", "ordinal", 6), Feature("a/b", "categorical", 3)))
# Layers with all parameters that a layer can have.
LAYERS = BlockConfig(
    width=8, heads=2, kv_heads=1, head_dim=4, mlp_width=8, qk_norm=True, qkv_bias=True, post_norms=True, residual_gate=True,
    lora=LoRAConfig(2, 4.0, 0.0, ".*"),
)  # fmt: skip
RESAMPLER = ResamplerConfig(num_latents=2, input_width=8, heads=2, head_dim=4, mlp_width=8, recency_buckets=3)


def _encoder(objective):
    return UserEncoderConfig(SCHEMA, LAYERS, 1, objective, feature_width=2, positions="learned", heads=("rating",))


def _user_llm(objective, seat):
    cross = CrossAttentionConfig(user_width=8, every=1, heads=2, head_dim=4, seat=seat, recency_buckets=3)
    decoder = DecoderConfig(9, 1, LAYERS, tie_embeddings=False, cross=cross)
    return UserLLMConfig(decoder, 128, 8, 9, encoder=_encoder(objective), resampler=RESAMPLER, soft_prompt=True)


TEXT_PROMPT = UserLLMConfig(DecoderConfig(9, 1, LAYERS, tie_embeddings=False), 128, 8, 9)
# Together they have all parameters that models can have.
MODELS = {
    "masked encoder": (UserEncoder, _encoder("masked")),
    "dual encoder": (UserEncoder, _encoder("dual")),
    "decoder": (Decoder, TEXT_PROMPT.decoder),
    "text prompt": (UserLLM, TEXT_PROMPT),
    "after_attention": (UserLLM, _user_llm("masked", "after_attention")),
    "before_block": (UserLLM, _user_llm("dual", "before_block")),
}


def _shapes(kind, config):
    return trees.abstract(lambda: kind(config, rngs=nnx.Rngs(params=0)))[1]


@pytest.fixture(scope="module")
def shapes():
    """The shapes of the parameters of each of MODELS."""
    return {name: _shapes(*model) for name, model in MODELS.items()}


class Sinking(UserLLM):
    """A model with two parameters of an unknown name."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.sink = embedding_param(rngs, (8,))
        self.decoder.stack.blocks.attn.sink = embedding_param(rngs, (2, 8))


@pytest.fixture(scope="module")
def sinking():
    return _shapes(Sinking, TEXT_PROMPT)


def _rule_lists(config: ConfigDict, key: str = "") -> dict[str, trees.Rules]:
    """Return every rule list of a config by its key, of all phases and strategies that it holds."""
    lists = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            lists |= _rule_lists(value, f"{key}{name}.")
        elif name in ("trainable", "lr_multiplier", "decay", "sharding", "load"):
            lists[f"{key}{name}"] = tuple(value)
    return lists


@pytest.fixture(scope="module", params=FILES)
def rule_lists(request):
    """The distinct rule lists of a shipped config in all its variants, each under one of its keys."""
    make = importlib.import_module(f"configs.{request.param}").get_config
    variants = ("full", "small", "synthetic", "gpu", "cpu", "qwen3_0_6b") if make.__code__.co_argcount else (None,)
    lists = {}
    for variant in variants:
        lists |= {rules: key for key, rules in _rule_lists(make() if variant is None else make(variant)).items()}
    kinds = {key.rpartition(".")[2] for key in lists.values()}
    assert kinds >= {"trainable", "lr_multiplier", "decay", "sharding"}
    return {key: rules for rules, key in lists.items()}


def test_every_rule_list_of_a_config_covers_every_parameter(rule_lists, shapes):
    for key, rules in rule_lists.items():
        for name, params in shapes.items():
            assert trees.match(rules, params), (key, name)


def test_a_parameter_of_an_unknown_name_is_refused_by_its_path(rule_lists, sinking):
    """Lists by part (what trains, how fast, from where) refuse an unknown part; the others an unknown name in any part."""
    rest = {name: part for name, part in sinking.items() if name != "sink"}
    for key, rules in rule_lists.items():
        with pytest.raises(ValueError, match="No rule covers parameter 'sink'"):
            trees.match(rules, {"sink": sinking["sink"]})
        if key.endswith((".decay", ".sharding")):
            with pytest.raises(ValueError, match="No rule covers parameter 'decoder/stack/blocks/attn/sink'"):
                trees.match(rules, rest)
