"""The device mesh and where arrays live on it.

Three axes: `data` (replicas of the parameters), `fsdp` (batch and parameters both split) and `tensor` (heads, mlp and catalogue
split). Without an accelerator the mesh is whatever CPU devices there are; all code above is the same on 1 and on 512 chips.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from user_llm.common import trees
from user_llm.common.trees import Params, Rules

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over `devices`, or all there are; at most one axis may be -1 and takes what the others leave.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count or min(sizes) < 1:
        raise ValueError(f"A mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {count} devices.")
    # Auto: shardings propagate from arguments and constraints. (jax.make_mesh has defaulted to Explicit since 0.9.)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shardings(rules: Rules, tree: Params, mesh: Mesh) -> Params:
    """Return the sharding of each array of `tree`: rule values are tuples of axis names (or None), one per dimension.

    A tuple shorter than the rank leaves the leading dimensions whole, so that one rule serves stacked and single layers. A
    dimension that its axis does not divide stays whole.
    """

    def sharding(leaf, spec) -> NamedSharding:
        spec = (None,) * (leaf.ndim - len(spec)) + tuple(spec)
        if len(spec) != leaf.ndim:
            raise ValueError(f"Sharding rule {spec} has more entries than an array of shape {leaf.shape} has dimensions.")
        fits = [axis if axis and dim % mesh.shape[axis] == 0 else None for axis, dim in zip(spec, leaf.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    specs = trees.match(rules, tree)
    return jax.tree.map(sharding, tree, specs)


def placed(shapes: Any, where: Any) -> Any:
    """Return a tree of shapes that carry their shardings, as ahead-of-time compilation and restoring take them."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of something that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Put each process's rows on its devices; the leading axis is split over `data` and `fsdp`.

    Raises:
      ValueError: a batch size that the devices do not divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(path, array: np.ndarray) -> jax.Array:
        rows = array.shape[0] * jax.process_count()
        if rows % shards:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"Batch {name!r} has {rows} rows, which {shards} devices (data x fsdp) cannot share evenly.")
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree_util.tree_map_with_path(put, batch)


def free_bytes(mesh: Mesh) -> int:
    """Return the memory that each local device of the mesh can still give; CPU devices share their host's evenly."""
    devices = mesh.local_devices
    stats = [device.memory_stats() for device in devices]
    if any(s is None or "bytes_limit" not in s for s in stats):
        return psutil.virtual_memory().available // len(devices)
    return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
