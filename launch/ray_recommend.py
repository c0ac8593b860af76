"""Recommendations for all users of Parquet files, on as many machines as a Ray cluster has (`pip install -e ".[ray]"`).

    python launch/ray_recommend.py --model=MODEL --events=EVENTS --out=OUT --workers=2

Ray brings all events of a user into one block. Each worker loads the model once, and recommends to the users of a block at a time.
"""

import argparse
import sys

import ray
from ray.exceptions import RayError

import user_llm
from user_llm.common.printable import printable
from user_llm.serving.tables import Recommend


def recommend(model: str, events: str, out: str, *, k: int, blocks: int, workers: int, gpus: float) -> None:
    """Read events, recommend `k` items to each of their users, and write the recommendations."""
    table = ray.data.read_parquet(events)
    there = table.schema().names
    fields = user_llm.load(model, device="cpu").vocabulary.fields
    if missing := {fields.user, fields.item, fields.time} - set(there):
        raise ValueError(f"{events} has no column {', '.join(sorted(missing))}; it has {', '.join(there)}.")
    table = table.select_columns([name for name in fields.columns() if name in there])
    # Workers start before the events are read. Workers that reserved CPUs could leave none for reading, and the command would hang.
    users = table.repartition(blocks, keys=[fields.user])
    ranked = users.map_batches(
        Recommend, fn_constructor_args=[model], fn_constructor_kwargs={"k": k}, batch_format="pyarrow", batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=0, num_gpus=gpus,
    )  # fmt: skip
    ranked.write_parquet(out, mode=ray.data.SaveMode.ERROR)


def main() -> None:
    """Run the command. A mistake of the caller ends in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory that all machines see, or a model's name on the hub")
    parser.add_argument("--events", required=True, help="Parquet files, with the columns of the training data")
    parser.add_argument("--out", required=True, help="folder for Parquet files of user, rank, item, title and score")
    parser.add_argument("--k", type=int, default=10, help="items for each user")
    parser.add_argument("--blocks", type=int, default=200, help="blocks of users; a block and its results must fit in memory")
    parser.add_argument("--workers", type=int, default=2, help="processes that each hold the model")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker")
    args = parser.parse_args()
    try:
        recommend(**vars(args))
    except (ValueError, OSError, RayError) as error:
        # What Ray raises holds the traceback of the worker as text. The mistake is the line that names a ValueError.
        said = [line.removeprefix("ValueError: ") for line in str(error).splitlines() if line.startswith("ValueError: ")]
        sys.exit(f"Error: {printable(said[0] if said else error)}")


if __name__ == "__main__":
    main()
