"""What a phase tells while it runs: metrics.jsonl, TensorBoard events, and a line of progress.

On a terminal, progress is a bar with ETA, events/s and loss; elsewhere a plain log line at each
logging interval. Only process 0 writes and shows anything; every process checks that its losses
are finite. A remote workdir gets copies of local files, at each evaluation, save and at the end.
Histograms and images are left out.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
from absl import logging
from etils import epath
from tqdm import tqdm

from user_llm.common import records
from user_llm.common.files import is_remote, local_folder, whole

# tensorboardX imports torch wherever torch is installed, although it needs torch only for torch's tensors. Importing torch takes seconds.
# While `sys.modules` holds None for a name, Python takes the module for missing.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
from tensorboardX import SummaryWriter  # noqa: E402

if sys.modules["torch"] is None:
    del sys.modules["torch"]

LINE = {"step": records.whole_number, "kind": records.text}
# Of results.json: what `evals/ranking.py: result_rows` returns. What was trained has `targets_seen` too: how many training targets its
# parameters saw.
ROW = {
    "dataset": records.text, "task": records.text, "method": records.text, "metric": records.text, "value": records.number,
    "n": records.whole_number, "seed": records.whole_number, "split": records.text, "config_hash": records.text,
    "targets_seen?": records.whole_number,
}  # fmt: skip
ROWS = [ROW]


class MetricsLog:
    """Logs one phase; a context manager.

    Each line of metrics.jsonl is {"step", "kind": "train" | "eval", name: number, ...}; a number
    that is not finite is null. A run resumed at `step` drops the lines beyond it (all lines, if it
    starts at 0), so that its file has the same steps as that of an uninterrupted run; TensorBoard
    drops them too, and spells names in its own way (`recall_10`).

    Args:
      workdir: the phase's directory, made if missing.
      name: of the phase, for messages.
      step: the step that training starts or resumes at.
      total_steps: for the ETA.
    """

    def __init__(self, workdir: epath.PathLike, name: str, *, step: int = 0, total_steps: int):
        self._name, self._total = name, total_steps
        self._checked = step
        # When the first line came, and at which step: what came before has compiled.
        self._paced: tuple[float, int] | None = None
        self._watched = ""  # one metric of the last evaluation, for the lines that follow
        self._file: Any = None
        self._board: Any = None
        self._bar: Any = None
        if jax.process_index() != 0:
            return
        self._workdir = epath.Path(workdir)
        self._local = epath.Path(local_folder(workdir))
        self._local.mkdir(parents=True, exist_ok=True)
        path = self._local / "metrics.jsonl"
        if is_remote(workdir) and (self._workdir / path.name).exists():
            path.write_text((self._workdir / path.name).read_text())  # whatever an earlier run has left here
        _truncate(path, step)
        self._file = path.open("a")
        # The suffix keeps a quick restart within the same second from overwriting the file before.
        self._board = SummaryWriter(
            str(self._local / "tensorboard"),
            purge_step=step + 1 if step else 0,
            filename_suffix=f".{step}",
        )
        # disable=None: no bar where stderr is no terminal.
        self._bar = tqdm(total=total_steps, initial=step, desc=name, unit=" steps", disable=None, file=sys.stderr)

    def train(self, step: int, scalars: Mapping[str, Any], *, events_per_s: float, run_left: float | None = None) -> None:
        """Log training scalars, means over the steps since the last call.

        Args:
          run_left: the seconds that are left of the whole run, if anyone knows.

        Raises:
          FloatingPointError: a loss or the gradient norm is NaN or infinite.
        """
        scalars = {name: float(value) for name, value in scalars.items()}
        self.check_finite(step, {k: v for k, v in scalars.items() if k.endswith("loss") or k == "grad_norm"})
        self._write("train", step, {**scalars, "events_per_s": events_per_s})
        if self._bar is None:
            return
        facts = f"loss {scalars['loss']:.4g}, {self._watched}{events_per_s:,.0f} events/s"
        facts += "" if run_left is None else f", run ETA {tqdm.format_interval(run_left)}"
        if self._bar.disable:
            logging.info("%s: step %d/%d, %s%s", self._name, step, self._total, facts, self._eta(step))
        else:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(step - self._bar.n)

    def _eta(self, step: int) -> str:
        """Return what a line says of the time left of the phase: nothing before two lines tell how fast it goes."""
        now = time.monotonic()
        since, first = self._paced = self._paced or (now, step)
        if step == first:
            return ""
        return f", phase ETA {tqdm.format_interval((self._total - step) * (now - since) / (step - first))}"

    def eval(self, step: int, scalars: Mapping[str, Any], *, targets_seen: int | None = None) -> None:
        """Log validation metrics, and how many training targets were seen until then if anyone knows."""
        scalars = {name: float(value) for name, value in scalars.items()}
        self._write("eval", step, scalars if targets_seen is None else {**scalars, "targets_seen": targets_seen})
        if watched := next((name for name in ("recall@10", *scalars) if name in scalars), ""):
            self._watched = f"validation {watched} {scalars[watched]:.4g}, "
        if self._bar is not None:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
            with tqdm.external_write_mode(file=sys.stderr):  # Clears the bar, if any, and draws it again below the line.
                logging.info("%s: step %d, validation %s", self._name, step, shown)
        self.publish()

    def publish(self) -> None:
        """Copy what was logged so far to a remote workdir."""
        if self._file is None or not is_remote(self._workdir):
            return
        self._board.flush()
        for path in (self._local / "metrics.jsonl", *(self._local / "tensorboard").iterdir()):
            copy = self._workdir / path.relative_to(self._local)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())

    def check_finite(self, step: int, scalars: Mapping[str, float]) -> None:
        """Refuse to go on with a NaN or infinite scalar, naming phase, steps and metric.

        Raises:
          FloatingPointError: with one sentence for the user.
        """
        first, self._checked = min(self._checked + 1, step), step
        for name, value in scalars.items():
            if not math.isfinite(value):
                steps = f"step {step}" if first == step else f"steps {first} to {step}"
                raise FloatingPointError(
                    f"{self._name}: {name} became {value} in {steps}; lower the learning "
                    "rate or compute in float32, and run again."
                )

    def close(self) -> None:
        """Flush and close everything; harmless when repeated."""
        self.publish()
        for part in (self._bar, self._board, self._file):
            if part is not None:
                part.close()
        self._file = self._board = self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _write(self, kind: str, step: int, scalars: dict[str, float]) -> None:
        if self._file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            # TensorBoard allows no @ in names, and its writer warns of each.
            self._board.add_scalar(f"{kind}/{name}".replace("@", "_"), value, step)


def read_metrics(path: epath.PathLike) -> list[dict]:
    """Read a metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
      ValueError: another line is not a line of metrics.
    """
    path = epath.Path(path)
    lines = records.read_file(path).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = records.parse(line)
            wrong = records.misfit(row, LINE)
            wrong = wrong or records.misfit(row, dict.fromkeys(row.keys() - LINE.keys(), records.number_or_null))
        except ValueError:
            if number == len(lines):
                break
            wrong = "not JSON"
        if wrong:
            raise ValueError(f"{path}, line {number}: not a line of metrics ({wrong}); delete it, or the file.")
        rows.append(row)
    return rows


def _truncate(path: epath.Path, step: int) -> None:
    """Drop the rows beyond `step`, at step 0 all; replaces the file whole, so no kill harms it."""
    rows = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
    with whole(path) as target:
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
