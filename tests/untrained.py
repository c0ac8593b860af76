"""Runs of an encoder on data in files that are left untrained and measured as popularity: what takes long to compile is left out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_quickstart import one_device, tiny_config

from user_llm import experiment
from user_llm.data import synthetic_files
from user_llm.evals.popularity import popularity_ranks
from user_llm.phases import pretrain_encoder
from user_llm.training import loop


def untrained_config(data: Path, **changes) -> ConfigDict:
    """Return the config of an encoder of two steps on MovieLens in a folder."""
    config = tiny_config()
    config.data.source, config.data.dir = "movielens", str(data)
    config.phases = ("pretrain_encoder",)
    config.update_from_flattened_dict({"pretrain_encoder.loop.total_steps": 2, "pretrain_encoder.loop.eval_steps": 2} | changes)
    return config


def write_world(folder: Path) -> Path:
    """Write tiny data in MovieLens' layout."""
    synthetic_files.write(folder, layout="movielens", num_users=60, num_items=48, events_per_user=14, seed=0)
    return folder


@contextmanager
def untrained() -> Iterator[list[str]]:
    """Yield the names of the phases that would have been trained, on one device: parameters on many are sliced before a save."""
    names: list[str] = []

    def train(task, config, optimizer, mesh, *rest):
        names.append(task.name)
        shapes = loop.abstract_params(task, config, mesh)
        return jax.tree.map(
            lambda like: jax.device_put(np.full(like.shape, 0.5, like.dtype), like.sharding), shapes
        ), 0  # targets seen

    with one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_train", train)
        rank = lambda score, count, *where, **sizes: [popularity_ranks(*where)] * count  # noqa: E731
        patch.setattr(pretrain_encoder, "rank_each", rank)
        patch.setattr(experiment, "write_report", lambda workdir: None)
        yield names
