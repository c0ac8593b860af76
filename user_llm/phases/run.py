"""`Run`: what all phases of a run share besides the data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import grain
from etils import epath
from jax.sharding import Mesh

from user_llm.common import mesh as meshes
from user_llm.common.distributed import is_first
from user_llm.common.files import local_folder
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset
from user_llm.data.streams import Streams
from user_llm.evals.measured import Measured
from user_llm.evals.ranking import result_rows, target_numbers
from user_llm.models import pretrained
from user_llm.phases.kinds import Kinds
from user_llm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      config: all that the config file and the flags say, typed.
      workdir: holds one directory for each phase.
      mesh: the devices.
      kinds: what the config may name.
      identities: by phase, the hash of all that the phase depends on. Result rows hold it as `config_hash`. It is empty where nobody
        has settled what becomes of the run's directory (`depends.settle_run`).
      command: the command line that began the run; empty for one that a program began.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    kinds: Kinds = dataclasses.field(default_factory=Kinds)
    identities: Mapping[str, str] = dataclasses.field(default_factory=dict)
    command: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def local(self) -> Path:
        """Where this machine keeps what it makes of the data."""
        return local_folder(self.workdir)

    def of(self, identities: Mapping[str, str]) -> "Run":
        """Return the same run with the identities of its phases."""
        return dataclasses.replace(self, identities=identities)

    @functools.cached_property
    def checkpoint(self) -> Path:
        """The directory of the open LLM, downloaded if need be."""
        return pretrained.find_checkpoint(self.config.llm.checkpoint)

    def streams(self, make: Callable[[tuple[int, int], int], grain.IterDataset], rows: int) -> Streams:
        """Return batches of `rows` rows, of which this process reads its share; `make((number, count), rows)` returns a stream.

        Raises:
          ValueError: streams that do not divide the rows, or processes that do not divide the streams.
        """
        share = meshes.row_share(self.mesh)
        count = self.config.data.streams or share.count
        if count % share.count or rows % count:
            raise ValueError(
                f"{rows} rows from {count} streams cannot be shared evenly by {share.count} processes: change the batch, or "
                "data.streams."
            )
        each = count // share.count
        return Streams({n: make((n, count), rows // count) for n in range(share.index * each, (share.index + 1) * each)})

    def optimizer_config(self, name: str) -> OptimizerConfig:
        """Return the optimizer of a phase."""
        return OptimizerConfig(**vars(self.config.sections[name].optimizer), trainable=self.config.trainable(name))

    def row_facts(self, phase: str, data: Dataset) -> dict:
        """Return the columns that all result rows of a phase share."""
        identity = self.identities.get(phase, "")
        return {"dataset": data.name, "seed": self.seed, "split": data.split.name, "config_hash": identity}

    def record(
        self, phase: str, data: Dataset, task: str, method: str, measured: Measured, *,
        together: Mapping[str, float] | None = None, controls: bool = False,
    ) -> list[dict]:  # fmt: skip
        """Return the result rows of what was measured; leave each target's values for the report.

        Args:
          together: further metrics, of all targets together.
          controls: whether it is what `measure_controls` returns, which holds metrics again that have their rows already.
        """
        if task == "next_item":
            numbers = target_numbers(data.timelines, measured.users, measured.positions, data.train_counts)
            measured = dataclasses.replace(measured, numbers=numbers)
        if is_first():
            measured.save(self.workdir / phase / ("controls" if controls else "values"), task, method)
        metrics = {name: value for name, value in measured.metrics.items() if not controls or "/" in name} | dict(
            together or {}
        )
        return result_rows(metrics, len(measured), **self.row_facts(phase, data), task=task, method=method)
