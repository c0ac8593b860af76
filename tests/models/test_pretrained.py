import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from user_llm.common import trees
from user_llm.data.tokenizer import load_tokenizer
from user_llm.models.decoder import Decoder
from user_llm.models.generate import generate
from user_llm.models.pretrained import decoder_config, load_decoder
from user_llm.nn.attention import causal_mask
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


def _logits(config, params, ids):
    ids = jnp.asarray(ids)
    graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))

    @jax.jit
    def run(params):
        decoder = trees.merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden, _ = decoder(decoder.embed_tokens(ids), mask=causal_mask(jnp.ones(ids.shape, bool)), positions=positions)
        return decoder.logits(hidden)

    return np.asarray(run(params))


# --- against torch ---


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10_000.0, "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"rope_theta": 500_000.0, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"rope_theta": 100.0, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
        {"rope_theta": 1_000_000.0, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
    ],
    ids=["tied", "grouped-untied", "wide-head-tied", "gelu"],
)
def test_logits_equal_torch_on_random_models(tmp_path, changes):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")
    changes = dict(changes)
    rope = {"rope_type": "default", "rope_theta": changes.pop("rope_theta")}
    settings = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50,
        max_position_embeddings=64, rope_parameters=rope, attn_implementation="eager", **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.15)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")  # several files and their index
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    ids = np.random.default_rng(1).integers(0, 50, (2, 40))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    config = decoder_config(tmp_path)
    assert config.block.rope_theta == rope["rope_theta"]
    np.testing.assert_allclose(_logits(config, load_decoder(tmp_path, config), ids), expected, atol=1e-4)


def test_stories260k_equals_torch(models_dir):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")
    path = models_dir / "stories260K"
    ids = np.random.default_rng(0).integers(0, 512, (2, 100))
    reference = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    config = decoder_config(path)
    np.testing.assert_allclose(_logits(config, load_decoder(path, config), ids), expected, atol=1e-4)


def test_stories260k_continues_once_upon_a_time(models_dir):
    path = models_dir / "stories260K"
    config, tokenizer = decoder_config(path, unroll=True), load_tokenizer(path)
    graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    prompt = np.array([[tokenizer.bos_id, *tokenizer.encode("Once upon a time")]])
    params, lengths = load_decoder(path, config), np.array([prompt.shape[1]])
    tokens = generate(graphdef, params, prompt, lengths, max_tokens=60, eos_id=tokenizer.eos_id)
    text = tokenizer.decode([*prompt[0].tolist(), *tokens[0].tolist()])
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


def test_an_output_table_in_a_tied_checkpoint_is_left_over(checkpoint):
    path = checkpoint({"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="left over lm_head.weight"):
        load_decoder(path, decoder_config(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "'attention_bias' = True is not supported"),
        ({"mlp_bias": True}, "'mlp_bias'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'rope_scaling' of type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling' of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'rope_parameters' of type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "'partial_rotary_factor'"),
        ({"sliding_window": 128}, "'sliding_window' = 128"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"hidden_act": "swish2"}, "hidden_act 'swish2'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only 'llama'"),
    ],
)
def test_unsupported_settings_are_refused_by_name(checkpoint, settings, message):
    path = checkpoint(settings)
    with pytest.raises(ValueError, match="config.json") as error:
        decoder_config(path)
    assert message in str(error.value)


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
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        decoder_config(path)
    incomplete = {name: value for name, value in TINY.items() if name != "hidden_size"}
    (path / "config.json").write_text(json.dumps(incomplete))
    with pytest.raises(ValueError, match="the setting 'hidden_size' is missing"):
        decoder_config(path)
