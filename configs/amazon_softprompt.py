"""User-LLM on Amazon Review by soft prompt: the user's tokens stand among the prompt's, and no layer is added.

    python -m user_llm.main --config=configs/amazon_softprompt.py:small --config.data.dir=DIR --workdir=runs/amazon_softprompt

DIR holds one category's reviews and products in the layout of 2014, 2018 or 2023; `--config.data.category=Gift_Cards` names another
category than Movies_and_TV.
`:small` is for 2 CPU cores, `:synthetic` needs no data, and the default is for one TPU host: `user_llm/config/experiments.py` has the sizes.
"""

from ml_collections import ConfigDict

from user_llm.config import experiments


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config of a variant of `experiments.experiment`."""
    return experiments.experiment("amazon", "softprompt", variant)
