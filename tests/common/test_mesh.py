from types import SimpleNamespace

import jax
import numpy as np
import psutil
import pytest
from jax.sharding import AxisType, PartitionSpec

from user_llm.common import mesh as meshes


def _like(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def test_one_axis_takes_what_the_others_leave():
    count = jax.device_count()
    assert dict(meshes.make_mesh().shape) == {"data": count, "fsdp": 1, "tensor": 1}
    assert dict(meshes.make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": count, "tensor": 1}
    # Since jax 0.9 the axes of a mesh are Explicit unless it is told otherwise.
    assert set(meshes.make_mesh().axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1), (-2, -4, 1)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match="does not fit"):
        meshes.make_mesh(*sizes)


def test_a_rule_names_the_last_dimensions(mesh_of):
    mesh = mesh_of(2, 2, 2)
    like = _like(single=(4, 6), stacked=(3, 4, 6), odd=(3, 6), norm=(6,))
    rules = ((r"norm", ()), (r".*", ("fsdp", "tensor")))
    specs = {name: where.spec for name, where in meshes.shardings(rules, like, mesh).items()}
    assert specs == {
        "single": PartitionSpec("fsdp", "tensor"),
        "stacked": PartitionSpec(None, "fsdp", "tensor"),
        "odd": PartitionSpec(None, "tensor"),  # no axis of 2 divides 3
        "norm": PartitionSpec(None),
    }


def test_a_rule_longer_than_an_array_is_refused(mesh_of):
    with pytest.raises(ValueError, match=r"more entries than an array of shape \(6,\)"):
        meshes.shardings(((r".*", ("fsdp", "tensor")),), _like(norm=(6,)), mesh_of(1, 1, 1))


def test_a_batch_is_split_over_data_and_fsdp_and_whole_over_tensor(mesh_of):
    mesh = mesh_of(2, 2, 2)
    batch = {"events": np.arange(24).reshape(8, 3), "lengths": np.arange(8)}
    placed = meshes.put_batch(batch, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
    with pytest.raises(ValueError, match="'lengths' has 6 rows, which 4 devices"):
        meshes.put_batch({"lengths": np.arange(6)}, mesh)


def test_cpu_devices_share_the_memory_of_their_host(mesh_of):
    one, eight = meshes.free_bytes(mesh_of(1, 1, 1)), meshes.free_bytes(mesh_of(8, 1, 1))
    assert 0 < one < psutil.virtual_memory().total
    assert 0.5 < 8 * eight / one < 2  # what is free changes between two looks


def _of_processes(sizes, processes):
    """A mesh of devices that belong to `processes`, one number for each device in the order of the mesh."""
    devices = np.array([SimpleNamespace(process_index=p) for p in processes], dtype=object).reshape(sizes)
    return SimpleNamespace(shape=dict(zip(meshes.AXES, sizes, strict=True)), devices=devices, empty=False)


@pytest.mark.parametrize(
    ("sizes", "processes", "share"),
    [
        ((4, 1, 1), [0, 0, 1, 1], (0, 2, (0, 1))),
        ((1, 2, 2), [0, 0, 1, 1], (0, 2, (0,))),
        ((1, 2, 2), [0, 1, 0, 1], (0, 1, (0, 1))),  # tensor joins the two: both read all
        ((2, 2, 1), [1, 0, 1, 0], (1, 2, (1, 3))),  # rows that lie apart
        ((4, 1, 1), [0, 0, 0, 1], (0, 1, (0, 1, 2, 3))),  # uneven: all read all
    ],
)
def test_what_a_process_reads(sizes, processes, share):
    found = meshes.row_share(_of_processes(sizes, processes))
    assert (found.index, found.count, found.parts) == share


def test_rows_that_all_have_are_shared_out_and_come_back_whole(mesh_of):
    mesh, rows = mesh_of(2, 2, 2), {"even": np.arange(24).reshape(8, 3), "odd": np.arange(5)}
    placed = meshes.put_rows(rows, mesh)
    assert {shard.data.shape[0] for shard in placed["even"].addressable_shards} == {2}
    assert {shard.data.shape[0] for shard in placed["odd"].addressable_shards} == {5}
    jax.tree.map(np.testing.assert_array_equal, meshes.fetch(placed), rows)
    assert [meshes.even_rows(rows, mesh) for rows in (1, 4, 5)] == [4, 4, 8]
