"""What one way of answering a task was worth to each target; the rows of results.json are the means."""

import dataclasses
import zipfile
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from user_llm.common.files import whole
from user_llm.common.workdir import path_part

NUMBER = "number/"  # in front of a number's name in a file


@dataclasses.dataclass(frozen=True)
class Measured:
    """The metrics of every target.

    Attributes:
      users, positions: the targets: the user, and the events before it.
      values: of each metric.
      numbers: facts of the targets that a report breaks the values down by, `ranking.target_numbers`.
    """

    users: Int[np.ndarray, "n"]
    positions: Int[np.ndarray, "n"]
    values: dict[str, Float[np.ndarray, "n"]]
    numbers: dict[str, Int[np.ndarray, "n"]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def metrics(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    def save(self, folder: epath.Path, task: str, method: str) -> None:
        """Write `<task>.<method>.npz`, with `_` for the slashes of the method."""
        folder.mkdir(parents=True, exist_ok=True)
        name = path_part(f"{task}.{method.replace('/', '_')}", "The method")
        with whole(folder / f"{name}.npz") as path, path.open("wb") as file:
            facts: dict[str, Any] = {"task": task, "method": method, "users": self.users, "positions": self.positions}
            np.savez_compressed(file, **facts | self.values | {NUMBER + name: array for name, array in self.numbers.items()})


def load_measured(path: epath.Path) -> tuple[str, str, Measured]:
    """Return (task, method, what was measured) of a file that `Measured.save` wrote.

    Raises:
      ValueError: a file that is cut off or holds something else.
    """
    try:
        with path.open("rb") as whole, np.load(whole) as file:
            found = dict(file)
        task, method = (str(found.pop(name)) for name in ("task", "method"))
        users, positions = found.pop("users"), found.pop("positions")
        numbers = {name.removeprefix(NUMBER): found.pop(name) for name in list(found) if name.startswith(NUMBER)}
        return task, method, Measured(users, positions, found, numbers)
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no values of targets ({error}): delete it and run the evaluation again.") from error
