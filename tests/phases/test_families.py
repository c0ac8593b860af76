"""Families of LLMs by every strategy: load -> train a few steps beside a user -> generate -> export -> torch computes the same.

The same by the command, with model directories, is in tests/test_export.py for others.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.config import defaults
from user_llm.config.defaults import STRATEGIES
from user_llm.data.schema import Feature, Schema
from user_llm.models import families
from user_llm.models.decoder import Decoder
from user_llm.models.export import is_bare_llm, load_adapter, save_adapter, save_decoder
from user_llm.models.generate import generate
from user_llm.models.pretrained import decoder_config, family_at, load_decoder
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.phases.contextual_loss import contextual_counts, contextual_loss
from user_llm.training.loop import LoopConfig, initial_state
from user_llm.training.optimizer import OptimizerConfig
from user_llm.training.task import Task

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 50, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
HALF_NEAR = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
FAMILIES = {
    "mistral": {"head_dim": 16, "sliding_window": 3},
    "ministral3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, **HALF_NEAR},
    "olmo3": HALF_NEAR,
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}
BATCH = {
    "events": np.array([[[3], [5], [7], [2]], [[4], [1], [6], [0]]]),
    "lengths": np.array([4, 3]),
    "prefix": np.array([[4], [3]]),
    "text": np.array([[[1, 12, 16, 27, 3]], [[1, 12, 44, 35, 3]]]),
    "text_lengths": np.array([[5], [5]]),
    "answers": np.array([[[1]], [[1]]]),
    "items": np.array([[[5]], [[8]]]),
    "text_weight": {"next_item": np.full(2, 1.0, np.float32)},
}
HOW = {"catalogue": 1.0, "align": 0.5, "chunk": 64, "leading": {"next_item": 1}}


def _config(decoder):
    cross = CrossAttentionConfig(user_width=8, every=1, heads=2, head_dim=4)
    schema, block = (
        Schema((Feature("item", "item", 12),)),
        BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=12),
    )
    return UserLLMConfig(
        decoder=dataclasses.replace(decoder, cross=cross), table_rows=128, item_width=8, num_items=11,
        encoder=UserEncoderConfig(schema=schema, block=block, num_layers=1),
        resampler=ResamplerConfig(num_latents=3, input_width=8, heads=2, head_dim=4, mlp_width=12),
    )  # fmt: skip


def _trained(graphdef, params, strategy, mesh):
    """Return the parameters after three steps of contextualization."""
    task = Task(
        name="user_llm", shapes=params, train_data=None, steps_per_epoch=1.0, work=1.0, count_events=None, evaluate=None, results=None,
        programs=None, load=None, metrics=(), check=None,
        init=lambda place: jax.device_put(params, place(params)),
        loss=lambda params, batch, key, whole: contextual_loss(trees.merge(graphdef, params), batch, key, whole=whole, **HOW),
        counts=contextual_counts,
    )  # fmt: skip
    loop = LoopConfig(**defaults.loop(3, 3, monitor="loss"))
    optimizer = OptimizerConfig(**defaults.optimizer(0.05, warmup_steps=0), trainable=STRATEGIES[strategy]["trainable"])
    with jax.set_mesh(mesh):
        state, step = initial_state(task, loop, optimizer, mesh, seed=0)
        for _ in range(3):
            state, _ = step(state, BATCH)
    return jax.tree.map(jnp.copy, state.params)


@functools.partial(jax.jit, static_argnames="graphdef")
def _user(graphdef, params):
    model = trees.merge(graphdef, params)
    return model.user(model.encode(jnp.asarray(BATCH["events"]), BATCH["prefix"]))


@functools.partial(jax.jit, static_argnames="graphdef")
def _likeliest(graphdef, params, text, user):
    model = trees.merge(graphdef, params)
    hidden = model.hidden(text, jnp.full(len(text), text.shape[1]), user=user)
    return model.decoder.logits(hidden).argmax(-1)


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(request.param, **SIZES | FAMILIES[request.param])
    transformers.AutoModelForCausalLM.from_config(settings).eval().save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
@pytest.mark.parametrize("strategy", ["full", "lora", "enc", "proj"])
def test_a_family_is_contextualized_and_exported(checkpoint, strategy, drawn, mesh_of, bare_logits, tmp_path):
    import torch
    import transformers

    bare = decoder_config(checkpoint, unroll=True)
    lora = LoRAConfig(rank=2, alpha=4.0, dropout=0.0, targets=".*") if STRATEGIES[strategy]["adapters"] else None
    config = _config(dataclasses.replace(bare, block=dataclasses.replace(bare.block, lora=lora)))
    graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(np.array, trees.combine(params, {"decoder": load_decoder(checkpoint, bare)}))
    before = trees.flatten(jax.tree.map(np.copy, params))
    after = _trained(graphdef, params, strategy, mesh_of())
    flat = trees.flatten(after)
    moved = {path for path, leaf in before.items() if not np.array_equal(leaf, flat[path])}
    llm = {path for path in flat if is_bare_llm(path)}
    assert llm & moved == (llm if strategy == "full" else set())
    assert any("/lora/" in path for path in moved) == (strategy == "lora")

    # What it writes for users is what one pass over the whole texts finds likeliest.
    user, prompt = _user(graphdef, after), [1, 12, 16]
    decoder, _ = trees.abstract(lambda: Decoder(config.decoder, rngs=nnx.Rngs(0)))
    written = generate(decoder, after["decoder"], [prompt, prompt], max_tokens=6, user=user.kv).tokens
    text = np.concatenate([[prompt] * 2, written], axis=1)
    np.testing.assert_array_equal(_likeliest(graphdef, after, text, user)[:, 2:-1], written)

    # torch computes the same from what is exported; adapters alone say what the merged weights do.
    save_decoder(tmp_path / "out", after["decoder"], config.decoder, like=checkpoint)
    ids = np.random.default_rng(0).integers(3, 50, (2, 12))
    ours = bare_logits(dataclasses.replace(config.decoder, cross=None), trees.unflatten(
        {path.removeprefix("decoder/"): leaf for path, leaf in flat.items() if path.startswith("decoder/") and "/cross/" not in path}
    ), ids)  # fmt: skip
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    if strategy == "lora":
        family = family_at(checkpoint, families.FAMILIES)
        save_adapter(tmp_path, after["decoder"], config.decoder, str(checkpoint), family)
        again = trees.flatten(load_adapter(tmp_path, after["decoder"], config.decoder, family))
        assert again.keys() == {path.removeprefix("decoder/") for path in flat if "/lora/" in path}
        for path, leaf in again.items():
            np.testing.assert_array_equal(leaf, flat[f"decoder/{path}"])
