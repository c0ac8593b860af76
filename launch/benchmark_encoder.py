"""Encoder training speed and memory, side by side with RecTools' SASRec, the public peer (PyTorch).

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install "rectools[torch]" "pyarrow<21"
    python launch/benchmark_encoder.py --data=DIR --peer=peer/bin/python

Both train width 128, 2 layers, 2 heads, histories of 200, full softmax over the same catalogue, on the same machine, turn by turn.
Prints one JSON object: real (unpadded) next-event targets per second of each, the ratio, and peak resident memory.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import turns

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def ours(data: str, steps: int) -> dict:
    """Time our step with its input pipeline, as the peer's is."""
    from etils import epath
    from train_speed import time_training

    from configs import movielens_encoder
    from user_llm.common.memory import keep_freed
    from user_llm.common.mesh import make_mesh
    from user_llm.config.check import check
    from user_llm.data.dataset import open_dataset
    from user_llm.phases import pretrain_encoder
    from user_llm.phases.run import Run
    from user_llm.training.loop import LoopConfig

    keep_freed()
    config = movielens_encoder.get_config("small")
    config.data.dir = data
    # As the peer's encoder.
    config.encoder.tower = config.pretrain_encoder.loss.in_batch = config.pretrain_encoder.optimizer.muon = False
    with tempfile.TemporaryDirectory() as work:
        read = check(config)
        run = Run(read, epath.Path(work), make_mesh(**vars(read.mesh)))
        task = pretrain_encoder.build("pretrain_encoder", run, open_dataset(read, run.workdir))
        loop, optimizer = LoopConfig(**config.pretrain_encoder.loop), run.optimizer_config("pretrain_encoder")
        chunk = config.pretrain_encoder.loss.chunk
        found = time_training(task, loop, optimizer, run.mesh, task.train_data, seed=0, steps=steps, chunk=chunk)
    return {"events_per_s": found["events_per_s"], "peak_gib": found["peak_bytes"] / 2**30}


def main() -> None:
    """Alternate the two sides and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a MovieLens directory")
    parser.add_argument("--peer", help="python of a virtual environment with RecTools; without it only ours is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="our steps per round")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(ours(args.data, args.steps)))
        return
    commands = {
        "user_llm": [sys.executable, __file__, "--one", f"--data={args.data}", f"--steps={args.steps}"],
        "rectools": [args.peer, str(HERE / "rectools_sasrec.py"), args.data],
    }
    result: dict = turns.take_turns({side: command for side, command in commands.items() if command[0]}, args.rounds)
    if args.peer:
        result["speed_ratio"] = result["user_llm"]["events_per_s"] / result["rectools"]["events_per_s"]
        result["memory_ratio"] = result["user_llm"]["peak_gib"] / result["rectools"]["peak_gib"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
