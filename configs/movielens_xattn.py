"""User-LLM on MovieLens: encoder, LLM, gated cross-attention, and both text-prompt baselines; next film, full ranking.

    python -m user_llm.main --config=configs/movielens_xattn.py:small --config.data.dir=DIR --workdir=runs/xattn

`small` is for 2 CPU cores and sets like ml-latest-small; the default is for MovieLens-20M on one TPU host. DIR is a directory or
zip of any MovieLens release, or a release's name, such as ml-20m, to download it. `--config.llm.checkpoint=PATH` takes an open
LLM in Hugging Face layout instead of training a small one, and `:gemma3_270m`, `:gemma3_1b`, `:qwen3_0_6b`, `:llama3_2_1b` and
`:smollm2_135m` name one on the hub; `--config.user_llm.strategy=` says what of it trains: `full`, `lora`, `enc` or `proj`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config; `variant` is `full`, `small`, or an open LLM of `common.LLMS`."""
    phases = ("pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10", "text_prompt_50")
    return common.movielens(variant, phases=phases)
