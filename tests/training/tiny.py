"""A task of few parameters with all that a resumed run must get right: packed, shuffled text, dropout, a frozen part.

    python tests/training/tiny.py WORKDIR [--signal=SIGKILL --at=STEP --who=PROCESS] [--fsdp=N]

runs it, alone or as one of the processes that the environment names, until the step at which a process sends itself a signal.
"""

import argparse
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from user_llm.common import distributed
from user_llm.common import mesh as meshes
from user_llm.data.pipeline import packed_text
from user_llm.data.streams import Streams
from user_llm.nn.layers import dropout
from user_llm.phases.run import Run
from user_llm.training import loop
from user_llm.training.loop import LoopConfig
from user_llm.training.optimizer import OptimizerConfig
from user_llm.training.task import Task

VOCAB, WIDTH, SEED = 11, 8, 5
EVERYTHING = ((r".*", True),)
LOOP = LoopConfig(
    total_steps=12, total_epochs=0, eval_steps=4, save_steps=2, log_steps=1, monitor="accuracy", mode="max", patience_evals=0,
    keep="best", dtype="float32", accumulation_steps=1, sharding=((r".*", ()),),
)  # fmt: skip
OPTIMIZER = OptimizerConfig(
    learning_rate=0.3, warmup_steps=2, schedule="cosine", weight_decay=0.01, clip_norm=1.0, b1=0.9, b2=0.98,
    first_moment="float32", second_moment="float32", muon=False, matrices=((r".*", ()),),
    trainable=((r"frozen", False), (r".*", True)), lr_multiplier=((r".*", 1.0),), decay=EVERYTHING,
)  # fmt: skip
SHAPES = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {"embed": (VOCAB, WIDTH), "head": (WIDTH, VOCAB), "frozen": (WIDTH,)}.items()
}


def _init(place):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=like.shape).astype(like.dtype) for name, like in SHAPES.items()}
    return jax.device_put(params, place(params))


def _logits(params, tokens, key):
    hidden = dropout(params["embed"][tokens], 0.2, key)
    return (hidden + params["frozen"]) @ params["head"]


def _loss(params, batch, key, whole):
    log_probs = jax.nn.log_softmax(_logits(params, batch["tokens"], key))
    picked = jnp.take_along_axis(log_probs, batch["next"][..., None], axis=-1)[..., 0]
    return -jnp.mean(jnp.where(batch["segments"] > 0, picked, 0.0)), {}


@jax.jit
def _accuracy(params):
    """The next token is the one after: how often it is found."""
    tokens = jnp.arange(1, VOCAB - 1)
    return jnp.mean(_logits(params, tokens, None).argmax(-1) == tokens + 1)


def _lines():
    rng = np.random.default_rng(1)
    starts = rng.integers(1, VOCAB - 3, 40)
    return [np.arange(start, min(start + rng.integers(2, 7), VOCAB), dtype=np.int32) for start in starts]


def row(metric: str, value: float) -> dict:
    """Return a row of results.json."""
    facts = {
        "dataset": "counting",
        "task": "next",
        "method": "tiny",
        "split": "none",
        "config_hash": "tiny",
        "n": 1,
        "seed": SEED,
    }
    return {**facts, "metric": metric, "value": value}


def make_task(**changes) -> Task:
    """Return the task with some of its functions replaced."""
    task = Task(
        name="tiny",
        shapes=SHAPES,
        load=((r".*", "fresh"),),
        init=_init,
        loss=_loss,
        counts=lambda batch: {},
        programs=lambda params: {},
        train_data=Streams({0: packed_text(_lines(), rows=2, row_length=8, seed=SEED)}),
        steps_per_epoch=5.0,
        work=1.0,
        count_events=lambda batch: int((batch["segments"] > 0).sum()),
        metrics=("accuracy",),
        check=lambda: None,
        evaluate=lambda params: {"accuracy": float(_accuracy(params))},
        results=lambda params: [row("accuracy", float(_accuracy(params)))],
    )
    return dataclasses.replace(task, **changes)


def run(directory, task: Task | None = None, mesh: Mesh | None = None, **changes):
    """Run `task`, on one device unless a mesh is given; `changes` are of the loop's config."""
    mesh = mesh or meshes.make_mesh(devices=jax.devices("cpu")[:1])
    with jax.set_mesh(mesh):
        config = dataclasses.replace(LOOP, **changes)
        return loop.run(task or make_task(), config, OPTIMIZER, mesh, directory, SEED)


def run_split(directory, mesh: Mesh, **changes) -> list[dict]:
    """Run with parameters split over the mesh's axis `fsdp` and two streams of text; return the rows of the results."""
    config = SimpleNamespace(data=SimpleNamespace(streams=2))
    train_data = Run(config, None, mesh).streams(
        lambda stream, rows: packed_text(_lines(), rows=rows, row_length=8, seed=SEED, stream=stream), 8
    )
    task = make_task(train_data=train_data, **changes)
    return run(directory, task, mesh, sharding=((r"embed|head", (None, "fsdp")), (r".*", ())))[1]


def signal_at(step: int, number: signal.Signals) -> Callable:
    """Return a `count_events` that sends this process a signal during the given step of a run from the start.

    Later steps take as long as real ones, in which processes agree where to stop.
    """
    seen = []

    def count_events(batch) -> int:
        seen.append(batch)
        if len(seen) == step:
            os.kill(os.getpid(), number)
        if len(seen) >= step > 0:
            time.sleep(0.3)
        return int((batch["segments"] > 0).sum())

    return count_events


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--at", type=int, default=-1)
    parser.add_argument("--who", type=int, default=0)
    parser.add_argument("--fsdp", type=int, default=0, help="0 for one device and one stream")
    args = parser.parse_args()
    distributed.initialize()
    changes = {}
    if jax.process_index() == args.who:
        changes["count_events"] = signal_at(args.at, signal.Signals[args.signal])
    if not args.fsdp:
        run(args.workdir, make_task(**changes))
        return
    print(json.dumps(run_split(args.workdir, meshes.make_mesh(data=-1, fsdp=args.fsdp), **changes)))


if __name__ == "__main__":
    main()
