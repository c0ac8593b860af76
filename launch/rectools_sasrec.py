"""The peer of benchmark_encoder.py: times training batches of RecTools' SASRec (runs in an environment with RecTools)."""

import json
import pathlib
import resource
import sys
import time

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

WARM_UP, TIMED = 1, 4  # batches of 128 users


# Per batch: when it ended and how many real targets it had. Not kept on the callback: RecTools trains with a copy of it.
BATCHES: list[tuple[float, int]] = []


class Clock(Callback):
    """Notes the end of each batch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        BATCHES.append((time.monotonic(), int((batch["y"] > 0).sum())))


def main(directory: str) -> None:
    """Train a few batches on a MovieLens directory and print one line of JSON."""
    torch.set_num_threads(2)
    ratings = pd.read_csv(pathlib.Path(directory) / "ratings.csv")
    ratings.columns = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    ratings[Columns.Datetime] = pd.to_datetime(ratings[Columns.Datetime], unit="s")

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=1, limit_train_batches=WARM_UP + TIMED, accelerator="cpu", callbacks=[Clock()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    model = SASRecModel(
        n_factors=128, n_blocks=2, n_heads=2, session_max_len=200, loss="softmax", batch_size=128, dropout_rate=0.2,
        get_trainer_func=trainer,
    )  # fmt: skip
    model.fit(Dataset.construct(ratings))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start, end = BATCHES[WARM_UP - 1][0], BATCHES[-1][0]
    events = sum(events for _, events in BATCHES[WARM_UP:])
    print(json.dumps({"events_per_s": events / (end - start), "peak_gib": peak}))


if __name__ == "__main__":
    main(sys.argv[1])
