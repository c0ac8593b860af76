"""What a compiled program sends between devices, read from its text: kind, bytes, and how often a loop repeats it.

The bytes are those that one device sends, on a ring of n: of an all-gather, a reduce-scatter or an all-to-all (n - 1) / n of the
whole array, of an all-reduce twice that, of a permutation all of it (Thakur et al. 2005, "Optimization of collective communication
operations in MPICH").
"""

import dataclasses
import math
import re

import jax.numpy as jnp

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(")
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
# Of the fusions of one collective the first has the flags -1.
PART, STARTED = re.compile(r'"flag_start":'), re.compile(r'"flag_start":"-1"')
CALLED = re.compile(r"(?:calls|body|to_apply)=%([\w.\-]+)|branch_computations=\{([^}]*)\}")
CONDITION = re.compile(r" while\(.*condition=%([\w.\-]+)")
ARRAY = re.compile(r"([a-z]+\d+\w*)\[([\d,]*)\]")
LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: `sent` bytes by each device each of the `times` that it runs."""

    kind: str
    sent: float
    times: int


def collectives(text: str) -> list[Collective]:
    """Return what the program of `text`, as XLA writes it for TPUs after optimisation, sends.

    A collective that runs beside other work is split over several fusions, and where that work is a loop, some of them are in its
    body: it counts once, where it starts.
    """
    bodies, entry = _computations(text)
    found: list[Collective] = []

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if (match := COLLECTIVE.search(line)) and (STARTED.search(line) or not PART.search(line)):
                kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
                found.append(Collective(kind, _sent(kind, match[1], line, match[2]), times))
            condition = CONDITION.search(line)
            repeated = times * (_trips(bodies.get(condition[1], [])) if condition else 1)
            for called, branches in CALLED.findall(line):
                for child in [called] if called else re.findall(r"%([\w.\-]+)", branches):
                    walk(child, repeated)

    walk(entry, 1)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif line.startswith(" "):
            bodies[name].append(line)
    return bodies, entry


def _trips(condition: list[str]) -> int:
    """Return how often a loop runs that counts from 0 up to a constant, as a scan does; 1 where that is not told."""
    limits = [int(match[1]) for line in condition if (match := LIMIT.search(line))]
    return max(limits, default=1)


def _sent(kind: str, result: str, line: str, written: str) -> float:
    sizes = [
        jnp.dtype(_dtype(name)).itemsize * math.prod(int(n) for n in dims.split(",") if n)
        for name, dims in ARRAY.findall(result)
    ]
    size = max(sizes) if f"{written}-start(" in line else sum(sizes)
    ring = _group(line)
    if kind == "reduce-scatter" and written == "reduce-scatter":
        size *= ring  # its result is one device's share
    if kind == "collective-permute":
        return float(size)
    return size * (ring - 1) / ring * (2 if kind == "all-reduce" else 1)


def _dtype(name: str) -> str:
    """Return the name in numpy of what XLA calls bf16, f32, s32, pred."""
    kinds = {"bf": "bfloat", "f": "float", "s": "int", "u": "uint"}
    match = re.fullmatch(r"(bf|f|s|u)(\d+)", name)
    return f"{kinds[match[1]]}{match[2]}" if match else "int8"


def _group(line: str) -> int:
    """Return how many devices take part together."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    return 2
