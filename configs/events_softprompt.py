"""User-LLM on your own events by soft prompt: the user's tokens stand among the prompt's, and no layer is added.

    python -m user_llm.main --config=configs/events_softprompt.py:small --config.data.dir=PATH --config.data.columns.order=position --config.data.columns.title=title --workdir=runs/events_softprompt

PATH is a Parquet, CSV or JSONL file, a folder or a glob; `--config.data.columns.user=...`, `.item`, `.time` or `.order`, `.title`,
`.categories`, `.numbers` and `.texts` say which column holds what, and `--config.data.name` what the report calls it.
`:small` is for 2 CPU cores, `:synthetic` needs no data, and the default is for one TPU host: `user_llm/config/experiments.py` has the sizes.
"""

from ml_collections import ConfigDict

from user_llm.config import experiments


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config of a variant of `experiments.experiment`."""
    return experiments.experiment("events", "softprompt", variant)
