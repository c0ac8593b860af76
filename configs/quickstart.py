"""The whole method in minutes on a laptop, from nothing: a synthetic world of film watchers.

    python -m user_llm.main --config=configs/quickstart.py --workdir=runs/quickstart

Pretrains the encoder and a small LLM, contextualizes the LLM by gated cross-attention, trains both text-prompt baselines on the
same LLM, ranks the full catalogue with each, and writes runs/quickstart/report.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Return the config."""
    config = common.base()
    config.data.source = "synthetic"
    config.phases = ("pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10", "text_prompt_50")
    config.encoder.update(max_events=64, block=common.block(64, 2, 128, dropout=0.1), dropout=0.1)
    config.llm.update(vocab_size=768, num_layers=2, block=common.block(64, 2, 192, dropout=0.0))
    config.pretrain_encoder = common.pretrain_encoder(
        total_steps=400,
        eval_steps=200,
        batch={"window": 64, "rows": 48, "row_length": 64},
        optimizer=common.optimizer(3e-3, schedule="cosine", warmup_steps=30),
    )
    config.pretrain_lm = common.pretrain_lm(total_steps=100, eval_steps=50)
    config.pretrain_lm.optimizer.warmup_steps = 30
    config.user_llm = common.contextualize(
        "user_llm",
        total_steps=240,
        batch_size=16,
        eval_steps=120,
        examples={"max_events": 64, "targets_per_history": 8, "text_items": 0, "history": "titles"},
        prompts=common.prompts("The next film this user watches:", max_tokens=24, max_title_tokens=12),
        optimizer=common.optimizer(3e-3, schedule="cosine", warmup_steps=30, lr_multiplier=common.CONTEXTUAL_LEARNING_RATES),
    )
    config.user_llm.cross.every = 1
    # All three see about 30,700 training targets: 240 x 128, 96 x 32 x 10, 96 x 8 x (about) 40.
    optimizer = common.optimizer(3e-3, schedule="cosine", warmup_steps=30)
    config.text_prompt_10 = common.text_prompt(
        10, total_steps=96, eval_steps=48, max_tokens=128, batch_size=32, optimizer=optimizer
    )
    config.text_prompt_50 = common.text_prompt(
        50, total_steps=96, eval_steps=48, max_tokens=512, batch_size=8, optimizer=optimizer
    )
    for name in ("user_llm", "text_prompt_10", "text_prompt_50"):
        config[name].eval.validation_users = 200
    config.user_llm.eval.generate_users = 200
    return config
