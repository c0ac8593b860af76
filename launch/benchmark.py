"""Train steps of the encoder and of contextualization, timed side by side with the same models in PyTorch.

    pip install torch==2.13.0
    python launch/benchmark.py --preset=small
    python launch/benchmark.py --preset=gpu --sides=user_llm,torch,torch_compiled --out=gpu.json --profile=trace

Three parts: `encoder` is a step of pretraining, on packed histories with the exact softmax; `full` and `lora` are steps of
contextualization by those strategies: encoder, Perceiver, gated cross-attention in every 2nd layer of the LLM, the loss of the answer's
tokens and of ranking the item. The reference (launch/torch_reference.py) has the same sizes, losses, optimizer and batches; weights are
random on both sides. Both events (item ids alone) and catalogue are stand-ins, dropout is off, one device is used.

Every side runs in a process of its own, turn by turn; figures are medians over the rounds. Prints one JSON object. For each part and
side: steps, events read, predicted targets and (contextualization) prompt tokens per second, without padding; seconds of tracing and
compiling, or for `torch_compiled` of the first step; `peak_bytes`, of the device, or on CPU of the whole process, compiling included;
`step_bytes`, the most that is held while steps run, on CPU without what the process held before there was a model. On other devices
only PyTorch has `step_bytes`, because JAX counts the peak there since the start and has no reset. FLOPs
are those of our step's products (ahead/flops.py), without the chunks of logits that it leaves out, for all sides; `mfu` is their share
of the device's bfloat16 peak, left out where train_speed.py does not know it. `speed_ratio` is our speed over the side's, `memory_ratio`
our peak over its, `step_memory_ratio` the same of `step_bytes` where both sides have them. `loader_events_per_s` is what our input
pipeline alone yields: batches are made ahead of the timing.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys
import tempfile
import time
from importlib.util import find_spec

import turns

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ml_collections import ConfigDict  # noqa: E402

from configs import movielens_xattn  # noqa: E402
from user_llm.config import defaults  # noqa: E402
from user_llm.config.llms import LLMS  # noqa: E402
from user_llm.config.reader import Config  # noqa: E402

# Part: phase and strategy.
PARTS = {"encoder": ("pretrain_encoder", "all"), "full": ("user_llm", "full"), "lora": ("user_llm", "lora")}
SIDES = ("user_llm", "torch", "torch_compiled")
BATCHES = 4  # made ahead, taken in turn


def llama(width: int, layers: int, heads: int, mlp_width: int, vocab_size: int) -> dict:
    """Return settings of a small Llama, as config.json says them."""
    return {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": mlp_width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
        "rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip


# Changes of configs/movielens_xattn.py:small, which is for CPUs: width 128, 2 layers, 15 rows of 200 events a step, 8 x 16 prompts.
WORLD = {"num_users": 64, "num_items": 900, "events_per_user": 250}  # so that histories fill their window
PRESETS = {
    "tiny": {  # seconds, to see that all of it runs
        "data.catalogue_items": 1000, "encoder.block": defaults.block(32, 2, 64, dropout=0.0), "user_llm.batch_size": 2,
        "pretrain_encoder.batch.rows": 2, "user_llm.loss.chunk": 64, "llm.published": ConfigDict(llama(32, 2, 2, 64, 300)),
    },
    "small": {"data.catalogue_items": 10_000, "llm.published": ConfigDict(llama(128, 4, 4, 384, 2048))},
    "gpu": {
        "data.catalogue_items": 27_280, "encoder.num_layers": 8, "encoder.unroll": False, "llm.unroll": False,
        "encoder.block": defaults.block(512, 8, 1536, dropout=0.0), "pretrain_encoder.loop.dtype": "bfloat16",
        "pretrain_encoder.batch": ConfigDict({"window": 200, "rows": 8, "row_length": 2048}),
        "pretrain_encoder.loss.chunk": 2048, "user_llm.loss.chunk": 2048, "user_llm.loop.dtype": "bfloat16",
        # Rows of 512 tokens, most of which are the latest titles as text.
        "user_llm.batch_size": 4, "user_llm.examples.targets_per_history": 4, "user_llm.examples.text_items": 80,
        "user_llm.prompts.next_item.max_tokens": 512,
        "user_llm.cross.heads": 16, "user_llm.cross.head_dim": 64,
        "user_llm.resampler.heads": 8, "user_llm.resampler.head_dim": 64, "user_llm.resampler.mlp_width": 1536,
        "llm.published": ConfigDict(LLMS["qwen3_0_6b"][1]),
    },
}  # fmt: skip


def preset_config(name: str) -> ConfigDict:
    """Return the config of a preset; what the reference leaves out is off."""
    config = movielens_xattn.get_config("small")
    config.phases = ("pretrain_encoder", "user_llm")
    plain = defaults.optimizer(1e-3, warmup_steps=0)
    config.update_from_flattened_dict({
        "encoder.features": ("item",), "encoder.tower": False, "encoder.dropout": 0.0, "encoder.block.dropout": 0.0,
        "pretrain_encoder.loss.in_batch": False,
        "pretrain_encoder.optimizer": ConfigDict(plain), "user_llm.optimizer": ConfigDict(plain),
        "user_llm.encoder_init": "scratch", "user_llm.load": ((r".*", "fresh"),), "user_llm.residual": False,
        "user_llm.resampler.recency_buckets": 0, "user_llm.prompts.next_item.max_tokens": 32, "llm.checkpoint": "random weights",
    })  # fmt: skip
    config.update_from_flattened_dict(PRESETS[name])
    return config


def open_part(config: ConfigDict, part: str, workdir: pathlib.Path):
    """Return the run and the dataset, of stand-ins, and the task of a part."""
    import jax
    from etils import epath

    from user_llm.ahead.stand_in import stand_in_run
    from user_llm.common import mesh as meshes
    from user_llm.config.reader import read_config
    from user_llm.phases.builders import BUILDERS

    phase, strategy = PARTS[part]
    config[phase].strategy = strategy
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    run, data = stand_in_run(read_config(config), mesh, epath.Path(workdir), world=WORLD)
    return run, data, BUILDERS[config[phase].task](phase, run, data)


def model_sizes(config: Config, phase: str, items: int) -> dict:
    """Return what the reference is built from, as JSON."""
    said, section, user_llm = config.said, config.sections[phase], config.contextual("user_llm")
    asked = ("learning_rate", "weight_decay", "clip_norm", "b1", "b2")
    return {
        "items": items, "encoder": said["encoder"], "llm": config.llm.published,
        "cross": vars(user_llm.cross), "resampler": vars(user_llm.resampler), "lora": said["lora"],
        "strategy": section.strategy, "dtype": section.loop.dtype, "catalogue": user_llm.loss.catalogue,
        "optimizer": {name: getattr(section.optimizer, name) for name in asked},
    }  # fmt: skip


def counted(batch: dict) -> dict[str, int]:
    """Return what a batch holds, padding left out."""
    if "segments" in batch:
        events = int((batch["segments"] > 0).sum())
        return {"events": events, "targets": events}
    return {
        "events": int(batch["lengths"].sum()), "targets": int((batch["answers"] > 0).sum()),
        "tokens": int(batch["text_lengths"].sum()),
    }  # fmt: skip


def make_batches(preset: str, parts: list[str], workdir: pathlib.Path) -> dict:
    """Write the batches of each part and the sizes of its models; return the means of what batches hold, and the loader's speed."""
    import numpy as np

    from user_llm.common import trees

    found = {}
    for part in parts:
        run, data, task = open_part(preset_config(preset), part, workdir)
        feed = iter(task.train_data)
        next(feed)  # the first fills the rows that are packed
        start, counts = time.monotonic(), []
        for number in range(BATCHES):
            batch = next(feed)
            counts.append(counted(batch))
            np.savez(workdir / f"{part}-{number}.npz", **trees.flatten(batch))
        means = {name: sum(count[name] for count in counts) / BATCHES for name in counts[0]}
        found[part] = {"step": means, "loader_events_per_s": BATCHES * means["events"] / (time.monotonic() - start)}
        sizes = model_sizes(run.config, PARTS[part][0], data.timelines.schema.num_items)
        (workdir / f"{part}.json").write_text(json.dumps(sizes))
    return found


def our_side(preset: str, part: str, workdir: pathlib.Path, steps: int, profile: str) -> dict:
    """Time our train step on the batches made ahead."""
    import itertools

    import numpy as np
    from train_speed import time_training

    from user_llm.common import trees
    from user_llm.common.memory import keep_freed
    from user_llm.training.loop import LoopConfig

    keep_freed()
    run, _, task = open_part(preset_config(preset), part, workdir)
    phase = PARTS[part][0]
    section = run.config.sections[phase]
    batches = [trees.unflatten(dict(np.load(workdir / f"{part}-{number}.npz"))) for number in range(BATCHES)]
    return time_training(
        task, LoopConfig(**vars(section.loop)), run.optimizer_config(phase), run.mesh, itertools.cycle(batches),
        seed=0, steps=steps, chunk=section.loss.chunk, profile=profile and f"{profile}/{part}",
    )  # fmt: skip


def report(means: dict, sides: dict[str, dict]) -> dict:
    """Return the figures of one part."""
    from train_speed import mfu

    part, ours = dict(means), sides.get("user_llm")
    for side, found in sides.items():
        figures = {"steps_per_s": 1 / found["step_s"]}
        figures |= {f"{name}_per_s": count / found["step_s"] for name, count in means["step"].items()}
        figures |= {key: found[key] for key in ("compile_s", "peak_bytes", "step_bytes", "device") if found[key] is not None}
        if ours is not None:
            part["flops"] = ours["flops"]
            share = mfu(ours["flops"], found["step_s"], found["device"])
            figures |= {} if share is None else {"mfu": share}
            if side != "user_llm":
                figures["speed_ratio"] = found["step_s"] / ours["step_s"]
                figures["memory_ratio"] = ours["peak_bytes"] / found["peak_bytes"]
                if None not in (ours["step_bytes"], found["step_bytes"]):
                    figures["step_memory_ratio"] = ours["step_bytes"] / found["step_bytes"]
        part[side] = figures
    return part


def names(known, what: str):
    """Return the type of a flag that names some of `known`, parted by commas."""

    def parse(given: str) -> list[str]:
        chosen = given.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}: choose of {', '.join(known)}")
        return chosen

    return parse


def main() -> None:
    """Make batches, alternate the sides, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--parts", type=names(PARTS, "part"), default=list(PARTS))
    parser.add_argument("--sides", type=names(SIDES, "side"), default=["user_llm", "torch"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round")
    parser.add_argument("--profile", default="", help="a directory for traces of three further steps of ours, by jax.profiler")
    parser.add_argument("--out", type=pathlib.Path, help="a file to write the JSON to")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "WORKDIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, workdir = args.one[0], pathlib.Path(args.one[1])
        if side == "batches":
            print(json.dumps(make_batches(args.preset, args.parts, workdir)))
        else:
            print(json.dumps(our_side(args.preset, args.parts[0], workdir, args.steps, args.profile)))
        return
    if find_spec("torch") is None and args.sides != ["user_llm"]:
        parser.error("the reference needs pip install torch==2.13.0; --sides=user_llm times ours alone")
    result: dict = {
        "preset": args.preset, "rounds": args.rounds, "steps": args.steps,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers") if find_spec(name)},
    }  # fmt: skip
    failed = []  # what one part meets costs the others nothing
    with tempfile.TemporaryDirectory() as workdir:
        own = [sys.executable, str(HERE / "benchmark.py"), f"--preset={args.preset}", f"--steps={args.steps}"]
        for part in args.parts:
            commands = {
                side: [*own, f"--parts={part}", f"--profile={args.profile}", "--one", side, workdir]
                if side == "user_llm"
                else [sys.executable, str(HERE / "torch_reference.py"), workdir, part, str(args.steps), side]
                for side in args.sides
            }
            try:
                means = turns.run([*own, f"--parts={part}", "--one", "batches", workdir])
                result[part] = report(means[part], turns.take_turns(commands, args.rounds))
            except SystemExit as error:
                failed.append(str(error))
            if args.out:  # also where the next part fails, or is stopped
                args.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
