"""How fast a model encodes many users or recommends to them, in how much memory, beside what its FLOPs allow.

    python launch/benchmark_users.py --model=RUN/user_llm/model --users=100000 --events=200 --within=DIR

Writes that many users' events, drawn from the model's own items, to a Parquet file below DIR, and runs the command in a process of its
own. "FLOPs allow" is the time that the products of the encoder and the resampler take at the rate at which this machine multiplies
matrices, measured in the same run. They are the products of the events that the model reads, `events_read` of each user's.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import user_llm
from user_llm.evals.cost import encoder_flops, resampler_flops
from user_llm.serving.personalizer import Personalizer

USERS = 10_000  # that are written at a time
SIZE = 1024  # of the matrices that are multiplied


def write_events(path: pathlib.Path, model: Personalizer, users: int, events: int, seed: int = 0) -> None:
    """Write the events of users in turn, of items drawn evenly from the model's catalogue."""
    fields, rng = model.vocabulary.fields, np.random.default_rng(seed)
    keys = np.array(model.vocabulary.catalogue.keys[1:])
    writer = None
    for first in range(0, users, USERS):
        count = min(USERS, users - first)
        columns = {
            fields.user: np.repeat(np.arange(first, first + count), events).astype(str),
            fields.item: keys[rng.integers(len(keys), size=count * events)],
            fields.time: np.tile(np.arange(events) * 3600 + 1_600_000_000, count),
        }
        for number in fields.numbers.values():
            values = number.allowed or (1.0, 2.0, 3.0)
            columns[number.column] = np.array(values)[rng.integers(len(values), size=count * events)]
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def flops_per_second() -> float:
    """Return how many operations a second this machine multiplies matrices of float32 with."""
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((SIZE, SIZE), jnp.float32)
    product(a).block_until_ready()
    best = np.inf
    for _ in range(20):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best


def watched(command: list[str]) -> tuple[float, int]:
    """Run a command; return the seconds that it took, and the most bytes of memory that it held whenever it was looked at.

    What the system records of a finished child (`ru_maxrss`) is not below the peak of its parent.
    """
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, process.memory_info().rss)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"The command failed: {' '.join(command)}")
    return time.perf_counter() - start, peak


def main() -> None:
    """Write, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--command", default="encode", choices=["encode", "recommend"])
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--within", default=None, help="where the events and results are written")
    args = parser.parse_args()
    start = time.perf_counter()
    model = user_llm.load(args.model)
    loaded = time.perf_counter() - start
    config = model.predictor.config
    if config.encoder is None or config.resampler is None:
        parser.error("the model needs an encoder and a resampler")
    read = min(args.events, model.predictor.max_events)
    flops = encoder_flops(config.encoder, read) + resampler_flops(config.resampler, read)
    with tempfile.TemporaryDirectory(dir=args.within) as folder:
        events = pathlib.Path(folder) / "events.parquet"
        write_events(events, model, args.users, args.events)
        command = [
            sys.executable,
            "-m",
            f"user_llm.{args.command}",
            f"--model={args.model}",
            f"--events={events}",
            f"--out={folder}/out",
        ]
        seconds, peak = watched(command)
        states = sum(file.stat().st_size for file in (pathlib.Path(folder) / "out").glob("*.parquet"))
    rate = flops_per_second()
    print(
        json.dumps(
            {
                "command": args.command, "users": args.users, "events": args.events, "events_read": read, "load_s": round(loaded, 2), "seconds": round(seconds, 1),
                "users_per_s": round(args.users / seconds, 1), "users_per_s_flops_allow": round(rate / flops, 1),
                "share": round(args.users / seconds * flops / rate, 3), "peak_gib": round(peak / 2**30, 2),
                "bytes_per_user": round(states / args.users),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
