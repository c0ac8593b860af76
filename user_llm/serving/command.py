"""What the commands over all users of event files share: `python -m user_llm.encode` and `python -m user_llm.recommend`."""

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
_EVENTS = flags.DEFINE_string("events", None, "A file, a folder or a glob of events, in the columns that the model names.")
_OUT = flags.DEFINE_string("out", None, "Folder for Parquet files; the same command goes on where it was stopped.")
_LLM = flags.DEFINE_string("llm", "", "Where the LLM is that the model names; empty for what it is called there.")
_SHARE = flags.DEFINE_string("share", "0/1", "Which share of the users this process takes, as INDEX/COUNT.")
_BAD_ROWS = flags.DEFINE_enum("bad_rows", "refuse", ["refuse", "skip"], "Refuse rows that cannot be read, or leave them out.")


def run(make: Callable[[Personalizer], Encode | Recommend]) -> None:
    """Run a command, and end a user's mistake in one sentence."""

    def main(argv: list[str]) -> None:
        set_up_log()
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
        try:
            function = make(load(str(_MODEL.value), llm=_LLM.value))
            share, skip = bulk.Share.of(_SHARE.value), _BAD_ROWS.value == "skip"
            count = bulk.run(function, str(_EVENTS.value), Path(str(_OUT.value)), share=share, skip_bad=skip)
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError) as error:
            sys.exit(f"Error: {printable(error)}")
        print(f"{count:,} users: {_OUT.value}")

    flags.mark_flags_as_required(["model", "events", "out"])
    app.run(main)
