"""The user encoder alone on MovieLens: next film by a causal transformer, full softmax, full ranking.

    python -m user_llm.main --config=configs/movielens_encoder.py:small --config.data.dir=DIR --workdir=runs/encoder

Sizes and steps are those of configs/movielens_xattn.py, whose encoder this is.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config; `variant` is `full` or `small`."""
    return common.movielens(variant, phases=("pretrain_encoder",))
