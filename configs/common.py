"""What all experiments share: defaults, the phases of a run, and the rule lists.

Every key is declared here; a config file sets what makes it itself. Rules are ordered (regex, value) pairs over parameter
paths such as `decoder/stack/blocks/attn/q`; the first that is found wins.
"""

from ml_collections import ConfigDict

# What never decays: gates, norms, biases, embeddings, latents and other tables.
DECAY = (
    (r"(gate|mlp_gate|scale|latents|recency|position|bias)$", False),
    (r"(^|/)(item|items|embed)$", False),
    (r"(^|/)features/", False),
    (r".*", True),
)

# The axes of the mesh that split each parameter; leading axes (layers) stay whole.
SHARDING = (
    (r"attn/(q|k|v)$|cross/(q|k|v)$|layers/\d+/(q|k|v)$", ("fsdp", "tensor", None)),
    (r"attn/o$|cross/o$|layers/\d+/o$", ("tensor", None, "fsdp")),
    (r"mlp/(gate_proj|up)$", ("fsdp", "tensor")),
    (r"mlp/down$", ("tensor", "fsdp")),
    (r"(^|/)(item|items|embed)$", ("tensor", "fsdp")),
    (r"(^|/)(project|item_head|head|attn_gate)$|blocks/mlp_gate$", ("fsdp", "tensor")),
    (r".*", ()),
)

# The strategies of contextualization: what trains, and whether the LLM gets low-rank adapters. The names are
# the paper's; which parts each of them trains is our reading of it.
ITS_HEADS = (r"^encoder/heads/", False)  # the encoder's heads are of use in pretraining alone
USER_SIDE = (r"^decoder/stack/cross/", True)
BARE_LLM = (r"^decoder/", False)
STRATEGIES = {
    "all": {"adapters": False, "trainable": ((r".*", True),)},
    "full": {"adapters": False, "trainable": (ITS_HEADS, (r".*", True))},
    "lora": {"adapters": True, "trainable": (ITS_HEADS, USER_SIDE, (r"/lora/", True), BARE_LLM, (r".*", True))},
    "enc": {"adapters": False, "trainable": (ITS_HEADS, USER_SIDE, BARE_LLM, (r".*", True))},
    "proj": {"adapters": False, "trainable": (USER_SIDE, BARE_LLM, (r"^encoder/", False), (r".*", True))},
}

# The pretrained encoder moves slowly, the gates, which start shut, quickly.
CONTEXTUAL_LEARNING_RATES = ((r"^encoder/", 0.1), (r"cross/gate$", 10.0), (r".*", 1.0))

# Where each part of a contextualized LLM starts from.
LOAD = (
    (r"^encoder/", "pretrain_encoder"),
    (r"^decoder/stack/cross/|/lora/", "fresh"),
    (r"^decoder/", "pretrain_lm"),
    (r".*", "fresh"),
)

# Open LLMs by name: the model on the hub, and what its config.json says, so that shapes are known without a download. The
# settings are those of the models' pages on huggingface.co; what is not said here is the family's default in transformers.
GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 262_144, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLMS = {
    "gemma3_270m": ("google/gemma-3-270m", GEMMA3 | {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    }),
    "gemma3_1b": ("google/gemma-3-1b-pt", GEMMA3 | {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
    }),
    "qwen3_0_6b": ("Qwen/Qwen3-0.6B", {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "max_position_embeddings": 40_960, "tie_word_embeddings": True,
    }),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B", {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131_072, "tie_word_embeddings": True,
    }),
    "smollm2_135m": ("HuggingFaceTB/SmolLM2-135M", {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def block(width: int, heads: int, mlp_width: int, *, dropout: float) -> dict:
    """One transformer layer, `nn.transformer.BlockConfig`."""
    return {
        "width": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads, "mlp_width": mlp_width,
        "rope_theta": 10_000.0, "activation": "silu", "norm_eps": 1e-6, "qk_norm": False, "residual_gate": False,
        "dropout": dropout,
    }  # fmt: skip


def optimizer(learning_rate: float, **changes) -> dict:
    """AdamW, `training.optimizer.OptimizerConfig`."""
    return {
        "learning_rate": learning_rate, "warmup_steps": 100, "schedule": "constant", "weight_decay": 0.01, "clip_norm": 1.0,
        "b1": 0.9, "b2": 0.98, "lr_multiplier": ((r".*", 1.0),), "decay": DECAY,
    } | changes  # fmt: skip


def loop(total_steps: int, eval_steps: int, *, monitor: str, mode: str = "max", patience_evals: int = 0) -> dict:
    """How long and how often, `training.loop.LoopConfig`."""
    return {
        "total_steps": total_steps, "total_epochs": 0.0, "eval_steps": eval_steps, "save_steps": eval_steps, "log_steps": 20,
        "monitor": monitor,
        "mode": mode, "patience_evals": patience_evals, "dtype": "float32", "sharding": SHARDING,
    }  # fmt: skip


def base() -> ConfigDict:
    """Data, mesh and models; phases are added by each config in the order in which they run."""
    return ConfigDict(
        {
            "seed": 0,
            "phases": (),
            "strategies": STRATEGIES,
            # Of strategies with adapters. The targets are weights of a layer; rank 8 is the paper's (second-hand).
            "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": r"attn/(q|k|v|o)|mlp/(gate_proj|up|down)"},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                # movielens | amazon | google_local | events | synthetic, which needs no dir. For MovieLens the dir may also be a
                # zip, or a release's name to download it; for your own events, a file or a glob.
                "source": "movielens",
                "dir": "",
                "category": "Movies_and_TV",  # of Amazon Review
                "states": (),  # of Google Local Review
                # Of your own events: what they are called in the report, and which column holds what.
                "name": "events",
                "columns": {
                    "user": "user_id",
                    "item": "item_id",
                    "time": "",
                    "order": "",
                    "title": "",
                    "categories": (),
                    "numbers": (),
                    "texts": (),
                },
                "ties": "hashed",
                "min_events": 5,
                "split": "leave_last_out",
                # A world of films, products or places: movielens | amazon | google_local.
                "synthetic": {"layout": "movielens", "num_users": 1500, "num_items": 120, "events_per_user": 40},
            },
            "encoder": {
                "features": ("item", "rating", "genres", "gap"),
                "feature_width": 32,
                "positions": "rotary",
                "max_events": 200,
                "num_layers": 2,
                "dropout": 0.2,
                "heads": (),
                "unroll": True,
                "block": block(128, 2, 256, dropout=0.2),
            },
            # Perplexity before and after contextualization, of an open LLM: of a text file of yours, or of the one that comes along.
            "general_text": {"file": "", "windows": 32, "window": 128},
            "llm": {
                # An open LLM: a directory in Hugging Face layout, or a model's name on the hub. What it is then comes from its
                # own config.json, and no phase pretrain_lm runs. Empty to train the small one that is described below.
                "checkpoint": "",
                "published": {},  # what config.json says, where it is known before a download
                "vocab_size": 2048,
                "num_layers": 4,
                "unroll": True,
                "block": block(128, 4, 384, dropout=0.1),
            },
        }
    )


def pretrain_encoder(*, total_steps: int, eval_steps: int, **changes) -> ConfigDict:
    """Phase 1: the encoder, by next-event prediction over packed histories."""
    return ConfigDict({
        "task": "pretrain_encoder",
        "strategy": "all",
        "batch": {"window": 200, "rows": 15, "row_length": 200},
        "loss": {"head_weights": {}, "negatives": 0, "chunk": 512},
        "eval": {"max_events": 200, "batch_size": 64, "validation_users": 2000},
        "optimizer": optimizer(1e-3),
        "loop": loop(total_steps, eval_steps, monitor="ndcg@10", patience_evals=15),
    } | changes)  # fmt: skip


def pretrain_lm(*, total_steps: int, eval_steps: int, **changes) -> ConfigDict:
    """Phase 0: a small decoder on the catalogue's titles and genres, where no checkpoint is given."""
    return ConfigDict({
        "task": "pretrain_lm",
        "strategy": "all",
        "batch": {"rows": 16, "row_length": 128},
        "loss": {"chunk": 512},
        "eval": {"batches": 4},
        "optimizer": optimizer(2e-3, schedule="cosine", weight_decay=0.1),
        "loop": loop(total_steps, eval_steps, monitor="loss", mode="min"),
    } | changes)  # fmt: skip


def contextualize(method: str, *, total_steps: int, eval_steps: int, **changes) -> ConfigDict:
    """Phase 2: the LLM attends to its user's events by cross-attention in every second layer."""
    return ConfigDict({
        "task": "contextualize",
        "strategy": "full",
        "method": method,
        "batch_size": 8,
        "examples": {"max_events": 200, "targets_per_history": 16, "text_items": 0},
        "prompt": {"instruction": "Next film:", "max_tokens": 32, "max_title_tokens": 24},
        "cross": {"every": 2, "heads": 4, "head_dim": 32, "seat": "after_attention"},
        "resampler": {"num_latents": 16, "heads": 4, "head_dim": 32, "mlp_width": 256, "num_layers": 1, "recency_buckets": 8},
        "load": LOAD,
        "loss": {"catalogue": 1.0, "text": 0.2, "align": 1.0, "chunk": 512},
        "eval": {"batch_size": 64, "validation_users": 1000, "generate_users": 0, "beams": 10},
        "optimizer": optimizer(1e-3, lr_multiplier=CONTEXTUAL_LEARNING_RATES),
        "loop": loop(total_steps, eval_steps, monitor="ndcg@10", patience_evals=8),
    } | changes)  # fmt: skip


def text_prompt(items: int, *, total_steps: int, eval_steps: int, max_tokens: int, **changes) -> ConfigDict:
    """The baseline: the same decoder reads the last `items` titles as text; no encoder."""
    return contextualize(
        f"text_prompt_{items}",
        total_steps=total_steps,
        eval_steps=eval_steps,
        examples={"max_events": 0, "targets_per_history": 1, "text_items": items},
        prompt={"instruction": "Films this user watched, in order:", "max_tokens": max_tokens, "max_title_tokens": 24},
        **({"optimizer": optimizer(1e-3)} | changes),
    )


def movielens(variant: str, phases: tuple[str, ...]) -> ConfigDict:
    """Return a MovieLens experiment of `phases`: all sizes and steps of both variants, so that its parts stay comparable.

    Raises:
      ValueError: a variant other than `small` (2 CPU cores, some 2,000 users), `full` (MovieLens-20M, one TPU host) and `full`
        with an open LLM in place of the small one that is trained from scratch, by its name in `LLMS`.
    """
    config = base()
    config.phases = phases
    if variant == "small":
        # 12 passes over the training events of ml-latest-union, 3,000 a step.
        config.pretrain_encoder = pretrain_encoder(
            total_steps=1200, eval_steps=100, optimizer=optimizer(2e-3, schedule="cosine")
        )
        config.pretrain_lm = pretrain_lm(total_steps=400, eval_steps=200)
        # The text prompts see more targets: 128, 16 x 10 and 4 x (about) 50 a step.
        config.user_llm = contextualize("user_llm", total_steps=1000, eval_steps=200)
        config.user_llm.prompt.update(max_tokens=24, max_title_tokens=18)
        config.user_llm.eval.generate_users = 500
        config.text_prompt_10 = text_prompt(10, total_steps=1200, eval_steps=200, max_tokens=128, batch_size=16)
        config.text_prompt_50 = text_prompt(50, total_steps=900, eval_steps=150, max_tokens=640, batch_size=4)
        for name in ("user_llm", "text_prompt_10", "text_prompt_50"):
            config[name].optimizer.schedule = "cosine"
            config[name].eval.validation_users = 2000
    elif variant == "full" or variant in LLMS:
        # 6 encoder layers as in the paper (second-hand).
        config.encoder.update(num_layers=6, unroll=False, block=block(256, 4, 768, dropout=0.1))
        config.llm.update(vocab_size=8192, num_layers=12, unroll=False, block=block(512, 8, 1536, dropout=0.1))
        batch = {"window": 200, "rows": 128, "row_length": 512}
        config.pretrain_encoder = pretrain_encoder(total_steps=60_000, eval_steps=1000, batch=batch)
        config.pretrain_lm = pretrain_lm(total_steps=5000, eval_steps=500, batch={"rows": 64, "row_length": 512})
        config.user_llm = contextualize("user_llm", total_steps=50_000, eval_steps=1000, batch_size=64)
        config.user_llm.eval.generate_users = 5000
        config.text_prompt_10 = text_prompt(10, total_steps=50_000, eval_steps=1000, max_tokens=160, batch_size=512)
        config.text_prompt_50 = text_prompt(50, total_steps=50_000, eval_steps=1000, max_tokens=640, batch_size=128)
        for name in phases:  # parameters and optimizers stay float32
            config[name].loop.dtype = "bfloat16"
        if variant in LLMS:
            config.llm.checkpoint, published = LLMS[variant]
            config.llm.published = ConfigDict(published)
            for name in ("user_llm", "text_prompt_10", "text_prompt_50"):
                config[name].strategy = "lora"
    else:
        raise ValueError(f"Unknown variant {variant!r}: choose full, small or an open LLM: {', '.join(LLMS)}.")
    return config
