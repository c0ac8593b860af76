"""`user_llm.load`, which loads a model from a directory or from the hub."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from user_llm.common import mesh as meshes
from user_llm.models.families import FAMILIES, Family
from user_llm.models.pretrained import find_checkpoint, is_hub_name
from user_llm.serving import artifact, loading
from user_llm.serving.personalizer import Personalizer


def load(
    model: str | os.PathLike,
    *,
    llm: str | os.PathLike = "",
    device: jax.Device | str | None = None,
    mesh: Mesh | Sequence[int] | None = None,
    dtype: Any = None,
    encoders: Mapping[str, Any] | None = None,
    families: Mapping[str, Family] | None = None,
    items: Any = None,
) -> Personalizer:
    """Load a trained model.

        model = user_llm.load("runs/quickstart/user_llm/model")
        model = user_llm.load("organisation/name", device="cpu", dtype="float32")

    Args:
      model: a model directory, such as RUN/user_llm/model, or the name of a model on the hub. A model of the hub is downloaded once.
      llm: the directory or the hub name of the LLM. It is needed only where the model directory names its LLM, does not hold it, and
        the LLM is no longer where that name says.
      device: the device to compute on: a jax device, or the name of a platform such as "cpu". If it is not given, it is the first
        device of jax. Give `device` or `mesh`, and not both.
      mesh: several devices to compute on: a jax mesh, or the sizes (data, fsdp, tensor) of a mesh over all devices.
      dtype: the type of the parameters in computation: "float32", "bfloat16" or "float16". If it is not given, it is the type of
        the training.
      encoders: the encoder of a model that was trained with one of your own, by its kind: what `user_llm.run` was given.
      families: families of LLMs besides those of the package, likewise.
      items: items to add to the model's own, as in `Personalizer.add_items`.

    Raises:
      ValueError: an item is refused, there is no such model or device, the mesh does not fit the devices, or a file of the model is missing, altered or
        of an unknown format.
    """
    if mesh is not None and device is not None:
        raise ValueError("Give device or mesh, and not both.")
    if mesh is None:
        mesh = meshes.make_mesh(1, 1, 1, devices=[_device(device)])
    elif not isinstance(mesh, Mesh):
        if len(mesh) != len(meshes.AXES):
            raise ValueError(f"mesh={tuple(mesh)}: name the sizes of {', '.join(meshes.AXES)}.")
        mesh = meshes.make_mesh(*mesh)
    every = {**FAMILIES, **(families or {})}
    found = loading.load(find_model(model), llm=str(llm), mesh=mesh, dtype=dtype, encoders=encoders, families=every)
    return found if items is None else found.add_items(items)


def find_model(model: str | os.PathLike) -> Path:
    """Return the directory of a model: `model` itself, or a download of the hub's model of that name.

    Raises:
      ValueError: there is neither such a directory nor such a model on the hub.
    """
    if Path(model).exists():
        return Path(model)
    if not is_hub_name(str(model)):
        raise ValueError(
            f"There is no model at {model}: name a model directory, such as RUN/user_llm/model, or one on the hub."
        )
    return find_checkpoint(model, artifact.PATTERNS)


def _device(device: jax.Device | str | None) -> jax.Device:
    """Return a device, or the first one of a platform.

    Raises:
      ValueError: there is none of this platform.
    """
    if not isinstance(device, str | None):
        return device
    try:
        return jax.devices(device)[0]
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from error
