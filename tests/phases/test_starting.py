"""Parameters start from where the rules say: drawn, another phase's, or the open LLM's."""

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx

from user_llm.common import trees
from user_llm.common.checkpoint import save_params
from user_llm.config import experiments
from user_llm.config.reader import read_config
from user_llm.nn.layers import embedding_param
from user_llm.phases import starting
from user_llm.phases.run import Run


class Part(nnx.Module):
    """Parameters: a [2], b [3]."""

    def __init__(self, rngs):
        self.a = embedding_param(rngs, (2,))
        self.b = embedding_param(rngs, (3,))


class Whole(nnx.Module):
    """Parameters: encoder and decoder, a part each, and head [4]."""

    def __init__(self, rngs):
        self.encoder, self.decoder, self.head = Part(rngs), Part(rngs), embedding_param(rngs, (4,))


RULES = ((r"^encoder/", "pretrain_encoder"), (r"^decoder/", "pretrain_lm"), (r".*", "fresh"))


@pytest.fixture
def make_run(tmp_path, mesh_of):
    def make(checkpoint="", **changes):
        config = experiments.experiment("movielens", "xattn", "small")
        config.llm.checkpoint = checkpoint
        config.user_llm.update(changes.pop("user_llm", {}))
        config.user_llm.loop.update(changes)
        return Run(read_config(config), epath.Path(tmp_path), mesh_of())

    return make


def test_an_open_llm_stands_in_for_the_small_one(make_run):
    shapes = trees.abstract(lambda: Whole(nnx.Rngs(0)))[1]
    small, opened = (trees.flatten(starting.sources(make_run(name), RULES, shapes)) for name in ("", "somewhere"))
    assert small["decoder/a"] == "pretrain_lm" and opened["decoder/a"] == "checkpoint"
    assert {name: source for name, source in small.items() if not name.startswith("decoder")} == {
        "encoder/a": "pretrain_encoder", "encoder/b": "pretrain_encoder", "head": "fresh",
    }  # fmt: skip


def test_what_other_phases_left_is_read_and_the_rest_is_drawn(make_run, tmp_path):
    left = {
        name: {"a": np.full(2, value), "b": np.full(3, value)}
        for name, value in (("pretrain_encoder", 5.0), ("pretrain_lm", 7.0))
    }
    for name, params in left.items():
        save_params(tmp_path / name / "params", {key: array.astype(np.float32) for key, array in params.items()})
    place = lambda shapes: jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)  # noqa: E731
    create = lambda: Whole(nnx.Rngs(0))  # noqa: E731
    found = starting.init(make_run(), create, RULES, trees.abstract(create)[1], place)
    assert found["encoder"]["b"].tolist() == [5.0] * 3 and found["decoder"]["a"].tolist() == [7.0] * 2
    assert np.std(found["head"]) > 0 and set(found) == {"encoder", "decoder", "head"}


@pytest.mark.parametrize(("start", "encoder"), [("pretrained", "float32"), ("frozen", "bfloat16")])
def test_what_another_phase_left_and_nothing_trains_is_read_in_the_type_of_the_computation(make_run, tmp_path, start, encoder):
    third = np.float32(1 / 3)  # which bfloat16 rounds
    for name in ("pretrain_encoder", "pretrain_lm"):
        save_params(tmp_path / name / "params", {"a": np.full(2, third), "b": np.full(3, third)})
    run = make_run(user_llm={"strategy": "enc", "encoder_init": start}, dtype="bfloat16")
    create = lambda: Whole(nnx.Rngs(0))  # noqa: E731
    shapes = starting.kept("user_llm", run, RULES, trees.abstract(create)[1])
    place = lambda shapes: jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)  # noqa: E731
    found = trees.flatten(starting.init(run, create, RULES, shapes, place))
    assert {path: str(leaf.dtype) for path, leaf in found.items()} == {
        "encoder/a": encoder, "encoder/b": encoder, "decoder/a": "bfloat16", "decoder/b": "bfloat16", "head": "float32",
    }  # fmt: skip
    assert found["encoder/a"][0] == third.astype(encoder) and found["decoder/a"][0] == third.astype(ml_dtypes.bfloat16)
