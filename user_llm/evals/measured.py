"""What one way of answering a task was worth to each target; the rows of results.json are the means."""

import dataclasses
import io
import zipfile
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from user_llm.common.files import whole
from user_llm.common.records import read_file
from user_llm.common.workdir import path_part

NUMBER = "number/"  # in front of a number's name in a file
MAX_BYTES = 2**30  # of all arrays of a file
RANDOM_USER, NO_USER = "random_user", "no_user"  # after a metric's slash: measured with another user's history, and with none


@dataclasses.dataclass(frozen=True)
class Measured:
    """The metrics of every target.

    Attributes:
      users, positions: the targets: the user, and the events before it.
      values: of each metric.
      numbers: facts of the targets that a report breaks the values down by, `ranking.target_numbers`.
    """

    users: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    values: dict[str, Float[np.ndarray, " n"]]
    numbers: dict[str, Int[np.ndarray, " n"]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def metrics(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    def first(self, count: int) -> "Measured":
        """Return the values of the first `count` targets."""
        part = lambda columns: {name: column[:count] for name, column in columns.items()}  # noqa: E731
        return Measured(self.users[:count], self.positions[:count], part(self.values), part(self.numbers))

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
        opened = io.BytesIO(read_file(path))
        with zipfile.ZipFile(opened) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > MAX_BYTES:
                raise ValueError(f"its arrays take {size:,} bytes, more than the {MAX_BYTES:,} that are read")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        task, method = (_name(arrays.pop(name)) for name in ("task", "method"))
        users, positions = (_column(name, arrays.pop(name), "iu", None) for name in ("users", "positions"))
        columns = {
            name: _column(name, array, "iu" if name.startswith(NUMBER) else "biuf", len(users))
            for name, array in arrays.items()
        }
        numbers = {name.removeprefix(NUMBER): array for name, array in columns.items() if name.startswith(NUMBER)}
        values = {name: array.astype(np.float64) for name, array in columns.items() if not name.startswith(NUMBER)}
        if len(users) == 0 or len(positions) != len(users) or not values:
            raise ValueError("no values, or not as many users as positions")
        return task, method, Measured(users, positions, values, numbers)
    except Exception as error:  # numpy and zipfile raise a dozen kinds on bytes that are not theirs
        raise ValueError(f"{path} holds no values of targets ({error}): delete it and run the evaluation again.") from error


def _name(array: np.ndarray) -> str:
    if array.ndim or array.dtype.kind != "U":
        raise ValueError("a task or method that is no text")
    return str(array)


def _column(name: str, array: np.ndarray, kinds: str, length: int | None) -> np.ndarray:
    """Return a column of numbers as it is, one for each target."""
    if array.ndim != 1 or array.dtype.kind not in kinds or length not in (None, len(array)):
        raise ValueError(f"{name!r} is no column of numbers, one for each target")
    if not np.all(np.abs(array.astype(np.float64)) < 1e100):
        raise ValueError(f"{name!r} has a value that is no finite number")
    return array
