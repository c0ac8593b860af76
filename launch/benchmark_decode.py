"""Decoding speed, side by side with transformers' `generate` and its cache, on the same random Llama of 60M parameters.

    pip install torch==2.13.0
    python launch/benchmark_decode.py

Greedy, prompts of 32 tokens, 128 tokens written, batch 1 and 8, float32. Each side runs in a process of its own, turn by turn, and is
timed on its second call. Prints one JSON object: tokens per second of each, medians over the rounds, and their ratio.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
SETTINGS = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 14, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, WRITTEN, BATCHES = 32, 128, (1, 8)


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
    rates = {}
    for batch in BATCHES:
        seconds = timed(lambda: generate(graphdef, params, prompts(batch), max_tokens=WRITTEN))  # noqa: B023
        rates[f"batch_{batch}"] = batch * WRITTEN / seconds
    return rates


def main() -> None:
    """Alternate the two sides and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("torch", "user_llm"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps((torch_side if args.side == "torch" else our_side)(args.model)))
        return
    import torch
    import transformers

    sides: dict[str, list[dict]] = {"user_llm": [], "torch": []}
    with tempfile.TemporaryDirectory() as path:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS)).save_pretrained(path)
        for _ in range(args.rounds):
            for side, found in sides.items():
                command = [sys.executable, __file__, f"--side={side}", f"--model={path}"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
                found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    result: dict = {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in sides.items()}
    result["ratio"] = {key: result["user_llm"][key] / result["torch"][key] for key in result["torch"]}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
