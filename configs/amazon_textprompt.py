"""The text-prompt baselines alone on Amazon Review: the decoder reads the last 10 or 50 products as text.

    python -m user_llm.main --config=configs/amazon_textprompt.py:small --config.data.dir=DIR --workdir=runs/amazon_textprompt

DIR holds one category's reviews and products in the layout of 2014, 2018 or 2023; `--config.data.category=Gift_Cards` names another
category than Movies_and_TV.
`:small` is for 2 CPU cores, `:synthetic` needs no data, and the default is for one TPU host: `user_llm/config/experiments.py` has the sizes.
"""

from ml_collections import ConfigDict

from user_llm.config import experiments


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config of a variant of `experiments.experiment`."""
    return experiments.experiment("amazon", "textprompt", variant)
