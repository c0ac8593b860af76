"""The way of an open LLM: load -> contextualize by each strategy -> generate -> export -> reload here and in torch."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

import user_llm
from user_llm import export, main
from user_llm.common import trees
from user_llm.common.checkpoint import load_params
from user_llm.data.tokenizer import train_bpe
from user_llm.models.export import is_bare_llm
from user_llm.models.pretrained import decoder_config, load_decoder
from user_llm.training import loop

sys.path.insert(0, str(Path(__file__).parent))

from tiny_quickstart import one_device, tiny_config

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "query_pre_attn_scalar": 12},
    "phi3": {"pad_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
}
# Every family and every strategy: what a strategy freezes does not depend on the family.
RUNS = [
    *((family, "full", "") for family in FAMILIES if family != "phi3"),
    ("gemma3_text", "lora", ""), ("phi3", "lora", ""), ("qwen3", "enc", ""), ("llama", "proj", ""), ("qwen3", "lora", "nf4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def write_checkpoint(tmp_path_factory):
    """Return `write(family, half)`: writes a tiny random checkpoint, made by transformers, with a tokenizer, and returns its folder."""
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")

    def write(family, half=False):
        path = tmp_path_factory.mktemp("checkpoints") / family
        vocab = train_bpe(["The next film this user watches:\n"] * 9, 300, path).vocab_size
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, vocab_size=vocab, **SIZES | FAMILIES[family])
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        (model.to(torch.bfloat16) if half else model).save_pretrained(path)
        return path

    return write


def _config():
    config = tiny_config()
    config.phases = ("pretrain_encoder", "pretrain_lm", "user_llm")
    config.user_llm.eval.generate_users = 0
    config.user_llm.injection = "both"
    return config


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A workdir in which the encoder is pretrained."""
    config, workdir = _config(), tmp_path_factory.mktemp("pretrained")
    config.phases = config.phases[:1]
    with one_device():
        main.run(config, epath.Path(workdir))
    (workdir / "config.json").unlink()
    return workdir


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request, write_checkpoint, pretrained, tmp_path_factory):
    """A finished run of a few steps: (checkpoint, strategy, quantize, workdir). What is quantised comes in bfloat16."""
    family, strategy, quantize = request.param
    checkpoint, config = write_checkpoint(family, half=bool(quantize)), _config()
    config.llm.update(checkpoint=str(checkpoint), quantize=quantize)
    config.user_llm.strategy = strategy
    workdir = tmp_path_factory.mktemp("run")
    shutil.copytree(pretrained, workdir, dirs_exist_ok=True)

    def newest_is_best(task, config, state, step, progress, log):
        progress.evaluated_step = progress.best_step = step

    with one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_evaluate", newest_is_best)
        main.run(config, epath.Path(workdir))
        if quantize:  # the same from its last checkpoint
            before = (workdir / "user_llm" / "results.json").read_text()
            shutil.rmtree(workdir / "user_llm" / "params")
            (workdir / "user_llm" / "results.json").unlink()
            main.run(config, epath.Path(workdir))
            assert (workdir / "user_llm" / "results.json").read_text() == before
    assert not (workdir / "pretrain_lm").exists()
    return checkpoint, strategy, quantize, workdir


@pytest.mark.slow
def test_from_checkpoint_to_checkpoint(run, bare_logits, tmp_path):
    import torch
    import transformers

    checkpoint, strategy, quantize, workdir = run
    directory = workdir / "user_llm" / "model"
    model = user_llm.load(directory)
    config, trained = model.predictor.config, model.predictor.params
    ids = np.random.default_rng(0).integers(3, 200, (2, 20))

    # The model directory holds every bit of what was trained.
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), trained)
    jax.tree.map(np.testing.assert_array_equal, load_params(workdir / "user_llm" / "params", like), trained)
    assert (directory / "model.safetensors").exists() == (strategy == "full")
    assert (directory / "adapter_model.safetensors").exists() == (strategy == "lora")

    # What the strategy freezes keeps every bit.
    bare = decoder_config(checkpoint)
    bare = dataclasses.replace(bare, block=dataclasses.replace(bare.block, quantize=quantize))
    before = trees.flatten(load_decoder(checkpoint, bare))
    assert any(path.endswith("/codes") for path in before) == bool(quantize)
    after = trees.flatten(trained["decoder"])
    moved = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert (len(moved) > len(before) / 2) if strategy == "full" else not moved
    assert any("/lora/" in path for path in after) == (strategy == "lora")
    assert all(np.abs(leaf).max() > 0 for path, leaf in after.items() if path.endswith("/b"))

    # And so the LLM forgets nothing, as long as it attends to nobody.
    rows = json.loads((workdir / "results.json").read_text())
    found = {(row["method"], row["metric"]): row["value"] for row in rows if row["task"] == "general_text"}
    assert (found["user_llm", "perplexity"] == found["llm", "perplexity"]) == (strategy in ("enc", "proj"))
    assert found["user_llm", "perplexity/with_user"] != found["user_llm", "perplexity"]

    # torch computes the same from what is exported.
    export.export(directory, tmp_path / "out")
    ours = bare_logits(config.decoder, trained["decoder"], ids)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    base = bare_logits(bare, load_decoder(checkpoint, bare), ids)
    assert (np.abs(ours - base).max() > 1e-4) == (strategy in ("full", "lora"))

    # Settings of the checkpoint are kept.
    kept, came = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", checkpoint))
    assert {key: kept[key] for key in came if key not in ("dtype", "torch_dtype")} == {
        key: value for key, value in came.items() if key not in ("dtype", "torch_dtype")
    }
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (checkpoint / "generation_config.json").read_bytes()

    # We read it back whole: the users that one of both has encoded are answered in the same words by the other.
    again = user_llm.load(tmp_path / "out")
    events = [{"userId": 1, "movieId": n, "rating": 3, "timestamp": 1000 * n} for n in (1, 2, 3)]
    users = [of.encode(events) for of in (model, again)]
    np.testing.assert_allclose(users[0].tokens, users[1].tokens, atol=1e-6)
    texts = [of.generate("The next film", user, max_tokens=12) for of in (model, again) for user in users]
    assert len(set(texts)) == 1
    assert texts[0] != model.generate("The next film", max_tokens=12)

    if strategy == "lora" and not quantize:  # the adapters alone, in peft's layout and by its formula, on the base model
        settings = json.loads((directory / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(checkpoint)
        tensors = load_file(directory / "adapter_model.safetensors")
        reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
        weights = dict(reference.named_parameters())
        scale, adapted = settings["lora_alpha"] / settings["r"], set()
        with torch.no_grad():
            for name in (name for name in tensors if name.endswith("lora_A.weight")):
                target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                weights[target] += scale * torch.tensor(tensors[name.replace("lora_A", "lora_B")] @ tensors[name])
                adapted.add(target.split(".")[-2])
            theirs = reference(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
        assert sorted(adapted) == settings["target_modules"]
    assert {path for path in trees.flatten(trained) if is_bare_llm(path)} == {f"decoder/{path}" for path in before}


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no user_llm\.json: name the directory of a model"):
        export.export(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists: choose another directory"):
        export.export(tmp_path, tmp_path / "out")
