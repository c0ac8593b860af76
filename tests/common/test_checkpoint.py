import shutil

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from user_llm.common import mesh as meshes
from user_llm.common.checkpoint import Checkpointer, abstract_like, load_params, save_params
from user_llm.common.checksums import MANIFEST

PROGRESS = {"best_value": float("-inf"), "best_step": 3, "data": {"0": {"parent": {"next_index": 2}, "next_row": 6}}}
RULES = ((r"^w$", ("fsdp", "tensor")), (r".*", ()))


def _tree(mesh, seed):
    rng = np.random.default_rng(seed)
    tree = {"w": rng.normal(size=(8, 4)), "layers": {0: rng.normal(size=3)}, "step": np.array(seed)}
    tree = jax.tree.map(lambda a: a.astype(np.float32), tree)
    return jax.device_put(tree, meshes.shardings(RULES, tree, mesh))


def _assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh_of):
    """A state, sharded over eight devices, and the directory where it was saved."""
    directory = tmp_path_factory.mktemp("saved")
    state = _tree(mesh_of(1, 4, 2), seed=1)
    checkpoints = Checkpointer(directory / "checkpoints")
    checkpoints.save(7, state, PROGRESS, None)
    checkpoints.close()
    save_params(directory / "params", state)
    return directory, state


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 2, 2), (1, 1, 1)])
def test_what_eight_devices_saved_restores_on_fewer(saved, mesh_of, sizes):
    """Values, shardings and progress."""
    directory, state = saved
    like = _tree(mesh_of(*sizes), seed=2)
    checkpoints = Checkpointer(directory / "checkpoints")
    restored, progress = checkpoints.restore(checkpoints.latest_step(), like)
    _assert_equal(restored, state)
    assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, like)
    assert progress == PROGRESS
    _assert_equal(checkpoints.restore_state(7, like), state)
    checkpoints.close()
    params = load_params(directory / "params", abstract_like(like))
    _assert_equal(params, state)
    assert params["w"].sharding == like["w"].sharding


def test_no_save_tells_jax_where_this_process_is(tmp_path, mesh_of, monkeypatch):
    """The train loop does: a step long passed, told once a save of it is complete, has processes stop at different steps."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: bool(asked.append(step)))
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, _tree(mesh_of(1, 1, 1), 1), {}, None)
    checkpoints.close()
    assert checkpoints.latest_step() == 1 and asked == []


def test_the_latest_and_the_best_are_kept(tmp_path, mesh_of):
    """Steps 0 to 5, new bests at 0 and 2: a step that is no new best never pushes out the best."""
    mesh = mesh_of(1, 1, 1)
    checkpoints = Checkpointer(tmp_path)
    assert checkpoints.latest_step() is None
    for step, metric in enumerate([-3.0, None, -2.5, None, None, None]):
        checkpoints.save(step, _tree(mesh, step), {}, metric)
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [2, 5]
    checkpoints = Checkpointer(tmp_path)
    assert checkpoints.latest_step() == 5
    _assert_equal(checkpoints.restore_state(2, _tree(mesh, 0)), _tree(mesh, 2))
    checkpoints.close()


def test_a_state_of_other_shapes_is_refused(saved, mesh_of):
    mesh = mesh_of(1, 1, 1)
    like = _tree(mesh, seed=2) | {"w": jax.device_put(np.zeros((3, 3), np.float32), meshes.replicated(mesh))}
    with pytest.raises(ValueError, match="shape"):
        load_params(saved[0] / "params", abstract_like(like))


def test_save_params_replaces_and_load_params_names_what_is_missing(tmp_path, mesh_of):
    first, second = (_tree(mesh_of(1, 1, 1), seed) for seed in (1, 2))
    for tree in (first, second):
        save_params(tmp_path / "params", tree)
    _assert_equal(load_params(tmp_path / "params", abstract_like(first)), second)
    with pytest.raises(FileNotFoundError, match="No parameters at .*elsewhere: they were deleted or never written"):
        load_params(tmp_path / "elsewhere", abstract_like(first))


def test_params_with_one_flipped_bit_are_refused_by_the_name_of_the_file(saved, mesh_of, tmp_path):
    """In every file that orbax wrote, whatever it is for."""
    directory, state = saved
    like = abstract_like(_tree(mesh_of(1, 1, 1), seed=2))
    files = [path.relative_to(directory / "params") for path in (directory / "params").rglob("*") if path.is_file()]
    assert len(files) > 3
    for number, file in enumerate(path for path in files if path.name != MANIFEST):
        copy = tmp_path / str(number) / "params"
        shutil.copytree(directory / "params", copy)
        _assert_equal(load_params(copy, like), state)
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 2] ^= 4
        (copy / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{copy / file} is damaged: .*Delete {copy.parent}/results.json and run"):
            load_params(copy, like)
        (copy / file).unlink()
        with pytest.raises(ValueError, match=rf"^{copy / file} is missing"):
            load_params(copy, like)


def test_a_checkpoint_with_one_flipped_bit_is_refused_by_the_name_of_the_file(saved, tmp_path):
    """In every file, of arrays and of progress."""
    directory, _ = saved
    files = [path.relative_to(directory) for path in (directory / "checkpoints" / "7").rglob("*") if path.is_file()]
    files = [file for file in files if file.name != MANIFEST]
    assert len(files) > 5
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(directory / "checkpoints", copy / "checkpoints")
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 2] ^= 4
        (copy / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{copy / file} is damaged: .*Delete {copy}/checkpoints/7 and run"):
            Checkpointer(copy / "checkpoints")


def test_a_checkpoint_that_a_kill_left_without_checksums_is_restored(saved, mesh_of, tmp_path):
    directory, state = saved
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "7" / MANIFEST).unlink()
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    _assert_equal(checkpoints.restore(7, _tree(mesh_of(1, 1, 1), seed=2))[0], state)
    checkpoints.close()
