"""The user encoder alone on Google Local Review: next item by a causal transformer, full softmax, full ranking.

    python -m user_llm.main --config=configs/google_local_encoder.py:small --config.data.dir=DIR --config.data.states="('Vermont',)" --workdir=runs/google_local_encoder

DIR holds the reviews and places of the states that `--config.data.states="('Vermont',)"` names, in the layout of 2021.
`:small` is for 2 CPU cores, `:synthetic` needs no data, and the default is for one TPU host: `user_llm/config/experiments.py` has the sizes.
"""

from ml_collections import ConfigDict

from user_llm.config import experiments


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config of a variant of `experiments.experiment`."""
    return experiments.experiment("google_local", "encoder", variant)
