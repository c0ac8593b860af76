"""What is exported stays what it was: settings, stops, files; and adapters fit the modules that transformers makes."""

import dataclasses
import fnmatch
import functools
import json
import re

import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.models.decoder import Decoder
from user_llm.models.export import ADAPTER_FILE, load_adapter, save_adapter, save_decoder, tokenizer_files
from user_llm.models.pretrained import PATTERNS, decoder_config, load_decoder, modules_at
from user_llm.nn.lora import LoRAConfig

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "vocab_size": 50, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 96, "eos_token_id": 1,
}  # fmt: skip
IMAGES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def with_images(tmp_path_factory):
    """A tiny random Gemma 3 with images, made by transformers, that stops at two tokens: the model and its checkpoint."""
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=IMAGES, mm_tokens_per_image=4, eos_token_id=[1, 6])
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval().to(torch.bfloat16)
    path = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return model, path


def test_the_language_model_of_a_wrapper_is_exported_as_one_of_its_own(with_images, tmp_path, bare_logits):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, path = with_images
    config = decoder_config(path)
    params = load_decoder(path, config)
    save_decoder(tmp_path, params, config, like=path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == "gemma3_text" and settings["architectures"] == ["Gemma3ForCausalLM"]
    assert (settings["dtype"], settings["max_position_embeddings"], settings["eos_token_id"]) == ("bfloat16", 96, [1, 6])
    assert not {"text_config", "vision_config", "mm_tokens_per_image"} & set(settings)

    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager", dtype="float32"
    )  # not `with_images` itself, whose rotary frequencies are rounded too
    whole, again = load(path).eval(), load(tmp_path).eval()
    assert type(again).__name__ == "Gemma3ForCausalLM"
    assert again.generation_config.eos_token_id == whole.generation_config.eos_token_id == [1, 6]
    ids = np.random.default_rng(0).integers(2, 50, (2, 12))
    with torch.no_grad():
        theirs, exported = (of(input_ids=torch.tensor(ids)).logits.numpy() for of in (whole, again))
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(exported, theirs, atol=1e-5)
    np.testing.assert_allclose(bare_logits(config, params, ids), theirs, atol=1e-4)


def _adapted(config):
    """A decoder's config with adapters, and drawn parameters of it."""
    block = dataclasses.replace(config.block, lora=LoRAConfig(2, 4.0, 0.0, ".*"))
    config = dataclasses.replace(config, block=block)
    _, shapes = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    return config, trees.unflatten({p: rng.normal(size=s.shape).astype(np.float32) for p, s in trees.flatten(shapes).items()})


def test_adapters_of_a_wrapper_name_the_modules_that_transformers_makes(with_images, tmp_path):
    model, path = with_images
    config, params = _adapted(decoder_config(path))
    save_adapter(tmp_path, params, config, str(path), modules_of_llm=modules_at(path))
    from safetensors.numpy import load_file

    modules = dict(model.named_modules())
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {n.removeprefix("base_model.model.").removesuffix(e) for n in load_file(tmp_path / ADAPTER_FILE) for e in ends}
    names = {name for name in names if not name.endswith(".weight")}
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == {name for name in modules if re.fullmatch(targets, name)}  # as peft looks for them
    assert len(names) == 2 * 7 and all(name.startswith("model.language_model.layers.") for name in names)

    read = trees.flatten(load_adapter(tmp_path, params, config))
    assert read and all("/lora/" in name for name in read)
    for name, leaf in read.items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[name])


def test_a_checkpoints_own_settings_are_kept(tmp_path):
    """Those of its weights' function, those of where a text ends, and those that no model reads."""
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "vocab_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": True, "max_position_embeddings": 77, "bos_token_id": 3,
        "eos_token_id": [5, 6], "rope_scaling": {"type": "linear", "factor": 2.0}, "unsloth_version": "1",
    }  # fmt: skip
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings | {"torch_dtype": "bfloat16"}))
    config = decoder_config(tmp_path / "base")
    _, shapes = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    params = trees.unflatten({path: np.ones(leaf.shape, np.float32) for path, leaf in trees.flatten(shapes).items()})
    save_decoder(tmp_path / "out", params, config, like=tmp_path / "base")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == settings | {"dtype": "bfloat16"}
    other = dataclasses.replace(config, num_layers=1, vocab_size=12)
    params["embed"] = np.ones((12, 8), np.float32)
    save_decoder(tmp_path / "other", params, other, like=tmp_path / "base")
    kept = json.loads((tmp_path / "other" / "config.json").read_text())
    assert {key: kept[key] for key in ("eos_token_id", "bos_token_id", "max_position_embeddings", "vocab_size")} == {
        "eos_token_id": [5, 6], "bos_token_id": 3, "max_position_embeddings": 77, "vocab_size": 12,
    }  # fmt: skip


def test_all_files_of_a_tokenizer_go_along(tmp_path):
    names = [
        "chat_template.jinja", "generation_config.json", "own.tiktoken", "spiece.model", "tokenizer.json",
        "tokenizer.model.v3", "tokenizer_config.json", "vocab.bpe",
    ]  # fmt: skip
    for name in [*names, "config.json", "model.safetensors"]:
        (tmp_path / name).write_text("")
    assert [file.name for file in tokenizer_files(tmp_path)] == names
    # What a model directory holds of them, a download of it brings.
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS) for name in names)
