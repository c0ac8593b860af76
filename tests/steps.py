"""Five steps of the tiny quick start's encoder and contextualization on several meshes: their losses, as JSON.

    python tests/steps.py WORKDIR DATA,FSDP,TENSOR ...

Alone, or as one of the processes that the environment names; a mesh of 1,1,1 is the first device's.
"""

import json
import sys
from pathlib import Path

import jax
from etils import epath

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_quickstart import tiny_config

from user_llm.common import distributed
from user_llm.common import mesh as meshes
from user_llm.config.check import check
from user_llm.data.dataset import Dataset, open_dataset
from user_llm.phases.builders import BUILDERS
from user_llm.phases.run import Run
from user_llm.training.loop import LoopConfig, initial_state, settle_steps

STEPS = 5


def losses(run: Run, dataset: Dataset, name: str) -> list[float]:
    """Train from drawn parameters; nothing is loaded."""
    section = run.config.sections[name]
    task = BUILDERS[section.task](name, run, dataset)
    loop = settle_steps(LoopConfig(**vars(section.loop)), task)
    state, step = initial_state(task, loop, run.optimizer_config(name), run.mesh, run.seed)
    data, found = iter(task.train_data), []
    for _ in range(STEPS):
        state, scalars = step(state, meshes.put_batch(next(data), run.mesh) | meshes.put_whole(task.beside, run.mesh))
        found.append(float(scalars["loss"]))
    return found


def main() -> None:
    distributed.initialize()
    workdir, config = epath.Path(sys.argv[1]), tiny_config()
    config.data.streams = 2
    config.user_llm.encoder_init, config.user_llm.residual = "scratch", False
    config.user_llm.load = ((r".*", "fresh"),)
    read = check(config)
    dataset = open_dataset(read, workdir)
    found = {}
    for sizes in sys.argv[2:]:
        axes = [int(size) for size in sizes.split(",")]
        mesh = meshes.make_mesh(*axes, devices=jax.devices()[:1] if axes == [1, 1, 1] else None)
        run = Run(read, workdir, mesh)
        with jax.set_mesh(mesh):
            found[sizes] = {name: losses(run, dataset, name) for name in ("pretrain_encoder", "user_llm")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
