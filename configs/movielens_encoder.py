"""The user encoder alone on MovieLens: next item by a causal transformer, full softmax, full ranking.

    python -m user_llm.main --config=configs/movielens_encoder.py:small --config.data.dir=DIR --workdir=runs/movielens_encoder

DIR is a directory or zip of any MovieLens release, or a release's name, such as ml-20m, to download it.
`:small` is for 2 CPU cores, `:synthetic` needs no data, and the default is for one TPU host: `user_llm/config/experiments.py` has the sizes.
"""

from ml_collections import ConfigDict

from user_llm.config import experiments


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config of a variant of `experiments.experiment`."""
    return experiments.experiment("movielens", "encoder", variant)
