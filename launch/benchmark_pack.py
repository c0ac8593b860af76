"""Contextualization with and without packed prompts: how many tokens are real, and how many targets a second are trained.

    python launch/benchmark_pack.py --data=DIR/ml-latest-union --histories=8
    python launch/benchmark_pack.py --data=DIR/ml-latest-union --histories=8 --steps=0      # tokens alone

The phase `user_llm` of configs/movielens_xattn.py:small, on its own data with its own tokenizer; weights are random. Packed or not, the
model, the prompts and the input pipeline, which is timed too, are the same. Each side runs in a process of its own, turn by turn;
figures are medians over the rounds. Prints one JSON object: of each side the share of real tokens in its batches, soft tokens
included, targets a step, their sample deviation, and targets and tokens a second.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile

import turns

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

BATCHES = 40  # looked at for the share of real tokens


def measure(args: argparse.Namespace, histories: int) -> dict:
    """Return the figures of one side."""
    import numpy as np
    from etils import epath
    from train_speed import time_training

    from configs import movielens_xattn
    from user_llm.common.memory import keep_freed
    from user_llm.common.mesh import make_mesh
    from user_llm.config.check import check
    from user_llm.data.dataset import open_dataset
    from user_llm.phases import contextualize
    from user_llm.phases.run import Run
    from user_llm.training.loop import LoopConfig

    keep_freed()
    config = movielens_xattn.get_config(args.variant)
    config.data.dir, config.user_llm.batch_size = args.data, args.batch_size
    config.user_llm.pack.update(histories=histories, room=args.room)
    config.user_llm.update(encoder_init="scratch", residual=False, load=((r".*", "fresh"),), injection=args.injection)
    config.encoder.tower = False  # which an encoder from scratch cannot have
    config.llm.update_from_flattened_dict(
        {"num_layers": args.layers, "block.width": args.width, "block.mlp_width": 3 * args.width}
    )
    config.llm.block.head_dim = args.width // config.llm.block.heads
    with tempfile.TemporaryDirectory() as work:
        read = check(config)
        run = Run(read, epath.Path(work), make_mesh(**vars(read.mesh)))
        task = contextualize.build("user_llm", run, open_dataset(read, run.workdir))
        found, targets = [], []
        for batch in itertools.islice(task.train_data, BATCHES):
            real = batch["segments"] > 0 if "segments" in batch else batch["text"] > 0
            found.append((real.sum(), real.size))
            targets.append(task.count_events(batch))
        real, size = np.sum(found, axis=0)
        result = {"real": real / size, "targets": float(np.mean(targets)), "targets_sd": float(np.std(targets, ddof=1))}
        if args.steps:
            loop, optimizer = LoopConfig(**vars(read.sections["user_llm"].loop)), run.optimizer_config("user_llm")
            chunk = config.user_llm.loss.chunk
            timed = time_training(task, loop, optimizer, run.mesh, task.train_data, seed=0, steps=args.steps, chunk=chunk)
            result |= {"targets_per_s": timed["events_per_s"], "step_s": timed["step_s"], "flops": timed["flops"]}
            result |= {"peak_gib": timed["peak_bytes"] / 2**30, "compile_s": timed["compile_s"]}
    return result


def main() -> None:
    """Alternate the two sides and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a MovieLens directory")
    parser.add_argument("--variant", default="small", help="of configs/movielens_xattn.py")
    parser.add_argument("--batch_size", type=int, default=8, help="histories a step")
    parser.add_argument("--histories", type=int, default=8, help="histories of a bundle")
    parser.add_argument("--room", type=int, default=4, help="longest prompts of a row")
    parser.add_argument("--injection", default="cross_attention", help="cross_attention, soft_prompt or both")
    parser.add_argument("--width", type=int, default=128, help="of the LLM")
    parser.add_argument("--layers", type=int, default=4, help="of the LLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args, args.one)))
        return
    again = [sys.executable, __file__, *sys.argv[1:]]
    sides = {"packed": [*again, f"--one={args.histories}"], "alone": [*again, "--one=0"]}
    result: dict = turns.take_turns(sides, args.rounds)
    if args.steps:
        result["speed_ratio"] = result["packed"]["targets_per_s"] / result["alone"]["targets_per_s"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
