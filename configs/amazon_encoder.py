"""The user encoder alone on Amazon Review: next item by a causal transformer, full softmax, full ranking.

    python -m user_llm.main --config=configs/amazon_encoder.py:small --config.data.dir=DIR --workdir=runs/amazon_encoder

DIR holds one category's reviews and products in the layout of 2014, 2018 or 2023; `--config.data.category=Gift_Cards` names another
category than Movies_and_TV.
`:small` is for 2 CPU cores, `:synthetic` needs no data, and the default is for one TPU host: `user_llm/config/experiments.py` has the sizes.
"""

from ml_collections import ConfigDict

from user_llm.config import experiments


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config of a variant of `experiments.experiment`."""
    return experiments.experiment("amazon", "encoder", variant)
