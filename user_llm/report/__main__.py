"""Merge what runs left into one report.

python -m user_llm.report RUN [RUN...] [--reference=METHOD] [--metric=NAME] [--cost=cost.json] [--out=DIR]
"""

from absl import app, flags, logging

from user_llm.common.printable import printable
from user_llm.report.build import write_report


def main(argv: list[str]) -> None:
    """Write the report of the runs named on the command line."""
    try:
        told = flags.FLAGS
        path = write_report(*argv[1:], costs=told.cost, out=told.out, reference=told.reference, metric=told.metric)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {printable(error)}") from None
    logging.info("wrote %s", path)


if __name__ == "__main__":
    # Defined here so that importing this module adds no flag to another program.
    flags.DEFINE_string("out", None, "Folder of the merged report; the first run's by default.")
    flags.DEFINE_string(
        "reference", "", "The method that the others are compared with, in each task that has it; user_llm by default."
    )
    flags.DEFINE_string(
        "metric", "", "The metric by which they are compared, in each task that has it; recall@10 for the next item by default."
    )
    flags.DEFINE_string("cost", "", "What launch/benchmark_cost.py wrote, to be shown too.")
    app.run(main)
