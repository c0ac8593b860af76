"""Recommendations for all users of Parquet files, on as many machines as Ray has (`pip install -e ".[ray]"`).

    python launch/ray_recommend.py --model=MODEL --events=EVENTS --out=OUT --workers=2

Ray brings all events of a user to one block (`repartition` by the column of users), and each worker loads the model once.
"""

import argparse

import ray

import user_llm
from user_llm.serving.tables import Recommend


def main() -> None:
    """Read, recommend, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory that all machines see, or a model's name on the hub")
    parser.add_argument("--events", required=True, help="Parquet files, in the columns that the model names")
    parser.add_argument("--out", required=True, help="folder for Parquet files of user, rank, item, title and score")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--blocks", type=int, default=200, help="blocks that hold whole users; each must fit into a worker's memory"
    )
    args = parser.parse_args()
    fields = user_llm.load(args.model).vocabulary.fields
    events = ray.data.read_parquet(args.events, columns=fields.columns())
    blocks = events.repartition(args.blocks, keys=[fields.user])
    ranked = blocks.map_batches(
        Recommend, fn_constructor_args=[args.model], fn_constructor_kwargs={"k": args.k}, batch_format="pyarrow",
        batch_size=None, concurrency=args.workers,
    )  # fmt: skip
    ranked.write_parquet(args.out)


if __name__ == "__main__":
    main()
