"""Does all that a config runs compile for a TPU topology, and fit its chips? No TPU is needed for the answer.

Of each phase: the train step, and what evaluation computes (`Task.programs`), of decoding one token.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh
from ml_collections import ConfigDict

from user_llm.ahead.assigned import assign
from user_llm.ahead.chips import Chip, find_topology
from user_llm.ahead.collectives import Collective, collectives
from user_llm.ahead.flops import count_flops
from user_llm.ahead.stand_in import stand_in_run
from user_llm.common import mesh as meshes
from user_llm.config.check import check as check_config
from user_llm.phases.builders import BUILDERS
from user_llm.phases.run import Run
from user_llm.report import markdown
from user_llm.training.loop import LoopConfig, abstract_params, abstract_state, settle_steps
from user_llm.training.step import cast
from user_llm.training.task import Task

PARTS = ("train", "evaluation")
# What the compiler says of a program that does not fit: the bytes in all, or of temporaries alone.
USED = re.compile(r"(Used |temporaries \()([\d.]+)([KMG])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Checked:
    """A compiled program of a phase, seen from one chip.

    Attributes:
      arguments: bytes of parameters, optimizer state, caches and batch, as far as the program reads them.
      temporaries: bytes needed besides while it runs, results that take no argument's place among them.
      flops: of products, by `count_flops`, an equal share of the whole program's; the most that it may take, where a loss leaves out
        logits that count for nothing.
      updates: whether it writes its arguments anew, as training does.
    """

    phase: str
    chip: Chip
    arguments: float
    temporaries: float
    flops: float
    sent: tuple[Collective, ...]
    updates: bool = True

    @property
    def total(self) -> float:
        """Bytes needed in all."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return self.total <= self.chip.memory

    @property
    def moved(self) -> float:
        """Bytes that memory reads and writes: every argument read, and written where it is updated, every temporary written and read."""
        return (2 if self.updates else 1) * self.arguments + 2 * self.temporaries

    @property
    def intensity(self) -> float:
        """FLOPs a byte of memory traffic; below flops / memory_rate of the chip, memory is what limits."""
        return self.flops / self.moved

    @property
    def seconds(self) -> dict[str, float]:
        """How long computing, memory and links each take at their peaks; the longest is the least that a step can take."""
        return {
            "compute": self.flops / self.chip.flops,
            "memory": self.moved / self.chip.memory_rate,
            "links": sum(self.sent_by_kind.values()) / self.chip.link_rate,
        }

    @property
    def sent_by_kind(self) -> dict[str, float]:
        """Bytes sent in all by each kind of collective."""
        kinds: Counter[str] = Counter()
        for c in self.sent:
            kinds[c.kind] += round(c.sent * c.times)
        return dict(sorted(kinds.items()))


HEADER = ("phase", "fits", "GB of chip", "arguments", "temporaries", "TFLOP", "FLOP/byte", "GB sent", "least ms", "limit")


def describe(found: list[Checked]) -> str:
    """Return a table of steps, all of it by chip: memory, FLOPs, bytes sent, and the least time by the chip's peaks."""
    rows = []
    for step in found:
        limit, least = max(step.seconds.items(), key=lambda pair: pair[1])
        sent = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in step.sent_by_kind.items())
        rows.append((
            step.phase, "yes" if step.fits else "NO", f"{step.total / 1e9:.2f} of {step.chip.memory / 1e9:.0f}",
            f"{step.arguments / 1e9:.2f}", f"{step.temporaries / 1e9:.2f}", f"{step.flops / 1e12:.3f}", f"{step.intensity:.0f}",
            sent or "none", f"{least * 1e3:.1f}", limit,
        ))  # fmt: skip
    return markdown.table(HEADER, [[markdown.Markdown(cell) for cell in row] for row in rows])


def check(
    config: ConfigDict,
    topology: str,
    workdir: epath.Path,
    *,
    phases: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
    kernels: bool = True,
) -> list[Checked]:
    """Compile what a config runs for a TPU topology.

    Args:
      workdir: for the stand-ins of missing data.
      phases: of the config's; all, if none is named.
      parts: of each phase, of PARTS.
      kernels: as in `assigned.assign`; without them, only in a process of its own (`apart.run`).

    Raises:
      ValueError: no such topology, or a mesh or a batch that does not fit it; or data that are neither here nor known by their sizes.
    """
    read = check_config(config)
    jax.config.update("jax_platforms", "cpu")  # libtpu is there, a TPU is not
    chip, devices = find_topology(topology)
    run, data = stand_in_run(read, meshes.make_mesh(**vars(read.mesh), devices=devices), workdir)
    found = []
    for name in phases or read.phases:
        kind = read.sections[name].task
        if kind == "pretrain_lm" and read.llm.checkpoint:
            continue
        task = BUILDERS[kind](name, run, data)
        if "train" in parts:
            found.append(check_train(task, name, run, chip, kernels))
        if "evaluation" in parts:
            found += check_programs(task, name, run, chip, kernels)
    return found


def check_train(task: Task, name: str, run: Run, chip: Chip, kernels: bool) -> Checked:
    """Compile the train step of a phase."""
    loop = settle_steps(LoopConfig(**vars(run.config.sections[name].loop)), task)
    optimizer = run.optimizer_config(name)
    state, step = abstract_state(task, loop, optimizer, run.mesh, run.seed)
    return _compile(step, (state, abstract_batch(task, run.mesh)), name, run, chip, kernels)


def check_programs(task: Task, name: str, run: Run, chip: Chip, kernels: bool) -> list[Checked]:
    """Compile what evaluation of a phase computes, of parameters in the phase's `loop.dtype`."""
    loop = LoopConfig(**vars(run.config.sections[name].loop))
    params = cast(abstract_params(task, loop, run.mesh), jnp.dtype(loop.dtype))
    return [
        dataclasses.replace(_compile(*program, f"{name}: {what}", run, chip, kernels, turns=1), updates=False)
        for what, program in task.programs(params).items()
    ]


def abstract_batch(task: Task, mesh: Mesh) -> dict[str, Any]:
    """Return the shapes of one step's batch, of all processes of the mesh together."""
    shares = meshes.row_share(mesh).count

    def shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shares * array.shape[0], *array.shape[1:]), array.dtype, sharding=meshes.by_row(mesh))

    beside = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=meshes.replicated(mesh)), task.beside)
    return jax.tree.map(shape, next(iter(task.train_data))) | beside


def bytes_read(traced: jax.stages.Traced, arguments: tuple) -> int:
    """Return the bytes that the arguments of a program take on a device, without those that it does not read: jit drops them."""
    jaxpr = traced.jaxpr.jaxpr
    _, read = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    # Neither what is static nor Python's numbers, which alone are weakly typed, are arrays.
    arrays = [a for a in jax.tree.leaves(arguments) if isinstance(a, jax.ShapeDtypeStruct)]
    read = [is_read for var, is_read in zip(jaxpr.invars, read, strict=True) if not var.aval.weak_type]
    sizes = [a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in arrays]
    return sum(size for size, is_read in zip(sizes, read, strict=True) if is_read)


def _compile(
    program: jax.stages.Wrapped,
    arguments: tuple,
    phase: str,
    run: Run,
    chip: Chip,
    kernels: bool,
    turns: int | None = None,
) -> Checked:
    per_chip, mesh = chip.devices, run.mesh
    with jax.set_mesh(mesh):  # only here: nothing can be computed on devices that are but described
        traced = program.trace(*arguments)
    flops = count_flops(traced.jaxpr.jaxpr, turns) / mesh.size * per_chip
    given = per_chip * bytes_read(traced, arguments)
    if given > chip.memory:
        return Checked(phase, chip, given, 0.0, flops, ())  # more needs no compiler
    logging.info("%s: compiling for %d devices", phase, mesh.size)
    try:
        memory, text = assign(traced.lower(), run.workdir, kernels)
    except jax.errors.JaxRuntimeError as error:
        used = USED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        needed = per_chip * float(used[2]) * UNITS[used[3]]
        return Checked(phase, chip, given, needed if "temporaries" in used[1] else needed - given, flops, ())
    sent = [dataclasses.replace(c, sent=per_chip * c.sent) for c in collectives(text)]
    return Checked(phase, chip, given, per_chip * memory - given, flops, tuple(sent))
