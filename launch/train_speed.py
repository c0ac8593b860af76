"""Time our train step: what `benchmark.py` and `benchmark_encoder.py` share of our side.

Compiled ahead, warmed up, then a stretch of steps is timed as a whole, up to the moment that its last result is there.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator

import jax
import turns
from jax.sharding import Mesh

from user_llm.ahead.chips import CHIPS
from user_llm.ahead.flops import count_flops
from user_llm.common import mesh as meshes
from user_llm.common.memory import compiling
from user_llm.training.loop import LoopConfig, initial_state, settle_steps
from user_llm.training.optimizer import OptimizerConfig
from user_llm.training.task import Batch, Task

WARM_UP = 2  # steps
# Peak of dense bfloat16 products a second, by the device's own name: NVIDIA's data sheets of the H100, H200 and A100 (without
# sparsity), and of the SXM modules alone where forms differ. JAX's devices are a chip, or half a TPU7x.
TPU_NAMES = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    **{name: CHIPS[chip].flops / CHIPS[chip].devices for name, chip in TPU_NAMES.items()},
}  # fmt: skip


def mfu(flops: float, seconds: float, device_kind: str) -> float | None:
    """Return the share of a device's peak that `flops` in `seconds` are; None where its peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops / seconds / peak


def peak_bytes(device: jax.Device) -> int:
    """Return the most memory in use so far: an accelerator's own, on CPU the whole process's, since `turns.forget_peak`."""
    if device.platform == "cpu":
        return turns.peak_resident_bytes()
    return device.memory_stats()["peak_bytes_in_use"]


def time_training(
    task: Task,
    loop: LoopConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    batches: Iterable[Batch],
    *,
    seed: int,
    steps: int,
    chunk: int,
    profile: str = "",
) -> dict:
    """Train for `steps` steps after those that warm up; what `batches` takes to yield them is part of the time.

    Args:
      chunk: rows of logits that the loss computes at a time. Chunks without a row that counts are left out; FLOPs count as many as the
        first batch fills.
      profile: a directory for a trace of three further steps; empty for none.

    Returns:
      Seconds a step, seconds of tracing and compiling, peak bytes, bytes that steps hold at most (on CPU, without what the process held
      before there was a model; None elsewhere, where JAX cannot forget the peak of compiling), FLOPs of the step's products, the first loss, the events trained on (`Task.count_events`) a second, and
      the device.
    """
    device = mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    feed = iter(batches)
    before = turns.resident_bytes() if on_cpu else 0
    with jax.set_mesh(mesh):
        state, step = initial_state(task, settle_steps(loop, task), optimizer, mesh, seed)
        batch, beside = next(feed), meshes.put_whole(task.beside, mesh)
        start = time.monotonic()
        with compiling():
            traced = step.trace(state, meshes.put_batch(batch, mesh) | beside)
            compiled = traced.lower().compile()
        compile_s = time.monotonic() - start

        def train(batches: Iterator[Batch]) -> tuple[int, dict]:
            nonlocal state
            events = 0
            for batch in batches:
                state, scalars = compiled(state, meshes.put_batch(batch, mesh) | beside)
                events += task.count_events(batch)
            jax.block_until_ready((state, scalars))
            return events, scalars

        chunks = [math.ceil(int(count) / chunk) for count in task.counts(batch | task.beside).values()]
        first = float(train(iter([batch]))[1]["loss"])
        train(itertools.islice(feed, WARM_UP - 1))
        peak = peak_bytes(device)
        if on_cpu:
            turns.forget_peak()
        start = time.monotonic()
        events, _ = train(itertools.islice(feed, steps))
        seconds = time.monotonic() - start
        of_steps = peak_bytes(device)
        if profile:
            with jax.profiler.trace(profile):
                train(itertools.islice(feed, 3))
    return {
        "step_s": seconds / steps, "events_per_s": events / seconds, "compile_s": compile_s,
        "peak_bytes": max(peak, of_steps), "step_bytes": of_steps - before if on_cpu else None,
        "flops": count_flops(traced.jaxpr.jaxpr, max(chunks, default=None)), "loss": first, "device": device.device_kind,
    }  # fmt: skip
