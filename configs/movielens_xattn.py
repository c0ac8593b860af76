"""User-LLM on MovieLens: encoder, LLM, gated cross-attention, and both text-prompt baselines; next film, full ranking.

    python -m user_llm.main --config=configs/movielens_xattn.py:small --config.data.dir=DIR --workdir=runs/xattn

`small` is for 2 CPU cores and sets like ml-latest-small; the default is for MovieLens-20M on one TPU host. DIR is a directory or
zip of any MovieLens release, or a release's name, such as ml-20m, to download it. `--config.llm.checkpoint=PATH` takes a Llama
checkpoint in Hugging Face layout instead of training a small decoder (then leave `pretrain_lm` out of `--config.phases`).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "full") -> ConfigDict:
    """Return the config; `variant` is `full` or `small`."""
    config = common.base()
    config.phases = ("pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10", "text_prompt_50")
    if variant == "small":
        common.small(config)
        config.user_llm = common.contextualize("user_llm", total_steps=3000, eval_steps=250)
        config.user_llm.eval.generate_users = 500
        config.text_prompt_10 = common.text_prompt(10, total_steps=3000, eval_steps=250, max_tokens=160, batch_size=16)
        config.text_prompt_50 = common.text_prompt(50, total_steps=2000, eval_steps=250, max_tokens=640, batch_size=4)
    elif variant == "full":
        common.full_size(config)
        config.user_llm = common.contextualize("user_llm", total_steps=50_000, eval_steps=1000, batch_size=128)
        config.user_llm.eval.generate_users = 5000
        config.text_prompt_10 = common.text_prompt(10, total_steps=50_000, eval_steps=1000, max_tokens=160, batch_size=512)
        config.text_prompt_50 = common.text_prompt(50, total_steps=50_000, eval_steps=1000, max_tokens=640, batch_size=128)
        common.use_bfloat16(config)
    else:
        raise ValueError(f"Unknown variant {variant!r}: choose full or small.")
    return config
