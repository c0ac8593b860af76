"""Checkpoints: everything a run needs to go on as if nothing had happened, saved asynchronously by orbax.

A checkpoint is written to a temporary directory and renamed when complete, so that a kill at any moment leaves the previous
one. Restoring always goes into an abstract tree with shardings: what was saved on 8 devices loads on 4 or on 1.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from user_llm.common.checksums import MANIFEST, check_manifest, write_manifest
from user_llm.common.distributed import barrier, gather, is_first
from user_llm.common.files import absolute, is_remote

REMEDY = "Delete {}/results.json and run the same command: the phase goes on from its last checkpoint."


def abstract_like(tree: Any) -> Any:
    """Return shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Leave the question to the train loop.

        Orbax asks jax again, from a thread, once a save is complete: jax would take this process to be at that step still, and
        processes would stop at different ones, each waiting for the other.
        """
        return False


class Checkpointer:
    """Keeps the latest checkpoint and the one with the largest metric.

    A checkpoint has two items: `state` (arrays) and `progress` (JSON: counters, best metric, where the data are). On a local disk
    those that stand when it is closed get checksums, which the next one compares; one that a kill left has none.

    Raises:
      ValueError: a file of a checkpoint is damaged or missing.
    """

    def __init__(self, directory: epath.PathLike):
        self._directory = absolute(directory)
        self._check()
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(get_metric_fn=lambda metrics: metrics["value"], n=1, reverse=False),
            ]
        )
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, cleanup_tmp_directories=True, best_fn=lambda metrics: metrics["value"]
            ),
        )

    def save(self, step: int, state: Any, progress: dict, metric: float | None) -> None:
        """Start saving; returns before the files are written. `metric` (higher is better) is None if the phase would not leave this step."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(progress),
        )
        self._manager.save(step, args=items, metrics={"value": float("-inf") if metric is None else metric}, force=True)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """Return (state, progress) as saved at `step`, arrays sharded as in `like`."""
        self._manager.wait_until_finished()
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_like(like)),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["progress"]

    def restore_state(self, step: int, like: Any) -> Any:
        """Return the state saved at `step`, sharded as in `like`."""
        self._manager.wait_until_finished()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_like(like)))
        return self._manager.restore(step, args=args)["state"]

    def close(self) -> None:
        """Wait for pending writes, and end the threads that write even if one of them failed."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()
        if is_first() and not is_remote(self._directory):
            for path in self._directory.iterdir():
                if path.name.isdigit() and not (path / MANIFEST).exists():
                    write_manifest(path)

    def _check(self) -> None:
        """Compare all checkpoints that have checksums, before orbax reads any file of them."""
        steps = (
            sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())
            if self._directory.exists()
            else []
        )
        for step in steps:
            path = self._directory / str(step)
            if (path / MANIFEST).exists():
                # An earlier one is what the phase would leave, and the latest refers to it.
                remove, then = (
                    (path, "goes on from an earlier step, or begins again")
                    if step == steps[-1]
                    else (self._directory, "begins again")
                )
                _check_files(path, f"Delete {remove} and run the same command: the phase {then}.")


def save_params(directory: epath.PathLike, params: Any) -> None:
    """Write a tree of arrays with its checksums for later phases and other programs; replaces what is there."""
    path = absolute(directory)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params, force=True)
    barrier("params are written")
    if is_first():
        write_manifest(path)


def saved_shapes(directory: epath.PathLike) -> Any:
    """Return the shapes and dtypes of a tree written by `save_params`; nothing of the arrays is read."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(absolute(directory)).item_metadata.tree


def load_params(directory: epath.PathLike, like: Any) -> Any:
    """Read a tree written by `save_params` into the shapes, dtypes and shardings of `like`.

    Raises:
      FileNotFoundError: nothing was saved there.
      ValueError: files that are damaged or missing, the first of them named.
    """
    path = absolute(directory)
    if not path.exists():
        raise FileNotFoundError(f"No parameters at {path}: they were deleted or never written. {REMEDY.format(path.parent)}")
    _check_files(path, REMEDY.format(path.parent))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def _check_files(path: epath.Path, remedy: str) -> None:
    """Compare a folder with its checksums; processes share the work, and all refuse what one refuses."""
    fault = None
    try:
        check_manifest(path, part=jax.process_index(), parts=jax.process_count())
    except ValueError as error:
        fault = f"{error} {remedy}"
    if faults := [fault for fault in gather(fault) if fault]:
        raise ValueError(faults[0])
