"""Checkpoints in two bytes and in codes: what is loaded, on one device and on eight, and what a decoder computes with it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.config.defaults import SHARDING
from user_llm.models.decoder import Decoder
from user_llm.models.export import save_decoder
from user_llm.models.pretrained import decoder_config, in_stored_types, load_decoder
from user_llm.nn.stored import quantize, restored

SETTINGS = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
IDS = np.random.default_rng(1).integers(0, 24, (2, 7))


@pytest.fixture
def checkpoint(tmp_path):
    """Return `write(**types)`: a checkpoint in bfloat16, but for the tensors whose names end as the keys do, and its config."""

    def write(**types):
        shapes = {"model.embed_tokens": (24, 16), "lm_head": (24, 16), "model.norm": (16,)}
        for i in range(2):
            layer = {
                "input_layernorm": (16,), "post_attention_layernorm": (16,), "self_attn.q_proj": (32, 16),
                "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16), "self_attn.o_proj": (16, 32),
                "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32),
            }  # fmt: skip
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        rng = np.random.default_rng(0)
        dtype = lambda name: next((of for end, of in types.items() if name.endswith(end)), ml_dtypes.bfloat16)  # noqa: E731
        tensors = {f"{name}.weight": (rng.normal(size=of) / 4).astype(dtype(name)) for name, of in shapes.items()}
        (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path, decoder_config(tmp_path)

    return write


def _like(path, config, mesh):
    shapes = in_stored_types(path, trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))[1], config)
    return meshes.placed(shapes, meshes.shardings(SHARDING, shapes, mesh))


def _quantized(config, kind):
    return dataclasses.replace(config, block=dataclasses.replace(config.block, quantize=kind))


def test_matrices_stay_in_the_checkpoints_type_and_all_else_is_float32(checkpoint, mesh_of, bare_logits, tmp_path):
    path, config = checkpoint(up_proj=np.float16, v_proj=np.float32, **{"layers.1.self_attn.k_proj": np.float32})
    kept = load_decoder(path, config, like=_like(path, config, mesh_of()))
    types = {name: leaf.dtype for name, leaf in trees.flatten(kept).items()}
    floats = {
        name for name in types if name.endswith(("scale", "attn/v", "attn/k"))
    }  # of attn/k, one layer's alone has 2 bytes
    assert types == {
        name: np.float32 if name in floats else np.float16 if name.endswith("up") else jnp.bfloat16 for name in types
    }
    whole = load_decoder(path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), kept, whole)
    np.testing.assert_allclose(bare_logits(config, kept, IDS), bare_logits(config, whole, IDS), atol=1e-5)
    save_decoder(tmp_path / "out", kept, config)  # of several types, none of which holds the numbers of the others
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_layers_are_quantised_while_they_load_on_one_device_as_on_eight(checkpoint, mesh_of, bare_logits, tmp_path, kind):
    path, config = checkpoint()
    whole, coded = trees.flatten(load_decoder(path, config)), _quantized(config, kind)
    found = load_decoder(path, coded, like=_like(path, coded, mesh_of()))
    flat = trees.flatten(found)
    for weight in ("attn/q", "attn/o", "mlp/down"):
        codes, scale = quantize(whole[f"stack/blocks/{weight}"], kind, axis=2 if weight == "attn/o" else 1)
        np.testing.assert_array_equal(flat[f"stack/blocks/{weight}/codes"], codes)
        np.testing.assert_array_equal(flat[f"stack/blocks/{weight}/scale"], scale)
    assert {name for name in flat if name not in whole} == {
        f"stack/blocks/{weight}/{part}"
        for weight in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate_proj", "mlp/up", "mlp/down")
        for part in ("codes", "scale")
    }
    numbers = restored(found, kind, jnp.float32)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(numbers))  # on no device, which might have no room
    np.testing.assert_allclose(bare_logits(coded, found, IDS), bare_logits(config, numbers, IDS), atol=1e-5)
    save_decoder(tmp_path / "out", jax.device_get(found), coded, like=path)  # as plain numbers, which no program must decode
    written = load_decoder(tmp_path / "out", decoder_config(tmp_path / "out"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), written, numbers)
    spread = load_decoder(path, coded, like=_like(path, coded, mesh_of(data=2, fsdp=2, tensor=2)))
    codes = spread["stack"]["blocks"]["mlp"]["up"]["codes"]
    assert codes.addressable_shards[0].data.size == codes.size // 4
    jax.tree.map(np.testing.assert_array_equal, spread, found)
    np.testing.assert_allclose(bare_logits(coded, spread, IDS), bare_logits(coded, found, IDS), atol=1e-5)
