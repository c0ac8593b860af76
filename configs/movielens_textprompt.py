"""The text-prompt baselines alone on MovieLens: the decoder reads the last 10 or 50 films as text.

    python -m user_llm.main --config=configs/movielens_textprompt.py:small --config.data.dir=DIR --workdir=runs/textprompt

Sizes and steps are those of configs/movielens_xattn.py, whose runs have these baselines too.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config; `variant` is `full` or `small`."""
    return common.movielens(variant, phases=("pretrain_lm", "text_prompt_10", "text_prompt_50"))
