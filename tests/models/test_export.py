"""What is exported stays what it was: settings, stops, files; and adapters fit the modules that transformers makes."""

import dataclasses
import fnmatch
import functools
import json
import re

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from user_llm.common import trees
from user_llm.data.tokenizer import load_tokenizer, train_bpe
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


def test_adapters_of_a_wrapper_do_in_its_modules_what_they_do_here(with_images, tmp_path, bare_logits):
    """By peft's formula: each module that is named adds scale B A to its weight."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, path = with_images
    bare = decoder_config(path)
    config, drawn = _adapted(bare)
    adapters = {name: leaf / 4 for name, leaf in trees.flatten(drawn).items() if "/lora/" in name}
    params = trees.combine(load_decoder(path, bare), trees.unflatten(adapters))
    save_adapter(tmp_path, params, config, str(path), modules_of_llm=modules_at(path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors, begin, end = load_file(tmp_path / ADAPTER_FILE), "base_model.model.", ".lora_A.weight"

    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype="float32").eval()
    modules, ids = dict(model.named_modules()), np.random.default_rng(0).integers(2, 50, (2, 12))
    with torch.no_grad():
        before = model(input_ids=torch.tensor(ids)).logits.numpy()
        for name in (name for name in tensors if name.endswith(end)):
            product = torch.tensor(tensors[name.replace("lora_A", "lora_B")] @ tensors[name])
            modules[name.removeprefix(begin).removesuffix(end)].weight += settings["lora_alpha"] / settings["r"] * product
        after = model(input_ids=torch.tensor(ids)).logits.numpy()
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after, bare_logits(config, params, ids), atol=1e-4)


@pytest.mark.parametrize("said_by", ["generation_config.json", "config.json"])
def test_transformers_ends_a_text_of_what_is_exported_where_it_did_before(tmp_path, said_by):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    base, out = tmp_path / "base", tmp_path / "out"
    vocab = train_bpe(["a line\n"] * 9, 280, base).vocab_size
    torch.manual_seed(0)
    sizes = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=vocab, **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.5)

    def written(model):
        return model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()

    model.generation_config.eos_token_id = None
    endless = written(model)
    stop = endless[7]
    model.config.eos_token_id = model.generation_config.eos_token_id = [vocab - 1, stop]
    model.save_pretrained(base)
    if said_by == "config.json":
        (base / "generation_config.json").unlink()
    else:
        settings = json.loads((base / "config.json").read_text()) | {"eos_token_id": 1}
        (base / "config.json").write_text(json.dumps(settings))
    config = decoder_config(base)
    save_decoder(out, load_decoder(base, config), config, like=base)
    for file in tokenizer_files(base):
        (out / file.name).write_bytes(file.read_bytes())
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert written(load(out)) == written(load(base)) == endless[: endless.index(stop, 3) + 1]
    assert load_tokenizer(out).stop_ids == load_tokenizer(base).stop_ids == (vocab - 1, stop)


def test_a_checkpoints_own_settings_are_kept(tmp_path):
    """Those of its weights' function, those of where a text ends, and those that no model reads."""
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "vocab_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": True, "max_position_embeddings": 77, "bos_token_id": [3, 4],
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
        "eos_token_id": [5, 6], "bos_token_id": [3, 4], "max_position_embeddings": 77, "vocab_size": 12,
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
