"""A run on a dataset, a task, an encoder and an LLM family of one's own, and its model used from its directory."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import user_llm
from user_llm.config import experiments
from user_llm.models.config_json import config_from_settings
from user_llm.models.families import FAMILIES, Family, table
from user_llm.models.pretrained import decoder_config, load_decoder

sys.path.insert(0, str(Path(__file__).parent))

import own
from tiny_quickstart import one_device, tiny_config

OWN = {
    "datasets": {"plays": own.find_plays},
    "tasks": {"next_genre": own.NEXT_GENRE},
    "encoders": {"mean": own.MeanConfig},
    "families": {"lamp": own.LAMP},
}


def own_config(folder: Path):
    """The tiny quick start with all that is one's own."""
    config = tiny_config(experiments.experiment("movielens", "xattn", "synthetic"))
    config.phases = ("pretrain_encoder", "user_llm")
    config.data.source, config.data.dir = "plays", str(folder / "plays")
    config.encoder.kind, config.encoder.features = "mean", ("item", "genre", "gap")
    config.encoder.options = {"size": 16}
    config.llm.checkpoint = str(folder / "lamp")
    config.user_llm.strategy = "enc"
    config.user_llm.eval.samples = 2
    config.user_llm.prompts.next_genre = {
        "question": "Genre:", "weight": 1.0, "text": 1.0, "max_tokens": 24, "max_target_tokens": 8,
    }  # fmt: skip
    return config


@pytest.mark.slow
def test_a_run_on_all_that_is_ones_own_and_its_model_elsewhere(tmp_path):
    own.write_plays(tmp_path / "plays")
    own.write_lamp(tmp_path / "lamp", ["Track 001\n", "even\n", "odd\n", "Genre:\n"])
    with one_device():
        rows = user_llm.run(own_config(tmp_path), tmp_path / "run", **OWN)
    found = {(row["task"], row["method"]) for row in rows if row["dataset"] == "plays"}
    assert found >= {("next_item", "encoder"), ("next_item", "user_llm"), ("next_genre", "user_llm"), ("general_text", "llm")}
    samples = json.loads((tmp_path / "run" / "user_llm" / "samples.json").read_text())
    shown = [sample["answer"] for sample in samples if sample["task"] == "next_genre"]
    assert len(shown) == 2 and set(shown) <= {"even", "odd"}
    (tmp_path / "run" / "user_llm" / "model").rename(tmp_path / "model")
    (tmp_path / "plays").rename(tmp_path / "gone")

    with pytest.raises(ValueError, match=r"has an encoder of kind 'mean', which this package has not: load it in Python"):
        user_llm.load(tmp_path / "model")
    kinds = {"encoders": OWN["encoders"], "families": OWN["families"]}
    model = user_llm.load(tmp_path / "model", **kinds)
    user = model.encode([{"listener": "bob", "track": f"{n:03}", "seconds": 60 * n} for n in (3, 4, 5, 77)])
    assert (user.count, user.unknown) == (3, 1)
    best = model.recommend(user, 3)
    assert len(best) == 3 and all(item.title.startswith("Track ") for item in best)
    assert model.generate(task="next_genre", user=user) in ("even", "odd")


def test_checkpoints_of_ones_own_family_are_read_by_its_table(tmp_path):
    tensors = own.write_lamp(tmp_path / "lamp", ["a line\n"])
    families = {**FAMILIES, "lamp": own.LAMP}
    config = decoder_config(tmp_path / "lamp", families)
    llama = config_from_settings(
        {**own.LAMP_SETTINGS, "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}, ""
    )
    assert config == llama
    params = load_decoder(tmp_path / "lamp", config, families=families)
    np.testing.assert_array_equal(params["embed"], tensors["model.words.weight"])
    queries = params["stack"]["blocks"]["attn"]["q"][1]
    np.testing.assert_array_equal(queries.reshape(16, 16), tensors["model.blocks.1.attention.wq.weight"].T)
    assert {t.path for t in table(config, own.LAMP)} == {t.path for t in table(llama)} and jax.tree.leaves(params)
    with pytest.raises(ValueError, match="model_type 'lamp' is not supported, only llama, "):
        decoder_config(tmp_path / "lamp")


@pytest.mark.parametrize("config", [None, "configs/quickstart.py", 3])
def test_what_is_no_config_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="^A config is what `get_config` of a config file returns, not a "):
        user_llm.run(config, tmp_path)


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ({"names": {"attn/query": "x"}}, "^names has 'attn/query', which is no parameter of a decoder"),
        ({"post_norms": True}, "^names lacks 'attn_post_norm/scale', which a family with post_norms has"),
    ],
)
def test_a_family_that_no_checkpoint_can_be_of_is_refused(family, sentence):
    with pytest.raises(ValueError, match=sentence):
        Family("X", **family)


@pytest.mark.parametrize("missing", ["vocab_size", "num_attention_heads", "rms_norm_eps", "hidden_act"])
def test_a_setting_that_neither_file_nor_family_has_is_named(missing):
    defaults = {name: value for name, value in own.LAMP.defaults.items() if name != missing}
    settings = {name: value for name, value in own.LAMP_SETTINGS.items() if name != missing}
    families = {"lamp": dataclasses.replace(own.LAMP, defaults=defaults)}
    with pytest.raises(ValueError, match=f"^config.json: the setting '{missing}' is missing"):
        config_from_settings(settings, "config.json", families)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.source": "play"}, r"^data\.source='play': choose movielens, .* or plays \(did you mean plays\?\)"),
        ({"encoder.kind": "average"}, r"^encoder\.kind='average': choose transformer or mean"),
        ({"encoder.options": {"sizes": 16}}, r"no key encoder\.options\.sizes \(did you mean size\?\)"),
        ({"encoder.options": {}}, r"lacks the key encoder\.options\.size"),
        ({"user_llm.prompts.next_genre.weight": -1.0}, r"^user_llm\.prompts\.next_genre\.weight=-1\.0: it must be 0 or more"),
        ({"phases": ("bert4rec",)}, r"encoder\.objective='masked': the encoder mean has no objective but its own"),
        (
            {"pretrain_encoder.batch.window": 201, "pretrain_encoder.batch.row_length": 256},
            r"^pretrain_encoder\.batch\.window=201: the encoder mean reads at most 200 events",
        ),
        ({"user_llm.examples.max_events": 201}, r"^user_llm\.examples\.max_events=201: the encoder mean reads at most 200"),
        (
            {"user_llm.prompts.next_gerne": {"weight": 1.0}},
            r"no key user_llm\.prompts\.next_gerne \(did you mean next_genre\?\)",
        ),
    ],
)
def test_what_is_ones_own_is_checked_like_the_rest(tmp_path, changes, sentence):
    own.write_plays(tmp_path / "plays")
    own.write_lamp(tmp_path / "lamp", ["a line\n"])
    config = own_config(tmp_path)
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[name] = value
    with pytest.raises(ValueError, match=sentence), one_device():
        user_llm.run(config, tmp_path / "run", **OWN)
