"""`user_llm.load`: a model by its directory, or by its name on the hub."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from user_llm.common import mesh as meshes
from user_llm.models.pretrained import find_checkpoint
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer


def load(
    model: str | os.PathLike,
    *,
    llm: str | os.PathLike = "",
    device: jax.Device | str | None = None,
    mesh: Mesh | Sequence[int] | None = None,
    dtype: Any = None,
) -> Personalizer:
    """Return a trained model.

    Args:
      model: a model directory, such as RUN/user_llm/model, or the name of one on the hub, which is downloaded once.
      llm: where the LLM is that the directory names and does not hold; empty for what it is called there.
      device: a jax device, or the name of a kind such as "cpu"; the first there is if not given.
      mesh: several devices instead: a jax mesh, or the sizes (data, fsdp, tensor) of one over all devices.
      dtype: of the parameters in computation, such as "bfloat16"; as in training if not given.

    Raises:
      ValueError: no such model, or what is wrong with it, in one sentence.
    """
    if mesh is None:
        one = jax.devices(device)[0] if isinstance(device, str) or device is None else device
        mesh = meshes.make_mesh(1, 1, 1, devices=[one])
    elif not isinstance(mesh, Mesh):
        mesh = meshes.make_mesh(*mesh)
    directory = Path(model) if Path(model).exists() else find_checkpoint(model, artifact.PATTERNS)
    return artifact.load(directory, llm=str(llm), mesh=mesh, dtype=dtype)
