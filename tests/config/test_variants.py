"""Variants exist in a run that names them, and follow the phase that they are like."""

import pytest

from user_llm.config import experiments
from user_llm.config.check import check
from user_llm.config.reader import read_config
from user_llm.config.variants import changed, nested, with_variants


def _read(phases, **changes):
    config = experiments.experiment("movielens", "xattn", "small")
    config.phases = phases
    config.update_from_flattened_dict(changes)
    return read_config(config)


def test_a_variant_exists_where_a_phase_of_the_run_needs_it():
    declared = {"pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10", "text_prompt_50"}
    assert set(_read(("user_llm",)).sections) == declared
    assert set(_read(("user_llm_lora",)).sections) == declared | {"user_llm_lora"}
    assert set(_read(("user_llm_bert4rec",)).sections) == declared | {"user_llm_bert4rec", "bert4rec"}
    assert set(_read(("user_llm",), **{"user_llm.encoder": "dual_encoder"}).sections) == declared | {"dual_encoder"}
    loads = {"user_llm.load": (("^decoder/", "user_llm_lora"), (".*", "fresh"))}
    assert set(_read(("user_llm",), **loads).sections) == declared | {"user_llm_lora"}


def test_variants_follow_what_is_said_of_the_phase_that_they_are_like_where_they_are_not_set_apart():
    names = ("user_llm_lora", "user_llm_50_events", "user_llm_bert4rec", "text_summary")
    config = _read(names, **{"user_llm.batch_size": 4, "user_llm.examples.max_events": 30})
    found = {name: (config.contextual(name).batch_size, config.contextual(name).examples.max_events) for name in names}
    assert found == {
        "user_llm_lora": (4, 30),
        "user_llm_50_events": (4, 50),
        "user_llm_bert4rec": (32, 30),
        "text_summary": (16, 0),
    }
    assert config.contextual("user_llm_lora").method == "user_llm_lora"


def test_the_llm_ranks_by_itself_in_the_papers_tables_and_is_the_base_of_each():
    tables = {name: experiments.TABLES[name] for name in ("encoders", "strategies", "injections", "perceiver", "lengths")}
    phases = {phase for table in tables.values() for phase in table}
    config = _read(("user_llm", *sorted(phases)))
    for phase in phases & {name for name in config.sections if name.startswith("user_llm")}:
        found = config.contextual(phase)
        start = "scratch" if phase == "user_llm_scratch" else "pretrained"
        assert (found.residual, found.encoder_init, found.loss.align) == (False, start, 0.0 if start == "scratch" else 1.0), (
            phase
        )
    assert all("user_llm_alone" in table and "user_llm" not in table for table in tables.values())
    own = config.contextual("user_llm")
    assert (own.residual, own.encoder_init, own.loss.align) == (True, "frozen", 0.0)


def test_muon_moves_the_encoder_where_it_was_tried_and_no_other():
    config = _read(("pretrain_encoder", "plain_encoder", "bert4rec", "dual_encoder", "user_llm", "text_prompt_10"))
    assert {name for name in config.phases if config.sections[name].optimizer.muon} == {"pretrain_encoder"}
    elsewhere = read_config(experiments.experiment("amazon", "xattn", "small"))
    assert not any(section.optimizer.muon for section in elsewhere.sections.values())


def test_a_variant_of_a_variant_and_a_section_that_is_there():
    plain = {"a": {"task": "t", "x": {"y": 1, "z": 2}}, "phases": ("c", "d"), "d": {"task": "own"}}
    variants = {
        "b": {"like": "a", "changes": {"x": {"y": 5}}},
        "c": {"like": "b", "changes": {"w": 3}},
        "d": {"like": "a", "changes": {}},
    }
    found = with_variants({**plain, "variants": variants})
    assert found["b"] == {"task": "t", "x": {"y": 5, "z": 2}} and found["c"] == {**found["b"], "w": 3}
    assert found["d"] == {"task": "own"} and plain["a"]["x"]["y"] == 1


@pytest.mark.parametrize(
    "variants",
    [
        {"b": {"like": "b", "changes": {}}},
        {"b": {"like": "c", "changes": {}}, "c": {"like": "b", "changes": {}}},
        {"b": 3},
        {"b": {"like": 3, "changes": {}}},
        7,
    ],
)
def test_variants_that_lead_nowhere_add_nothing(variants):
    """Reading says then that there is no such phase, or what is wrong with the section."""
    assert "b" not in with_variants({"phases": ("b",), "variants": variants})


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        ("user_lm", r"^variants\.user_llm_x\.like='user_lm': it leads to no phase .* \(did you mean user_llm\?\)"),
        ("user_llm_x", r"^variants\.user_llm_x\.like='user_llm_x': it leads to no phase that the config describes"),
        (3, r"^variants\.user_llm_x\.like=3: it must be a text"),
    ],
)
def test_a_variant_like_no_phase_is_named(like, sentence):
    config = experiments.experiment("movielens", "xattn", "small")
    config = config.to_dict() | {"phases": ("user_llm_x",), "variants": {"user_llm_x": {"like": like, "changes": {}}}}
    with pytest.raises(ValueError, match=sentence):
        check(config)


def test_changes_are_nested_and_leave_their_source_alone():
    assert nested({"a.b": 1, "a.c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    section = {"a": {"b": 1}, "c": (1,)}
    assert changed(section, {"a": {"x": 2}, "c": ()}) == {"a": {"b": 1, "x": 2}, "c": ()} and section == {
        "a": {"b": 1},
        "c": (1,),
    }
