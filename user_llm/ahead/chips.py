"""TPU chips and topologies, known without a TPU: libtpu (extra `tpu`) describes any of them and compiles for it.

The figures are those of Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" (docs.cloud.google.com/tpu/docs);
a GB of memory is taken as 10^9 bytes, which is never too much.
"""

import dataclasses
import os
from importlib.util import find_spec

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      memory: of HBM, bytes.
      flops: peak of bfloat16 products, per second.
      memory_rate: of HBM, bytes per second.
      link_rate: of all links to other chips together, both ways, bytes per second.
      devices: that JAX sees in it.
    """

    memory: float
    flops: float
    memory_rate: float
    link_rate: float
    devices: int = 1


CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9, 400e9),
    "v5p": Chip(95e9, 459e12, 2765e9, 1200e9),
    "v6e": Chip(32e9, 918e12, 1638e9, 800e9),
    "tpu7x": Chip(192e9, 2307e12, 7380e9, 1200e9, devices=2),
}
# libtpu asks for a machine around it, even where it only describes one. None of these says what is compiled for.
MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two may compile at a time
}


def find_topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """Return the chip and the devices of a topology such as `v5e:2x4`.

    Raises:
      ValueError: a topology that there is not, or no libtpu.
    """
    chip = CHIPS.get(name.split(":")[0])
    if chip is None or ":" not in name:
        raise ValueError(f"Unknown topology {name!r}: name one of {', '.join(CHIPS)} and its form, such as v5e:2x4.")
    for variable, value in MACHINE.items():
        os.environ.setdefault(variable, value)
    # A host has four chips unless it says otherwise.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith((":1x1", ":1x1x1")) else {}
    try:
        return chip, topologies.get_topology_desc(name, platform="tpu", **alone).devices
    except Exception as error:  # libtpu raises nothing more precise
        said = str(error).strip().splitlines()[0]
        if "libtpu" in said and find_spec("libtpu") is None:
            raise ValueError('Compiling for a TPU needs libtpu: pip install -e ".[tpu]".') from error
        raise ValueError(f"Cannot describe the topology {name!r}: {said}") from error
