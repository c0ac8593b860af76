import dataclasses
import functools
import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.data.tokenizer import load_tokenizer
from user_llm.models import config_json
from user_llm.models.config_json import config_from_settings, settings_from_config
from user_llm.models.decoder import Decoder
from user_llm.models.families import FAMILIES, table
from user_llm.models.generate import generate
from user_llm.models.pretrained import check_weights, decoder_config, find_checkpoint, load_decoder
from user_llm.nn.cross_attention import CrossAttentionConfig

TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 10,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip


def _tensors(dtype=np.float32):
    """Random weights of the tiny model, by their names in a checkpoint."""
    shapes = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), "lm_head.weight": (10, 8)}
    for i in range(2):
        layer = {
            "input_layernorm": (8,), "post_attention_layernorm": (8,), "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path):
    """Return `write(settings, tensors)`: a checkpoint directory of the tiny model, changed as asked."""

    def write(settings=None, tensors=None):
        (tmp_path / "config.json").write_text(json.dumps({**TINY, **(settings or {})}))
        save_file(_tensors() if tensors is None else tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


# --- against torch ---

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
GEMMA = {
    "num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
}  # fmt: skip
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
}
GEMMA3 = {name: value for name, value in TINY.items() if name != "hidden_act"} | {"model_type": "gemma3_text"}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MINISTRAL = {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3}
LONG = {"rope_type": "longrope", "rope_theta": 1000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2.5],
        "long_factor": [2.0, 4.0, 8.0]}  # fmt: skip
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0}
EXPERTS = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "intermediate_size": 48}
REFERENCES = {
    "llama-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-grouped": ("llama", {"rope_parameters": ROPE | {"rope_theta": 500_000.0}, "tie_word_embeddings": False}),
    "llama-wide-head": ("llama", {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": ROPE | {"rope_theta": 100.0}}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "llama3-scaling": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE | {"rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": ROPE | {"rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen3-untied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", GEMMA | {"rope_parameters": GEMMA_ROPE}),
    "gemma3-defaults": ("gemma3_text", {"num_hidden_layers": 7, "head_dim": 8, "sliding_window": 3}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 5}),
    "ministral3": (
        "ministral3",
        {"head_dim": 16, "sliding_window": None, "tie_word_embeddings": True, "rope_parameters": YARN | MINISTRAL},
    ),
    "olmo2": ("olmo2", {"rope_parameters": ROPE | {"rope_theta": 500_000.0}}),
    "olmo3": ("olmo3", {"num_hidden_layers": 5, "sliding_window": 5, "rope_scaling": YARN | {"attention_factor": 1.3}}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "rope_parameters": ROPE | {"rope_theta": 500.0}}),
    "phi3": ("phi3", {"sliding_window": 7, "tie_word_embeddings": False}),
    "phi4-mini": (
        "phi3",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "rope_parameters": LONG,
        },
    ),
    "granite": ("granite", GRANITE | {"tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3-moe-not-normalised": ("qwen3_moe", EXPERTS | {"norm_topk_prob": False, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=list(REFERENCES))
def reference(request, tmp_path_factory):
    """A tiny random torch model of every family and branch, and its checkpoint in several files."""
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")
    family, changes = REFERENCES[request.param]
    settings = transformers.AutoConfig.for_model(family, **SIZES | changes)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name and "gemma" not in family else 0.0, 0.15)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return torch, model, path


def test_logits_equal_torch_on_random_models_of_every_family(reference, bare_logits):
    torch, model, path = reference
    ids = np.random.default_rng(1).integers(0, 50, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    config = decoder_config(path)
    logits = bare_logits(config, load_decoder(path, config), ids)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_config_said_in_a_familys_settings_reads_back_the_same(reference):
    _, _, path = reference
    config = decoder_config(path)
    said = settings_from_config(config)
    assert config_from_settings(said, "what was said") == config
    # The models of transformers of these families ignore windows.
    assert not any(config.windowed) or said["model_type"] not in ("llama", "granite", "olmo2", "qwen3_moe")


@pytest.mark.slow
def test_greedy_continuations_are_torchs_token_for_token(reference):
    """64 tokens from prompts of two lengths, so that caches, windows and left-over padding all matter."""
    torch, model, path = reference
    config = decoder_config(path, unroll=True)
    graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    prompts = [np.random.default_rng(2).integers(3, 50, length).tolist() for length in (9, 4)]
    ours = generate(graphdef, load_decoder(path, config), prompts, max_tokens=64)
    for row, tokens in enumerate(prompts):
        prompt = torch.tensor([tokens])
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        np.testing.assert_array_equal(ours.tokens[row], theirs[0, len(tokens) :].numpy())


def test_stories260k_equals_torch(models_dir, bare_logits):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")
    path = models_dir / "stories260K"
    ids = np.random.default_rng(0).integers(0, 512, (2, 100))
    reference = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    config = decoder_config(path)
    np.testing.assert_allclose(bare_logits(config, load_decoder(path, config), ids), expected, atol=1e-4)


def test_stories260k_continues_once_upon_a_time(models_dir):
    path = models_dir / "stories260K"
    config, tokenizer = decoder_config(path, unroll=True), load_tokenizer(path)
    graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    prompt = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    written = generate(graphdef, load_decoder(path, config), [prompt], max_tokens=60, stop_ids=tokenizer.stop_ids)
    text = tokenizer.decode([*prompt, *written.rows()[0]])
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


# --- what a checkpoint may hold ---


def test_parameters_have_the_tree_of_the_decoder_without_its_user_side(checkpoint):
    path = checkpoint()
    config = decoder_config(path, cross=CrossAttentionConfig(user_width=4, every=1, heads=1, head_dim=4))
    params = trees.flatten(load_decoder(path, config))
    _, shapes = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    expected = {k: v.shape for k, v in trees.flatten(shapes).items() if not k.startswith("stack/cross/")}
    assert {k: v.shape for k, v in params.items()} == expected
    tensors = _tensors()
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(params["stack/blocks/attn/q"][1][:, 1, 2], q[4 * 1 + 2])


def test_every_parameter_goes_straight_into_its_sharding(checkpoint, mesh_of):
    path = checkpoint(tensors=_tensors(ml_dtypes.bfloat16))
    config = decoder_config(path)
    whole = load_decoder(path, config)
    _, shapes = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    rules = (
        (r"attn/(q|k|v)$", ("fsdp", "tensor", None)),
        (r"mlp/down$", ("tensor", "fsdp")),
        (r"embed$", ("tensor", "fsdp")),
        (r".*", ()),
    )
    where = meshes.shardings(rules, shapes, mesh_of(data=2, fsdp=2, tensor=2))
    spread = trees.flatten(load_decoder(path, config, like=meshes.placed(shapes, where)))
    assert spread["stack/blocks/mlp/down"].addressable_shards[0].data.shape == (2, 6, 4)
    for name, value in trees.flatten(whole).items():
        np.testing.assert_array_equal(spread[name], value)
        assert spread[name].sharding == trees.flatten(where)[name]


def test_the_language_model_of_a_gemma_3_with_images(tmp_path):
    """Its settings are a part of the config, its tensors have another prefix, and the image side is left out."""
    text = {"model_type": "gemma3_text", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 10,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 4}  # fmt: skip
    settings = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "mm_tokens_per_image": 256}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = decoder_config(tmp_path)
    rng = np.random.default_rng(0)
    tensors = {f"language_model.model.{t.name}": rng.normal(size=t.theirs).astype(np.float32) for t in table(config)}
    images = {"vision_tower.x.weight": np.ones(3, np.float32), "multi_modal_projector.y": np.ones(2, np.float32)}
    save_file(tensors | images, tmp_path / "model.safetensors")
    params = load_decoder(tmp_path, config)
    np.testing.assert_array_equal(params["embed"], tensors["language_model.model.embed_tokens.weight"])
    assert config.windowed == (True, True) and config.embed_scale == 8**0.5


MEASURE = """
import resource, sys, jax
from user_llm.models.pretrained import decoder_config, load_decoder
config = decoder_config(sys.argv[1])
jax.numpy.zeros(8).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = jax.block_until_ready(load_decoder(sys.argv[1], config, dtype="bfloat16"))
print(before, peak(), sum(leaf.nbytes for leaf in jax.tree.leaves(params)), params["embed"].nbytes)
"""


@pytest.mark.slow
def test_loading_holds_two_tensors_besides_the_parameters(tmp_path):
    """A random bfloat16 checkpoint of 0.4 GB whose largest tensor is 131 MB."""
    settings = TINY | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 64_000,
                       "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = decoder_config(tmp_path)
    one = np.random.default_rng(0).normal(size=64_000 * 1024).astype(ml_dtypes.bfloat16)
    tensors = {f"model.{t.name}": one[: math.prod(t.theirs)].reshape(t.theirs) for t in table(config)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 0.39e9
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    before, peak, held, largest = map(int, run.stdout.split())
    compiler = 60e6  # what compiling and the file's pages of the moment take
    assert peak - before < held + 2 * largest + compiler, (before, peak, held, largest)


# --- where a checkpoint is found ---


def test_a_directory_is_taken_as_it_is_and_anything_else_must_be_a_models_name(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path
    for name in (tmp_path / "nowhere", "nowhere", "./a/b", "a/b/c"):
        with pytest.raises(ValueError, match="No checkpoint at"):
            find_checkpoint(name)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_and_widened(checkpoint, dtype):
    path = checkpoint(tensors=_tensors(dtype))
    params = load_decoder(path, decoder_config(path))
    expected = _tensors(dtype)["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed"], expected)
    assert load_decoder(path, decoder_config(path), dtype=dtype)["embed"].dtype == dtype


def test_stored_rotary_frequencies_are_known_to_be_redundant(checkpoint):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    path = checkpoint(tensors=_tensors() | extra)
    load_decoder(path, decoder_config(path))


def test_overrides_replace_fields(checkpoint):
    config = decoder_config(checkpoint(), unroll=True)
    assert config == dataclasses.replace(decoder_config(checkpoint()), unroll=True)
    assert (config.block.kv_heads, config.block.head_dim, config.block.rope_theta) == (1, 4, 10_000.0)


# --- what is refused ---


def test_missing_left_over_and_wrong_shaped_tensors_are_all_named(checkpoint):
    tensors = _tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    path = checkpoint(tensors=tensors)
    with pytest.raises(ValueError) as error:
        load_decoder(path, decoder_config(path))
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "left over model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight is [9] and not [8]",
    ):
        assert part in str(error.value)


def test_weights_are_checked_without_reading_any(checkpoint, monkeypatch):
    monkeypatch.setattr("user_llm.models.pretrained._read_tensor", lambda *_: pytest.fail("a tensor was read"))
    path = checkpoint()
    check_weights(path)
    wrong = _tensors() | {"model.norm.weight": np.ones(9, np.float32)}
    checkpoint(tensors=wrong)
    with pytest.raises(ValueError, match=r"do not fit the config: model\.norm\.weight is \[9\] and not \[8\]"):
        check_weights(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="No weights at"):
        check_weights(path)


def test_an_output_table_in_a_tied_checkpoint_must_be_the_embeddings(checkpoint):
    path = checkpoint({"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="tied, but lm_head.weight differs"):
        load_decoder(path, decoder_config(path))
    tensors = _tensors()
    path = checkpoint({"tie_word_embeddings": True}, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert "head" not in load_decoder(path, decoder_config(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "'attention_bias' = True is not supported"),
        ({"mlp_bias": True}, "'mlp_bias'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of type 'dynamic' are not supported",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "'partial_rotary_factor'"),
        ({"sliding_window": 128}, "'sliding_window' = 128"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, "models of this family ignore"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]}, "'layer_types' is not supported"),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "'layer_types' is not"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 2]},
            "'no_rope_layers' = [1, 2] is not supported: a 0 or 1 for each layer",
        ),
        (
            {"model_type": "gemma2", "sliding_window": None},
            "'sliding_window' is missing, and 'layer_types' has layers with one",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "layers without experts among those with them"),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5},
            "'num_experts_per_tok' = 5 is above the number",
        ),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, "'attn_logit_softcapping' is no positive number"),
        ({"rope_parameters": YARN | {"beta_fast": 0.5}}, "'rope_theta' is not above 1, or 'beta_fast' not above 'beta_slow'"),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "'rope_theta' is not above 1, or 'beta_fast'"),
        ({"rope_parameters": LONG | {"original_max_position_embeddings": 16}}, "'partial_rotary_factor' of longrope"),
        ({"model_type": "qwen3", "attention_bias": True}, "'attention_bias' = True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' = 50.0"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "'final_logit_softcapping' = 30.0"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "'use_bidirectional_attention' = True"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "gemma3_text", "rope_local_base_freq": 0}, "'rope_theta' is no positive number"),
        ({"model_type": "gemma3", "text_config": None}, "'text_config' is no object"),
        (
            {
                "model_type": "gemma3",
                "text_config": GEMMA3,
                "quantization_config": {"quant_method": "gptq"},
            },
            "names the method 'gptq', which is not supported: bring",
        ),
        ({"rope_theta": 1e-40}, "'rope_theta' = 1e-40 are not supported, only with 1 or more"),
        ({"is_causal": False}, "'is_causal' = False"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, "'auto_map' = "),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' = 30.0"),  # of another family of ours
        ({"logit_scale": 0.5}, "'logit_scale' = 0.5"),  # of none
        ({"rms_norm_eps": 2.0}, "'rms_norm_eps' = 2.0 is not below 1"),
        ({"head_dim": 3}, "2 heads of 3 numbers"),
        ({"rope_theta": -1.0}, "'rope_theta' is no positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "'factor' is no number of at least 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type 'dynamic' are not supported"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "'high_freq_factor' is not above 'low_freq_factor'"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' = {'bits': 4}"),
        ({"quantization_config": {"quant_method": "gptq"}}, "names the method 'gptq', which is not supported: bring"),
        ({"quantization_config": {"quant_method": "awq"}}, "bring the checkpoint in bfloat16 that it was made from"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "call `model.dequantize()`"),
        ({"hidden_act": "swish2"}, "the activation 'swish2' is not supported"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only llama, qwen2, qwen3, qwen3_moe, gemma2"),
    ],
)
def test_unsupported_settings_are_refused_by_name(checkpoint, settings, message):
    path = checkpoint(settings)
    with pytest.raises(ValueError, match="config.json") as error:
        decoder_config(path)
    assert message in str(error.value)


def test_what_config_classes_declare_is_found_where_they_are_no_dataclasses(monkeypatch):
    class Base:
        def __init__(self, use_cache=True, **kwargs):
            pass

    class Older(Base):
        def __init__(self, hidden_size=1, **kwargs):
            pass

    monkeypatch.setattr("transformers.CONFIG_MAPPING", dict.fromkeys(FAMILIES, Older))
    assert config_json._declared.__wrapped__() == {"use_cache", "hidden_size"}


def test_scaled_rotary_positions_of_a_family_of_ones_own_need_their_factor():
    own = {"llama": dataclasses.replace(FAMILIES["llama"], defaults={})}
    rope = {"rope_type": "linear", "rope_theta": 1e4}
    assert config_from_settings(TINY | {"rope_parameters": rope | {"factor": 2.0}}, "", own).block.rope_scaling.factor == 2
    with pytest.raises(ValueError, match=r"^config\.json: the setting 'factor' of linear rotary positions is missing\."):
        config_from_settings(TINY | {"rope_parameters": rope}, "config.json", own)


def test_settings_that_no_model_reads_are_ignored_and_a_line_says_so(checkpoint, caplog):
    plain = decoder_config(checkpoint())
    extra = {
        "unsloth_version": "2025.9", "unsloth_fixed": True, "_attn_implementation_autoset": True, "_unsloth": {"a": 1},
        "max_sequence_length": 2048, "tokenizer_class": "LlamaTokenizer", "neftune_noise_alpha": 5, "temperature": 0.7, "torch_dtype": "auto",
        "bos_token_id": [1, 2], "pad_token_id": -1, "attention_dropout": 0.1,
    }  # fmt: skip
    for whole in ({"bits": 16}, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}):
        with caplog.at_level("INFO", logger="absl"):
            assert decoder_config(checkpoint(extra | {"quantization_config": whole})) == plain
    lines = [line for line in caplog.messages if "no model reads" in line]
    assert (
        len(lines) == 1
        and "config.json" in lines[0]
        and "max_sequence_length, neftune_noise_alpha, tokenizer_class" in lines[0]
    )


def test_null_says_that_there_is_no_window_and_no_cap(checkpoint):
    assert decoder_config(checkpoint({"model_type": "mistral", "sliding_window": None})).windowed == ()
    assert decoder_config(checkpoint({"model_type": "mistral"})).block.window == 4096  # the family's default
    gemma2, caps = GEMMA3 | {"model_type": "gemma2"}, {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    for settings, expected in ((gemma2, (50.0, 30.0)), (gemma2 | caps, (None, None))):
        config = config_from_settings(settings, "config.json")
        assert (config.block.attn_softcap, config.logit_softcap) == expected


def test_an_older_spelling_of_scaled_rotary_positions_is_read(checkpoint):
    older = decoder_config(checkpoint({"rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert older == decoder_config(checkpoint({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    assert older.block.rope_scaling.factor == 2.0


def test_tensors_that_are_no_weights_are_refused_by_name(checkpoint):
    q = "model.layers.0.self_attn.q_proj."
    one = np.ones((8, 8), np.float32)
    bad = one.copy()
    bad[3, 4] = np.nan
    without = {name: tensor for name, tensor in _tensors().items() if name != f"{q}weight"}
    for extra, message in (
        (
            {f"{q}weight": one.astype(ml_dtypes.float8_e4m3fn)},
            r"is of type F8_E4M3, and only .* bring the checkpoint in bfloat16",
        ),
        ({f"{q}weight": one.astype(np.int8)}, "q_proj.weight is of type I8, and only"),
        ({f"{q}weight": one.astype(bool)}, "q_proj.weight is of type BOOL, and only"),
        ({f"{q}weight": bad}, "q_proj.weight holds NaN or an infinity"),
        ({f"{q}qweight": one.astype(np.int32)}, r"q_proj.qweight belongs to quantised weights \(GPTQ or AWQ\): bring"),
        ({f"{q}weight": one, f"{q}weight.absmax": one[0]}, r"absmax belongs to quantised weights \(bitsandbytes\)"),
        ({f"{q}weight": one, f"{q}weight_scale_inv": one}, "weight_scale_inv belongs to quantised weights"),
        ({f"{q}weight": one, f"{q}lora_A.default.weight": one}, "belongs to adapters that are not merged"),
    ):
        path = checkpoint(tensors=without | extra)
        with pytest.raises(ValueError, match=message):
            load_decoder(path, decoder_config(path))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"language_model.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.", "model.language_model.") if name != "lm_head.weight" else name,
        lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn").replace("mlp.", "_orig_mod.mlp."),
    ],
    ids=["compiled", "ddp", "peft", "wrapper", "without-head", "newer-wrapper", "inside"],
)
def test_tensors_are_found_whatever_stands_in_their_names(checkpoint, rename):
    plain = checkpoint()
    expected = trees.flatten(load_decoder(plain, decoder_config(plain)))
    path = checkpoint(tensors={rename(name): tensor for name, tensor in _tensors().items()})
    found = trees.flatten(load_decoder(path, decoder_config(path)))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_two_tensors_of_one_name_are_refused(checkpoint):
    tensors = _tensors()
    embed = "model.embed_tokens.weight"
    path = checkpoint(tensors=tensors | {f"_orig_mod.{embed}": tensors[embed]})
    with pytest.raises(ValueError, match="is the same tensor as"):
        load_decoder(path, decoder_config(path))
    path = checkpoint(tensors=tensors | {"draft.embed_tokens.weight": tensors[embed]})
    with pytest.raises(ValueError, match=r"both .* and .* may be embed_tokens\.weight"):
        load_decoder(path, decoder_config(path))


@pytest.mark.parametrize("prefix", ["", "base_model."])
def test_a_name_of_a_family_of_ones_own_may_end_another(checkpoint, prefix):
    """The output table's name is the end of a layer's; only what stands outside of the layers can be the table."""
    plain = checkpoint()
    expected = trees.flatten(load_decoder(plain, decoder_config(plain)))
    own = dataclasses.replace(FAMILIES["llama"], names={"head": "output.weight", "attn/o": "attention.output.weight"})
    renamed = {"lm_head": "output", "self_attn.o_proj": "attention.output"}
    path = checkpoint(
        tensors={
            prefix + functools.reduce(lambda name, pair: name.replace(*pair), renamed.items(), name): tensor
            for name, tensor in _tensors().items()
        }
    )
    found = trees.flatten(load_decoder(path, decoder_config(path), families={"llama": own}))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_unreadable_files_are_refused_by_name(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        decoder_config(tmp_path / "nowhere")
    path = checkpoint()
    config = decoder_config(path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        load_decoder(path, config)
    weights.unlink()
    with pytest.raises(ValueError, match="No weights at"):
        load_decoder(path, config)
    (path / "config.json").write_text('{"model_type":\n"llama"')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        decoder_config(path)
    incomplete = {name: value for name, value in TINY.items() if name != "hidden_size"}
    (path / "config.json").write_text(json.dumps(incomplete))
    with pytest.raises(ValueError, match="no 'hidden_size'; get the checkpoint again"):
        decoder_config(path)


def test_a_decoder_of_no_family_is_not_exported(checkpoint):
    config = decoder_config(checkpoint())
    gated = dataclasses.replace(config, block=dataclasses.replace(config.block, residual_gate=True))
    with pytest.raises(ValueError, match="No family of llama, qwen2, .*, granite describes this decoder"):
        settings_from_config(gated)
