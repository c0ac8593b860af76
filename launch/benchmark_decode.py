"""Decoding speed, side by side with transformers' `generate` and its cache, on the same random Llama of 60M parameters.

    pip install torch==2.13.0
    python launch/benchmark_decode.py
    python launch/benchmark_decode.py --preset=gpu --out=decode.json    # ours alone: Qwen3 0.6B's shape in bfloat16, batch 1 and 32

Greedy, prompts of 32 tokens, 128 tokens written, batch 1 and 8, float32. Each side runs in a process of its own, turn by turn, and is
timed on its second call. Prints one JSON object: tokens per second of each, medians over the rounds, and their ratio; and how many
times longer a step takes when the K/V of users with 200 events (encoder of width 128 with 2 layers, 16 user tokens,
cross-attention in every 2nd layer) are not kept from the first step but computed again.

`--preset=gpu`, and `tiny`, which shows that it runs, time ours alone, each row attending to a user. `bandwidth` is the share of the memory's peak that reading
all weights and the filled part of the cache once a token takes; it is left out where the peak is not known.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import turns

HERE = pathlib.Path(__file__).parent
SETTINGS = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 14, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, WRITTEN, BATCHES, EVENTS = 32, 128, (1, 8), 200
# Bytes a second of a device's memory by its own name: NVIDIA's data sheets of the H100 SXM, H200 SXM and A100 SXM.
BANDWIDTH = {
    "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12, "NVIDIA A100-SXM4-40GB": 1.555e12, "NVIDIA A100-SXM4-80GB": 2.039e12,
}  # fmt: skip


def prompts(batch: int) -> list[list[int]]:
    """Return the same random prompts for both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(5, 32_000, (batch, PROMPT)).tolist()


def timed(call) -> float:
    """Return the seconds of the second call."""
    call()
    start = time.monotonic()
    call()
    return time.monotonic() - start


def torch_side(path: str) -> dict:
    """Time the torch reference."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    rates = {}
    for batch in BATCHES:
        ids = torch.tensor(prompts(batch))
        options = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            seconds = timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))  # noqa: B023
        rates[f"batch_{batch}"] = batch * WRITTEN / seconds
    return rates


def our_side(path: str) -> dict:
    """Time ours."""
    sys.path.insert(0, str(HERE.parent))
    from flax import nnx

    from user_llm.common import trees
    from user_llm.models.decoder import Decoder
    from user_llm.models.generate import generate
    from user_llm.models.pretrained import decoder_config, load_decoder

    config = decoder_config(path, unroll=True)
    graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    params = load_decoder(path, config)
    measured = {}
    for batch in BATCHES:
        seconds = timed(lambda: generate(graphdef, params, prompts(batch), max_tokens=WRITTEN))  # noqa: B023
        measured[f"batch_{batch}"] = batch * WRITTEN / seconds
        measured[f"user_recomputed/batch_{batch}"] = recomputed(path, batch)
    return measured


def recomputed(path: str, batch: int) -> float:
    """Return the seconds of a decoding step with its users' K/V computed anew over those with the K/V kept."""
    import jax
    import numpy as np
    from flax import nnx

    from user_llm.common import trees
    from user_llm.data.schema import Feature, Schema
    from user_llm.models.generate import generate
    from user_llm.models.pretrained import decoder_config
    from user_llm.models.user_encoder import UserEncoderConfig
    from user_llm.models.user_llm import UserLLM, UserLLMConfig
    from user_llm.nn.cross_attention import CrossAttentionConfig
    from user_llm.nn.resampler import ResamplerConfig
    from user_llm.nn.transformer import BlockConfig

    width, items = 128, 10_000
    config = UserLLMConfig(
        decoder=decoder_config(path, cross=CrossAttentionConfig(width, every=2, heads=8, head_dim=64), unroll=True),
        table_rows=10_112, item_width=width, num_items=items,
        encoder=UserEncoderConfig(
            schema=Schema((Feature("item", "item", items + 1),)),
            block=BlockConfig(width, heads=2, kv_heads=2, head_dim=64, mlp_width=344),
            num_layers=2, unroll=True,
        ),
        resampler=ResamplerConfig(input_width=width, num_latents=16, num_layers=1, heads=2, head_dim=64, mlp_width=344),
    )  # fmt: skip
    model = UserLLM(config, rngs=nnx.Rngs(params=0))
    (graphdef, params), (decoder, weights) = trees.split(model), trees.split(model.decoder)

    @jax.jit
    def user_kv(events, lengths):
        model = trees.merge(graphdef, params)
        return model.user(model.encode(events, lengths[:, None])).kv

    events = np.random.default_rng(1).integers(1, items, (batch, EVENTS, 1))
    lengths = np.full(batch, EVENTS)
    user = user_kv(events, lengths)
    step = timed(lambda: generate(decoder, weights, prompts(batch), max_tokens=WRITTEN, user=user)) / WRITTEN
    anew = timed(lambda: [jax.block_until_ready(user_kv(events, lengths)) for _ in range(WRITTEN)]) / WRITTEN
    return (step + anew) / step


def half_side(preset: str) -> dict:
    """Time ours on random weights in bfloat16, without a checkpoint: tokens a second, and the share of the memory's bandwidth."""
    sys.path.insert(0, str(HERE.parent))
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from ml_collections import ConfigDict

    from user_llm.common import trees
    from user_llm.config.llms import LLMS
    from user_llm.models.config_json import config_from_settings
    from user_llm.models.decoder import Decoder
    from user_llm.models.generate import generate
    from user_llm.nn.cross_attention import CrossAttentionConfig
    from user_llm.training.step import cast

    width, latents = 512, 16
    settings = LLMS["qwen3_0_6b"][1] if preset == "gpu" else {"model_type": "llama", **SETTINGS, "num_hidden_layers": 2}
    batches, written = ((1, 32), WRITTEN) if preset == "gpu" else ((1, 2), 4)
    cross = CrossAttentionConfig(width, every=2, heads=8, head_dim=64)
    config = config_from_settings(ConfigDict(settings).to_dict(), preset, cross=cross, unroll=preset == "gpu")
    create = lambda: Decoder(config, rngs=nnx.Rngs(params=0))  # noqa: E731
    graphdef, shapes = trees.abstract(create)
    params = cast(jax.jit(lambda: trees.split(create())[1])(), jnp.dtype(jnp.bfloat16))
    device = jax.devices()[0].device_kind
    found: dict = {"device": device, "parameters": trees.count(shapes)}

    @jax.jit
    def user_kv(params, tokens):
        return trees.merge(graphdef, params).user_kv(tokens, jnp.ones(tokens.shape[:2], bool))

    for batch in batches:
        tokens = np.random.default_rng(1).normal(size=(batch, latents, width)).astype(jnp.bfloat16)
        user = user_kv(params, tokens)
        seconds = timed(lambda: generate(graphdef, params, prompts(batch), max_tokens=written, user=user))  # noqa: B023
        block = config.block
        kept = config.num_layers * 2 * block.kv_heads * block.head_dim * 2 * (PROMPT + written / 2)  # of a row, on average
        read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + batch * kept
        figures = {"tokens_per_s": batch * written / seconds, "ms_per_step": 1e3 * seconds / written}
        if device in BANDWIDTH:
            figures["bandwidth"] = read * written / seconds / BANDWIDTH[device]
        found[f"batch_{batch}"] = figures
    return found


def main() -> None:
    """Alternate the two sides and print medians; of the presets in half precision, ours alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", choices=("small", "gpu", "tiny"), default="small")
    parser.add_argument("--out", type=pathlib.Path, help="a file to write the JSON to")
    parser.add_argument("--side", choices=("torch", "user_llm"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps((torch_side if args.side == "torch" else our_side)(args.model)))
        return
    result = half_side(args.preset) if args.preset != "small" else beside_torch(args.rounds)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text)
    print(text)


def beside_torch(rounds: int) -> dict:
    """Return what both sides measure, medians over the rounds, and their ratio."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as path:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS)).save_pretrained(path)
        sides = ("user_llm", "torch")
        commands = {side: [sys.executable, __file__, f"--side={side}", f"--model={path}"] for side in sides}
        result: dict = turns.take_turns(commands, rounds)
    return result | {"ratio": {key: result["user_llm"][key] / result["torch"][key] for key in result["torch"]}}


if __name__ == "__main__":
    main()
