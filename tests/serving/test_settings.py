"""The parts of `user_llm.json`: each is checked, and the identity is of what computes."""

import dataclasses
import json
import math

import pytest

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


def test_a_model_says_how_its_llm_is_quantised_only_where_it_is(make_model):
    config = make_model("cross").written.predictor.config
    said = settings.sizes(config)["decoder"]["block"]
    assert "quantize" not in said and settings.sizes(config)["encoder"]["block"].keys() == said.keys()
    block = dataclasses.replace(config.decoder.block, quantize="nf4")
    quantized = settings.sizes(dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, block=block)))
    assert quantized["decoder"]["block"] == said | {"quantize": "nf4"}


def test_the_identity_is_of_what_computes(make_model):
    written = json.loads((make_model("cross").directory / "user_llm.json").read_text())
    same = [{"facts": {}}, {"sharding": {}}, {"limits": written["limits"] | {"batch_size": 1, "pad_whole": True}}]
    model = written["model"]
    before = {name: value for name, value in model.items() if name != "residual"}
    before["encoder"] = {name: value for name, value in model["encoder"].items() if name != "tower"}
    same += [{"model": before}]  # of code that knew neither
    other = [
        {"model": model | {"residual": True}},
        {"model": model | {"encoder": model["encoder"] | {"tower": True}}},
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
