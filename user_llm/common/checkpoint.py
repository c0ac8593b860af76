"""Checkpoints: everything a run needs to go on as if nothing had happened, saved asynchronously by orbax.

A checkpoint is written to a temporary directory and renamed when complete, so that a kill at any moment leaves the previous
one. Restoring always goes into an abstract tree with shardings: what was saved on 8 devices loads on 4 or on 1.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from user_llm.common.files import absolute


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
    """Keeps the latest checkpoint and the one with the best validation metric.

    A checkpoint has two items: `state` (arrays) and `progress` (JSON: counters, best metric, where the data are).
    """

    def __init__(self, directory: epath.PathLike):
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(get_metric_fn=lambda metrics: metrics["value"], n=1, reverse=False),
            ]
        )
        self._manager = _Manager(
            absolute(directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, cleanup_tmp_directories=True, best_fn=lambda metrics: metrics["value"]
            ),
        )

    def save(self, step: int, state: Any, progress: dict, metric: float | None) -> None:
        """Start saving; returns before the files are written. `metric` (higher is better) is None if this is no new best."""
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
        """Wait for pending writes."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(directory: epath.PathLike, params: Any) -> None:
    """Write a tree of arrays for later phases and other programs; replaces what is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(directory), params, force=True)


def saved_shapes(directory: epath.PathLike) -> Any:
    """Return the shapes and dtypes of a tree written by `save_params`; nothing of the arrays is read."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(absolute(directory)).item_metadata.tree


def load_params(directory: epath.PathLike, like: Any) -> Any:
    """Read a tree written by `save_params` into the shapes, dtypes and shardings of `like`.

    Raises:
      FileNotFoundError: nothing was saved there.
    """
    path = absolute(directory)
    if not path.exists():
        raise FileNotFoundError(f"No parameters at {path}: run the phase that writes them first.")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)
