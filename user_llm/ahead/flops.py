"""FLOPs of a traced function: 2abc for every product of [a, b] and [b, c] in it, those of a scanned body as often as it runs.

XLA's own count (`evals/cost_compiled.py`) sees a scanned body once, and a compiled program's share of one device alone. What is
no product (norms, softmax, the optimizer) is left out, as in the usual formula 6N.
"""

import math
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval


def count_flops(jaxpr: core.Jaxpr, turns: int | None = None) -> int:
    """Return the FLOPs of all products in `jaxpr` that its results come of; XLA drops the others.

    Args:
      turns: of each loop that is no scan, or as many as its condition allows if those are fewer; None for always as many as it allows.

    Raises:
      ValueError: `turns` is None, and a product stands in a loop whose condition compares with no constant.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed, turns)


def _count(jaxpr: core.Jaxpr, turns: int | None) -> int:
    read = {v for v in (*jaxpr.outvars, *(v for e in jaxpr.eqns for v in e.invars)) if isinstance(v, core.Var)}
    return sum(
        _loop_flops(equation.params, [v in read for v in equation.outvars], turns)
        if equation.primitive.name == "while"
        else _flops(equation, turns)
        for equation in jaxpr.eqns
    )


def _loop_flops(params: dict[str, Any], read: list[bool], turns: int | None) -> int:
    """Return the FLOPs of a loop that is no scan, of what its `read` results come of."""
    condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    _, tested = partial_eval.dce_jaxpr(condition, [True])
    wanted = [a or b for a, b in zip(read, tested[params["cond_nconsts"] :], strict=True)]
    while True:  # what the next turn's wanted values come of is wanted, too
        needed, inputs = partial_eval.dce_jaxpr(body, wanted)
        more = [a or b for a, b in zip(wanted, inputs[params["body_nconsts"] :], strict=True)]
        if more == wanted:
            break
        wanted = more
    flops = _count(condition, turns) + _count(needed, turns)
    most = [*_limits(condition), *([] if turns is None else [turns])]
    if flops and not most:
        raise ValueError("A loop of unknown length holds products: its FLOPs cannot be counted.")
    return flops and flops * min(most)


def _flops(equation: Any, turns: int | None) -> int:
    if equation.primitive.name == "dot_general":
        left, right = (variable.aval.shape for variable in equation.invars)
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        shared = math.prod(left[i] for i in (*contracted, *batched))
        return 2 * math.prod(left) * math.prod(right) // shared
    bodies = [_count(body, turns) for body in _bodies(equation.params)]
    if equation.primitive.name == "scan":
        return equation.params["length"] * sum(bodies)
    if equation.primitive.name == "pallas_call":  # blocks that a kernel skips count, as they do where a mask hides their scores
        return math.prod(equation.params["grid_mapping"].grid) * sum(bodies)
    if equation.primitive.name == "shard_map":  # shapes in it are one device's
        return equation.params["mesh"].size * sum(bodies)
    return max(bodies, default=0) if equation.primitive.name == "cond" else sum(bodies)


def _limits(condition: core.Jaxpr) -> list[int]:
    """Return the constants up to which a loop goes on, its turns counted from 0."""
    limits = [equation.invars[1] for equation in condition.eqns if equation.primitive.name == "lt"]
    return [int(limit.val) for limit in limits if isinstance(limit, core.Literal)]


def _bodies(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Return the functions that an equation calls."""
    values = [value for entry in params.values() for value in (entry if isinstance(entry, tuple | list) else [entry])]
    # The newest jax has one class for both kinds.
    closed = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [body for body in closed if isinstance(body, core.Jaxpr)]
