"""The flags and the main function that `python -m user_llm.encode` and `python -m user_llm.recommend` share."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from user_llm.common.printable import printable
from user_llm.common.terminal import set_up_log
from user_llm.serving import bulk
from user_llm.serving.front import load
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.tables import Encode, Recommend

_MODEL = flags.DEFINE_string("model", None, "Model directory, such as RUN/user_llm/model, or a model's name on the hub.")
_EVENTS = flags.DEFINE_string("events", None, "A file, a folder or a glob of events with the columns of the training data.")
_OUT = flags.DEFINE_string("out", None, "Folder for Parquet files; the same command, given again, continues.")
_LLM = flags.DEFINE_string("llm", "", "Directory or hub name of the LLM, if the model only names its LLM; empty for that name.")
_ITEMS = flags.DEFINE_string(
    "items", None, "Parquet file of items to add to the model's own, with the columns of its catalogue.parquet."
)
_SHARE = flags.DEFINE_string("share", "0/1", "The share of users of this process, as INDEX/COUNT: 0/4 is the first of four.")
_BAD_ROWS = flags.DEFINE_enum(
    "bad_rows", "refuse", ["refuse", "skip"], "Refuse stops at a row that cannot be read; skip leaves it out."
)


def run(make: Callable[[Personalizer], Encode | Recommend]) -> None:
    """Run a command: load the model, then write the results of all users to --out. A mistake of the caller ends in one sentence.

    Args:
      make: from the loaded model to the function that is applied to its users.
    """

    def main(argv: list[str]) -> None:
        set_up_log()
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
        try:
            function = make(load(str(_MODEL.value), llm=_LLM.value, items=_ITEMS.value))
            share, skip = bulk.Share.of(_SHARE.value), _BAD_ROWS.value == "skip"
            count = bulk.run(function, str(_EVENTS.value), Path(str(_OUT.value)), share=share, skip_bad=skip)
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError) as error:
            sys.exit(f"Error: {printable(error)}")
        print(f"{count:,} users: {_OUT.value}")

    flags.mark_flags_as_required(["model", "events", "out"])
    app.run(main)
