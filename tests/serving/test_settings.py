"""The parts of `user_llm.json`: each is checked, and the identity is of what computes."""

import dataclasses
import json
import math

import pytest

from user_llm.config.reader import read_record
from user_llm.data.schema import Feature, Schema
from user_llm.models.decoder import DecoderConfig
from user_llm.models.encoder import EncoderConfig
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.experts import ExpertsConfig
from user_llm.nn.rotary import RopeScaling
from user_llm.nn.transformer import BlockConfig
from user_llm.serving import settings


def test_numbers_of_names_come_back_from_json():
    assert settings.numbered("favorite", {"1": "Drama", "12": "War"}) == {1: "Drama", 12: "War"}
    for wrong in ({}, {"0": "a"}, {"x": "a"}, {"-1": "a"}, {"1.5": "a"}, {"9" * 30: "a"}, {"²": "a"}):
        with pytest.raises(ValueError, match="it must be a whole number from 1"):
            settings.numbered("favorite", wrong)


@pytest.mark.parametrize("value", [None, [], {}, {"kind": 1}, {"kind": "poem"}, {"kind": "next_item", "instruction": "Next:"}])
def test_a_template_of_another_form_is_refused_by_its_task(value):
    with pytest.raises(ValueError, match=r"prompts\.next_item"):
        settings.template(None, "next_item", value)


def test_what_json_cannot_hold_is_made_plain():
    found = settings.plain({1: (1.5, math.inf), "a": [math.nan, {"b": ()}]})
    assert found == {"1": [1.5, None], "a": [None, {"b": []}]} and json.loads(json.dumps(found)) == found


# What the code before there were families with caps, experts, codes and item towers wrote of `_config`, and its hash of `_settings`.
BLOCK_BEFORE = {
    "width": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp_width": 16, "rope_theta": 10000.0, "window": None,
    "window_rope_theta": None, "activation": "silu", "norm_eps": 1e-06, "norm_offset": 0.0, "post_norms": False, "qk_norm": False,
    "qkv_bias": False, "query_scale": None, "residual_gate": False, "dropout": 0.0, "lora": None, "attention_kernel": "auto",
}  # fmt: skip
SCALING_BEFORE = {
    "kind": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192,
}  # fmt: skip
IDENTITY_BEFORE = "3ad326022c5dd031"


def _config(block=None, scaling=None, decoder=None, encoder=None, **more):
    """A model by features that are as old as model directories, changed by the arguments."""
    scaled = RopeScaling("llama3", 4.0, **scaling or {})
    plain = BlockConfig(width=8, heads=2, kv_heads=1, head_dim=4, mlp_width=16)
    ours = UserEncoderConfig(schema=Schema((Feature("item", "item", 9),)), block=plain, num_layers=1, **encoder or {})
    cross = CrossAttentionConfig(user_width=8, every=1, heads=2, head_dim=4)
    block = dataclasses.replace(plain, rope_scaling=scaled, **block or {})
    llm = DecoderConfig(vocab_size=20, num_layers=1, block=block, tie_embeddings=True, cross=cross, **decoder or {})
    return UserLLMConfig(llm, table_rows=128, item_width=8, num_items=9, encoder=ours, **more)


def _settings(config):
    limits = {"max_events": 9, "batch_size": 1, "beams": 2, "after_instruction": True, "ranks": False, "pad_whole": True}
    rest = {"vocabulary": {}, "lines": {}, "prompts": {}, "names": {}, "dtype": "float32", "llm": None}
    return {"model": settings.sizes(config), "limits": limits, "files": {"user_llm.safetensors": "0"}, **rest}


def test_users_stored_by_code_of_before_stay_valid():
    said = settings.sizes(_config())
    assert said["decoder"]["block"] == BLOCK_BEFORE | {"rope_scaling": SCALING_BEFORE}
    assert said["encoder"]["block"] == BLOCK_BEFORE | {"rope_scaling": None}
    assert settings.identity(_settings(_config())) == IDENTITY_BEFORE


@pytest.mark.parametrize(
    "change",
    [
        {"block": {"quantize": "nf4"}}, {"block": {"attn_softcap": 50.0}}, {"block": {"experts": ExpertsConfig(2, 1, True)}},
        {"scaling": {"magnitude": 2.0}}, {"decoder": {"unrotated": (True,)}}, {"encoder": {"tower": True}}, {"residual": True},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_came_later_count_where_they_compute(change):
    changed = _config(**change)
    assert settings.identity(_settings(changed)) != IDENTITY_BEFORE
    assert read_record(UserLLMConfig, settings.sizes(changed), "", {EncoderConfig: UserEncoderConfig}) == changed


def test_the_identity_is_of_what_computes(make_model):
    written = json.loads((make_model("cross").directory / "user_llm.json").read_text())
    same = [{"facts": {}}, {"sharding": {}}, {"limits": written["limits"] | {"batch_size": 1, "pad_whole": True}}]
    model = written["model"]
    other = [
        {"model": model | {"residual": True}},
        {"names": {}},
        {"dtype": "bfloat16"},
        {"limits": written["limits"] | {"beams": 1}},
        {"files": {"model.safetensors": "x"}},
    ]
    assert {settings.identity(written | change) for change in same} == {written["identity"]}
    assert len({settings.identity(written | change) for change in other} | {written["identity"]}) == len(other) + 1


def test_what_is_written_is_read_and_what_is_changed_is_refused(directory):
    written, read = settings.read_settings(directory)
    assert read.identity == written["identity"] and read.limits.max_events == written["limits"]["max_events"]
    (directory / settings.FILE).write_text(json.dumps(written | {"identity": "x"}))
    with pytest.raises(ValueError, match="is not as it was written: get the model directory again"):
        settings.read_settings(directory)
    settings.write_settings(directory, {key: value for key, value in written.items() if key not in ("seal", "limits")})
    with pytest.raises(ValueError, match=r"user_llm\.json: .*limits.* Get the model directory again"):
        settings.read_settings(directory)
