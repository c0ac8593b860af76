"""What all tests share: quick compilation, real input, timelines by hand, and parameters drawn without compiling."""

import gc
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

# Tests compile much and compute little: without LLVM's optimisations they take a fraction of the time. Eight devices, on any
# machine, are for the meshes; what names no mesh runs on the first.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if metadata.version("jaxlib").startswith("0.10."):  # later ones stop at flags that they do not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # their kernels take long to compile
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
# Torch's threads wait for each other by spinning, on cores that other tests want; its models here are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one process of the tests has compiled, no other compiles again: its workers, and the commands that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="user_llm_compiled_")  # removed as pytest ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

from jaxtyping import install_import_hook

# Every call of an annotated function of layers and models is checked: shapes, dtypes and types, an int being a float as for mypy.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(("user_llm.nn", "user_llm.models"), CHECKER)  # before their first import

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.data.schema import Feature, Schema
from user_llm.data.timelines import GAP_BUCKETS, Catalogue, Timelines
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.nn.visibility import causal_mask

# Files of minutes, which start before the others (xdist, --no-loadscope-reorder), so that no worker waits for them at the end.
LONG = ("test_quarter_hour", "test_main", "test_processes", "test_pretrain_encoder", "test_synthetic_variants")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


# A process may map so many regions of memory, 65,530 by Linux' default; each compiled program takes several, and XLA aborts without one.
MAPPED, MANY = Path("/proc/self/maps"), 20_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drop the programs that earlier files have compiled, where they take many regions of memory."""
    if nextitem is not None and nextitem.path != item.path and MAPPED.exists() and MAPPED.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()


def pytest_collection_finish() -> None:
    """What is imported by now stays; tracing makes many objects that need no collector."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real input; the test skips where USER_LLM_DATA does not name it."""
    if not os.environ.get("USER_LLM_DATA"):
        pytest.skip("USER_LLM_DATA is not set: no real input")
    return Path(os.environ["USER_LLM_DATA"])


@pytest.fixture(scope="session")
def models_dir(data_dir: Path) -> Path:
    """Real pretrained weights, beside the data."""
    return data_dir.parent / "models"


@pytest.fixture(scope="session")
def drawn() -> Callable[..., tuple[nnx.GraphDef, trees.Params]]:
    """Return `draw(create, seed)`: a module split, its parameters drawn by numpy, its cross-attention gates at 0.5.

    Closed gates would prove nothing, and nor would norms of scale 1.
    """

    def draw(create: Callable[[], nnx.Module], seed: int = 0) -> tuple[nnx.GraphDef, trees.Params]:
        graphdef, shapes = trees.abstract(create)
        rng = np.random.default_rng(seed)

        def leaf(path, like):
            name = path[-1].key
            if name.endswith("gate") and like.ndim < 2:
                return np.full(like.shape, 0.5, like.dtype)
            noise = rng.normal(size=like.shape).astype(like.dtype)
            return (1 + 0.1 * noise if name == "scale" else 0.25 * noise).astype(like.dtype)

        # `jnp.asarray` would compile a program for each shape.
        return graphdef, jax.device_put(jax.tree_util.tree_map_with_path(leaf, shapes))

    return draw


@pytest.fixture(scope="session")
def bare_logits() -> Callable[..., np.ndarray]:
    """Return `logits(config, params, ids)`: what a decoder without a user says of rows without padding, [B, T, V]."""

    def logits(config: DecoderConfig, params: trees.Params, ids: np.ndarray) -> np.ndarray:
        graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))

        @jax.jit
        def run(params, ids):
            decoder = trees.merge(graphdef, params)
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            hidden, _ = decoder(decoder.embed_tokens(ids), mask=causal_mask(jnp.ones(ids.shape, bool)), positions=positions)
            return decoder.logits(hidden)

        return np.asarray(run(params, ids))

    return logits


@pytest.fixture(scope="session")
def make_timelines() -> Callable[..., Timelines]:
    """Return `make(items, times)`: timelines from item ids, and seconds (by default an hour apart), of each user.

    Item i has genre 1 + i % 3 and, if even, 4; the rating of user u's event t is 1 + (u + t) % 10.
    """

    def make(items: list[list[int]], times: list[list[int]] | None = None, *, num_items: int | None = None) -> Timelines:
        lengths = np.array([len(row) for row in items])
        if times is None:
            times = [[1_000_000 + 3600 * t for t in range(n)] for n in lengths]
        num_items = num_items or max(max(row, default=0) for row in items)
        genres = np.zeros((num_items + 1, 2), np.int32)
        genres[1:, 0] = 1 + np.arange(1, num_items + 1) % 3
        genres[2::2, 1] = 4
        position = np.concatenate([np.arange(n) for n in lengths])
        schema = Schema(
            (
                Feature("item", "item", num_items + 1),
                Feature("rating", "ordinal", 11),
                Feature("genres", "multi", 5, 2),
                Feature("gap", "time", GAP_BUCKETS),
            )
        )
        return Timelines(
            name="toy",
            user_keys=[f"u{u}" for u in range(len(items))],
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            item=np.array([item for row in items for item in row], np.int32),
            columns={
                "rating": (1 + (np.repeat(np.arange(len(items)), lengths) + position) % 10).astype(np.int32),
                "timestamp": np.array([time for row in times for time in row], np.int64),
            },
            schema=schema,
            catalogue=Catalogue(
                titles=["", *(f"Film {i} (2000)" for i in range(1, num_items + 1))],
                keys=["", *(str(10 * i) for i in range(1, num_items + 1))],
                multi={"genres": genres},
                vocab={"genres": ["", "Action", "Comedy", "Drama", "War"]},
            ),
        )

    return make


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., Mesh]:
    """Return `make(data, fsdp, tensor)`: a mesh over as many of the eight CPU devices."""

    def make(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
        sizes = (data, fsdp, tensor)
        devices = jax.devices("cpu")[: math.prod(sizes)]
        return jax.make_mesh(sizes, meshes.AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by selenium; the test skips, with the reason, where one of them is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[browser]'")
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(programs):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    # Containers run as root and without shared memory, where Chromium's own sandbox cannot start.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1100,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()
