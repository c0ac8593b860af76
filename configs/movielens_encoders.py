"""Encoders side by side on MovieLens: autoregressive, BERT4Rec and dual encoder, each alone; next film, full ranking.

    python -m user_llm.main --config=configs/movielens_encoders.py:small --config.data.dir=DIR --workdir=runs/encoders

`--config.phases` chooses among them. `user_llm_bert4rec`, `user_llm_dual` and `user_llm_scratch`, with `pretrain_lm` before them,
are User-LLM with each of these encoders, and with one that was never pretrained.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config of a variant of `datasets.experiment`."""
    return datasets.experiment("movielens", "encoders", variant)
