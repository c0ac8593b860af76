"""Compiling for TPUs on a machine without one. What needs libtpu (extra `tpu`) is skipped where it is not installed."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from user_llm.ahead.check import Checked, abstract_batch, bytes_read, describe
from user_llm.ahead.chips import CHIPS, find_topology
from user_llm.ahead.collectives import Collective
from user_llm.ahead.flops import count_flops
from user_llm.ahead.stand_in import grow, stand_in_run
from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.config.reader import read_config
from user_llm.phases.builders import BUILDERS
from user_llm.training.loop import LoopConfig, abstract_state, initial_state, settle_steps

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_quickstart import tiny_config

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[tpu]"')


def _state_and_step(config, name, mesh, workdir):
    run, data = stand_in_run(read_config(config), mesh, epath.Path(workdir))
    task = BUILDERS[config[name].task](name, run, data)
    loop = settle_steps(LoopConfig(**config[name].loop), task)
    return task, loop, run, *abstract_state(task, loop, run.optimizer_config(name), mesh, 0)


@pytest.fixture(scope="module")
def lm_flops(tmp_path_factory, mesh_of):
    """Return `flops(remat)`: a token's in the train step of a scanned decoder, with its weights by path, its sizes and its rows' length."""
    workdir, mesh = tmp_path_factory.mktemp("lm"), mesh_of(1)

    def flops(remat):
        config = tiny_config()
        config.pretrain_lm.batch.row_length = 16  # so that attention between tokens hardly counts
        config.phases = ("pretrain_lm",)
        config.llm.update(unroll=False, remat=remat)
        task, _, _, state, step = _state_and_step(config, "pretrain_lm", mesh, workdir)
        with jax.set_mesh(mesh):
            found = count_flops(step.trace(state, abstract_batch(task, mesh)).jaxpr.jaxpr)
        return found / (config.pretrain_lm.batch.rows * 16), trees.flatten(state.trainable), config.llm

    return flops


def _size(weights, pattern):
    return sum(np.prod(leaf.shape) for path, leaf in weights.items() if re.search(pattern, path))


def test_flops_of_a_train_step_are_6_n_a_token(lm_flops):
    """N: the weights that a token is multiplied by, the tied table as its head among them; attention itself is left out of both."""
    found, weights, _ = lm_flops("none")
    assert found / (6 * _size(weights, "")) == pytest.approx(1, rel=0.1)


def test_flops_with_all_layers_computed_again_are_8_n_a_token(lm_flops):
    """The head is not computed again, and of each layer all but its last product, whose result no gradient needs."""
    (plain, weights, llm), (again, _, _) = lm_flops("none"), lm_flops("full")
    layers, table = _size(weights, "stack/"), _size(weights, "embed")
    assert again / (8 * layers + 6 * table) == pytest.approx(1, rel=0.1)
    attention = 2 * 2 * 16 * llm.block.width * llm.num_layers  # two products with 16 positions, in every layer
    assert again - plain == 2 * _size(weights, "stack/.*(attn/.|gate_proj|up)$") + attention


@pytest.mark.slow
def test_what_is_compiled_is_what_is_run(tmp_path, mesh_of):
    """Shapes, dtypes and shardings of the abstract state are those of the state that training starts from."""
    config, mesh = tiny_config(), mesh_of(2, 2, 2)
    task, loop, run, abstract, _ = _state_and_step(config, "pretrain_encoder", mesh, tmp_path)
    state, _ = initial_state(task, loop, run.optimizer_config("pretrain_encoder"), mesh, 0)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for like, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (like.shape, like.dtype) == (leaf.shape, leaf.dtype)
        assert like.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_a_catalogue_grows_by_items_that_nobody_chose(make_timelines):
    timelines = make_timelines([[1, 2, 3], [3, 1]])
    grown = grow(timelines, 1000)
    assert grown.schema.num_items == len(grown.catalogue.titles) - 1 == len(grown.catalogue.multi["genres"]) - 1 == 1000
    np.testing.assert_array_equal(grown.item, timelines.item)
    assert grown.catalogue.titles[:4] == timelines.catalogue.titles
    assert grow(timelines, 2) is timelines


def test_a_step_by_hand():
    chip = CHIPS["v5e"]
    step = Checked("encoder", chip, 4e9, 6e9, 197e12, (Collective("all-gather", 2e8, 3), Collective("all-reduce", 1e8, 1)))
    assert step.fits and step.total == 10e9
    assert step.seconds == pytest.approx({"compute": 1.0, "memory": 2 * 10 / 819, "links": 7e8 / 400e9})
    assert step.sent_by_kind == {"all-gather": 6e8, "all-reduce": 1e8}
    row = describe([step]).splitlines()[-1]
    assert (
        row
        == "| encoder | yes | 10.00 of 16 | 4.00 | 6.00 | 197.000 | 9850 | all-gather 0.600, all-reduce 0.100 | 1000.0 | compute |"
    )
    assert not Checked("encoder", chip, 11e9, 6e9, 1.0, ()).fits


def test_arguments_that_a_program_does_not_read_take_nothing(mesh_of):
    """Of those it reads a device holds its part; what is static, and a number of Python's, is no array."""
    mesh = mesh_of(1, 8, 1)

    def array(*shape, axes=()):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = {"shared": array(8, 4, axes=("fsdp",)), "unread": array(100), "whole": array(3)}
    arguments = ("static", params, 2)
    program = jax.jit(lambda kind, params, times: params["shared"] * times + params["whole"].sum(), static_argnums=0)
    assert bytes_read(program.trace(*arguments), arguments) == 4 * 4 + 3 * 4


@pytest.mark.parametrize("name", ["v4:2x2", "2x4", "v5e"])
def test_an_unknown_chip_is_refused(name):
    with pytest.raises(ValueError, match=f"Unknown topology '{name}': name one of v5e, v5p, v6e, tpu7x"):
        find_topology(name)


def _compile_only(*flags, config="movielens_encoder"):
    """Compile the programs of a config with one layer in each part."""
    command = [sys.executable, "-m", "user_llm.main", f"--config=configs/{config}.py:synthetic", "--compile_only"]
    command += ["--config.encoder.num_layers=1", "--config.llm.num_layers=1", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@needs_libtpu
def test_a_form_that_there_is_not_is_refused():
    done = _compile_only("--topology=v5e:7x9")
    assert done.returncode == 1
    assert re.search(r"^Error: Cannot describe the topology 'v5e:7x9'", done.stderr, re.M)


def _rows(done):
    """The table's cells by phase."""
    lines = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    return {cells[1]: cells for cells in lines[2:]}


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "more"), [("v5e:2x4", ("8", "1", "1"), "--kernels"), ("v6e:2x4", ("1", "4", "2"), "--nokernels")]
)
def test_a_small_config_compiles_for_eight_chips(topology, mesh, more):
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    done = _compile_only(f"--topology={topology}", more, *sizes)
    assert done.returncode == 0, done.stderr
    rows = _rows(done)
    assert [cells[2] for cells in rows.values()] == ["yes", "yes"] and list(rows) == [
        "pretrain_encoder",
        "pretrain_encoder: score",
    ]
    # Gradients are summed over replicas, and parameters gathered where no device holds them whole.
    sent = rows["pretrain_encoder"][8]
    assert ("all-gather" in sent) == (mesh[1] != "1") and "all-reduce" in sent


@pytest.mark.slow
@needs_libtpu
def test_what_a_contextualized_llm_answers_with_compiles_for_eight_chips():
    phases = "--config.phases=('pretrain_encoder','user_llm')"
    done = _compile_only("--topology=v5e:2x4", "--nokernels", phases, config="movielens_xattn")
    assert done.returncode == 0, done.stderr
    programs = ["user_llm", *(f"user_llm: {name}" for name in ("encode", "present", "score", "prefill", "decode"))]
    rows = _rows(done)
    assert list(rows)[2:] == programs and {rows[name][2] for name in programs} == {"yes"}


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_said_and_fails():
    wide = [f"--config.encoder.block.{name}=16384" for name in ("width", "mlp_width")]
    done = _compile_only("--topology=v5e:2x4", "--nokernels", *wide)
    assert done.returncode == 1
    cells = _rows(done)["pretrain_encoder"]
    assert cells[2] == "NO" and float(cells[3].split()[0]) > 16 and float(cells[4]) > 0
    assert "Error: not every step fits its chip." in done.stderr


def _filled(leaf):
    return jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


@pytest.mark.slow
def test_the_programs_of_evaluation_run_as_they_are_described(tmp_path, mesh_of):
    """On arrays of the shapes and shardings that are compiled ahead; a step of decoding writes a token."""
    config, mesh = tiny_config(), mesh_of(2, 2, 2)
    config.phases = ("pretrain_encoder", "user_llm")
    run, data = stand_in_run(read_config(config), mesh, epath.Path(tmp_path))
    found = {}
    for name in config.phases:
        task = BUILDERS[config[name].task](name, run, data)
        params = meshes.placed(task.shapes, meshes.shardings(config[name].loop.sharding, task.shapes, mesh))
        for what, (program, arguments) in task.programs(params).items():
            with jax.set_mesh(mesh):
                found[f"{name}: {what}"] = program(*jax.tree.map(_filled, arguments))
    assert list(found) == [
        "pretrain_encoder: score",
        *(f"user_llm: {name}" for name in ("encode", "present", "score", "prefill", "decode")),
    ]
    items = data.timelines.schema.num_items
    for name in ("pretrain_encoder: score", "user_llm: score"):
        assert np.isfinite(np.asarray(found[name])).sum(1).tolist() == [items] * len(found[name])
    assert int(found["user_llm: prefill"].step) == 1
