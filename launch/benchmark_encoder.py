"""Encoder training speed and memory, side by side with RecTools' SASRec, the public peer (PyTorch).

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install "rectools[torch]" "pyarrow<21"
    python launch/benchmark_encoder.py --data=DIR --peer=peer/bin/python

Both train width 128, 2 layers, 2 heads, histories of 200, full softmax over the same catalogue, on the same machine, turn by turn.
Prints one JSON object: real (unpadded) next-event targets per second of each, the ratio, and peak resident memory.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent


def ours(data: str, steps: int) -> dict:
    """Train our encoder for `steps` steps after two that compile and warm up."""
    import jax

    sys.path.insert(0, str(HERE.parent))
    from etils import epath

    from configs import movielens_encoder
    from user_llm.common import mesh as meshes
    from user_llm.data import movielens
    from user_llm.data.splits import leave_last_out
    from user_llm.tasks import pretrain_encoder
    from user_llm.tasks.context import Context
    from user_llm.training.loop import LoopConfig, initial_state

    config = movielens_encoder.get_config("small")
    phase = config.pretrain_encoder
    with tempfile.TemporaryDirectory() as work:
        timelines = movielens.load(data, epath.Path(work) / "data", min_events=config.data.min_events)
        mesh = meshes.make_mesh(**config.mesh)
        with jax.set_mesh(mesh):
            context = Context(config, timelines, leave_last_out(timelines), mesh, epath.Path(work), {})
            task = pretrain_encoder.build(config, "pretrain_encoder", context)
            state, step = initial_state(
                task, LoopConfig(**phase.loop), context.optimizer_config("pretrain_encoder"), mesh, seed=0
            )
            batches, events = iter(task.train_data), 0
            for number in range(steps + 2):
                if number == 2:
                    jax.block_until_ready(state)
                    events, start = 0, time.monotonic()
                batch = next(batches)
                state, _ = step(state, meshes.put_batch(batch, mesh))
                events += task.count_events(batch)
            jax.block_until_ready(state)
            seconds = time.monotonic() - start
    return {"events_per_s": events / seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run(python: str, script: pathlib.Path, *arguments: str) -> dict:
    """Run one side in a process of its own and return the JSON on its last line."""
    done = subprocess.run([python, str(script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    sides: dict[str, list[dict]] = {"user_llm": [], "rectools": []}
    for _ in range(args.rounds):
        sides["user_llm"].append(
            run(sys.executable, pathlib.Path(__file__), "--one", f"--data={args.data}", f"--steps={args.steps}")
        )
        if args.peer:
            sides["rectools"].append(run(args.peer, HERE / "rectools_sasrec.py", args.data))
    result = {
        side: {key: sorted(r[key] for r in rounds)[len(rounds) // 2] for key in rounds[0]}
        for side, rounds in sides.items()
        if rounds
    }
    if args.peer:
        result["speed_ratio"] = result["user_llm"]["events_per_s"] / result["rectools"]["events_per_s"]
        result["memory_ratio"] = result["user_llm"]["peak_gib"] / result["rectools"]["peak_gib"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
