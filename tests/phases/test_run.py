"""What all phases of a run share: streams of batches, optimizers, result rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.config import experiments
from user_llm.config.reader import read_config
from user_llm.data.dataset import Dataset
from user_llm.data.splits import make_split
from user_llm.evals.measured import Measured, load_measured
from user_llm.phases.run import Run


@pytest.fixture
def make_run(tmp_path, mesh_of):
    """Return `make(changes)`: a run of a changed config in a folder of its own."""

    def make(changes=None, **rest):
        config = experiments.experiment("movielens", "xattn", "small")
        config.update_from_flattened_dict(changes or {})
        return Run(read_config(config), epath.Path(tmp_path), mesh_of(), **rest)

    return make


def test_streams_share_the_rows_of_a_batch(make_run, monkeypatch):
    made = []
    make = lambda stream, rows: made.append((stream, rows)) or iter(())  # noqa: E731
    make_run().streams(make, 8)
    make_run({"data.streams": 4}).streams(make, 8)
    assert made == [((0, 1), 8), *(((n, 4), 2) for n in range(4))]
    made.clear()
    monkeypatch.setattr(meshes, "row_share", lambda mesh: dataclasses.replace(share, index=1, count=2))
    share = Share()
    make_run({"data.streams": 4}).streams(make, 8)
    assert made == [((2, 4), 2), ((3, 4), 2)]  # those of the second of two processes
    for streams, rows in ((3, 9), (4, 6)):
        with pytest.raises(ValueError, match=rf"^{rows} rows from {streams} streams cannot be shared evenly by 2 processes"):
            make_run({"data.streams": streams}).streams(make, rows)


@dataclasses.dataclass(frozen=True)
class Share:
    """What `meshes.row_share` returns of one process."""

    index: int = 0
    count: int = 1


def test_the_optimizer_trains_what_the_strategy_says(make_run):
    run = make_run(
        {"user_llm.encoder_init": "pretrained", "user_llm.strategy": "proj", "user_llm.optimizer.learning_rate": 0.5}
    )
    found = run.optimizer_config("user_llm")
    assert found.learning_rate == 0.5 and found.trainable == run.config.strategies["proj"].trainable


@pytest.mark.parametrize("strategy", ["full", "lora", "enc", "all"])
def test_a_frozen_encoder_is_all_that_a_strategy_trains_less(make_run, strategy):
    paths = (
        "encoder/item",
        "encoder/tower/project",
        "resampler/latents",
        "decoder/stack/cross/gate",
        "decoder/embed",
        "item_head",
    )
    shapes = trees.unflatten({path: jnp.zeros(1) for path in paths})

    def trains(start):
        run = make_run({"user_llm.strategy": strategy, "user_llm.encoder_init": start})
        found = trees.flatten(trees.match(run.optimizer_config("user_llm").trainable, shapes))
        return {path for path, yes in found.items() if yes}

    assert trains("frozen") == {path for path in trains("pretrained") if not path.startswith("encoder/")}
    assert trains("frozen")


def test_rows_name_dataset_split_seed_and_the_identity_of_their_phase(make_run, make_timelines):
    timelines = make_timelines([[1, 2, 3], [2, 3, 1]])
    data = Dataset(timelines, make_split(timelines, "leave_last_out"))
    run = make_run({"seed": 7}, identities={"user_llm": "abc"})
    measured = Measured(np.array([0, 1]), np.array([2, 2]), {"recall@10": np.array([1.0, 0.0])})
    [row] = run.record("user_llm", data, "next_item", "method", measured)
    shared = {"dataset": "toy", "seed": 7, "split": "leave_last_out", "config_hash": "abc"}
    assert row == shared | {"task": "next_item", "method": "method", "metric": "recall@10", "value": 0.5, "n": 2}
    assert run.row_facts("other", data)["config_hash"] == ""
    [file] = (run.workdir / "user_llm" / "values").iterdir()
    assert load_measured(epath.Path(file))[2].users.tolist() == [0, 1]
