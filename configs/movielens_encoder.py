"""The user encoder alone on MovieLens: next film by a causal transformer, full softmax, full ranking.

    python -m user_llm.main --config=configs/movielens_encoder.py:small --config.data.dir=DIR --workdir=runs/encoder

`small` is for 2 CPU cores and sets like ml-latest-small; the default is for MovieLens-20M on one TPU host. DIR is a directory or
zip of any MovieLens release, or a release's name, such as ml-20m, to download it.
"""

from configs import common
from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config; `variant` is `full` or `small`."""
    config = common.base()
    config.phases = ("pretrain_encoder",)
    if variant == "small":
        config.pretrain_encoder = common.pretrain_encoder(total_steps=4000, eval_steps=100)
    elif variant == "full":
        common.full_size_encoder(config)
    else:
        raise ValueError(f"Unknown variant {variant!r}: choose full or small.")
    return config
