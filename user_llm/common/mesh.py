"""The device mesh and where arrays live on it.

Three axes: `data` (replicas of the parameters), `fsdp` (batch and parameters both split) and `tensor` (heads, mlp and catalogue
split). Slices of TPUs, between which the network is slow, share `data` alone: only gradients cross it. Without an accelerator the mesh is whatever CPU devices there are; all code above is the same on 1 and on 512 chips.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import psutil
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from user_llm.common import trees
from user_llm.common.trees import Params, Rules

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# The names of an activation's dimensions, and the axes that split them. Others stay whole: parameters travel to the rows, not rows
# to the parameters.
ACTIVATIONS = {"rows": BATCH_AXES, "heads": ("tensor",), "features": ("tensor",)}


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
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise ValueError(f"{slices} slices each hold whole replicas: data={sizes[0]} is no multiple of {slices}.")
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        within = (sizes[0] // slices, *sizes[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    # Auto: shardings propagate from arguments and constraints.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Split an activation as its dimensions' names say; what the axes do not divide, and everything outside a mesh, stays as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    axes = [ACTIVATIONS[name] if name else () for name in names]
    fits = [of if dim % math.prod(mesh.shape[axis] for axis in of) == 0 else () for of, dim in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(of or None for of in fits)))


def placed(shapes: Any, where: Any) -> Any:
    """Return a tree of shapes that carry their shardings, as ahead-of-time compilation and restoring take them."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of something that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return into how many parts a batch is split; 1 outside a mesh."""
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def even_rows(rows: int, mesh: Mesh) -> int:
    """Return the next number of rows that the devices share evenly."""
    return -(-rows // row_shards(mesh)) * row_shards(mesh)


@dataclasses.dataclass(frozen=True)
class RowShare:
    """The parts of a batch that a process reads: share `index` of `count` equal ones. Processes that `tensor` joins read the same."""

    index: int
    count: int
    parts: tuple[int, ...]


def row_share(mesh: Mesh) -> RowShare:
    """Return what this process reads of each batch: what its devices hold, or all where the processes' parts overlap unevenly."""
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(mesh.devices.reshape(row_shards(mesh), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    shares = sorted({tuple(sorted(parts)) for parts in held.values()})
    if len({len(share) for share in shares}) != 1 or len(shares) * len(shares[0]) != row_shards(mesh):
        return RowShare(0, 1, tuple(range(row_shards(mesh))))
    mine = tuple(sorted(held[jax.process_index()]))
    return RowShare(shares.index(mine), len(shares), mine)


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Put each process's rows, its `row_share` of the batch, on its devices; the leading axis is split over `data` and `fsdp`.

    Raises:
      ValueError: a batch size that the devices do not divide.
    """
    share = row_share(mesh)

    def put(path, array: np.ndarray) -> jax.Array:
        rows = array.shape[0] * share.count
        if rows % row_shards(mesh):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"Batch {name!r} has {rows} rows, which {row_shards(mesh)} devices (data x fsdp) cannot share evenly."
            )
        size = rows // row_shards(mesh)

        def of_device(index: Any) -> np.ndarray:
            place = share.parts.index((index[0].start or 0) // size)
            return array[place * size : (place + 1) * size]

        return jax.make_array_from_callback((rows, *array.shape[1:]), by_row(mesh), of_device)

    return jax.tree_util.tree_map_with_path(put, batch)


def put_rows(rows: Any, mesh: Mesh) -> Any:
    """Share out arrays that every process has whole, row by row; what the devices do not divide goes whole to each."""

    def put(array: np.ndarray) -> jax.Array:
        where = by_row(mesh) if len(array) % row_shards(mesh) == 0 else replicated(mesh)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(put, rows)


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Put arrays that every process has on each of its devices, whole."""
    put = lambda array: jax.make_array_from_callback(array.shape, replicated(mesh), lambda index: array[index])  # noqa: E731
    return jax.tree.map(put, tree)


def rows_like(shapes: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Return shapes that carry the sharding of rows along `axis`; what the devices do not divide, and scalars, are whole everywhere."""

    def like(array: Any) -> jax.ShapeDtypeStruct:
        fits = array.ndim > axis and array.shape[axis] % row_shards(mesh) == 0
        where = NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES)) if fits else replicated(mesh)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    return jax.tree.map(like, shapes)


def fetch(tree: Any) -> Any:
    """Return arrays on the host, whole, with what other processes hold."""

    def whole(array: Any) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)


def free_bytes(mesh: Mesh) -> int:
    """Return the memory that each local device of the mesh can still give; CPU devices share their host's evenly."""
    devices = mesh.local_devices
    stats = [device.memory_stats() for device in devices]
    if any(s is None or "bytes_limit" not in s for s in stats):
        return psutil.virtual_memory().available // len(devices)
    return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
