"""What all experiments share: defaults, the phases of a run, and the rule lists.

Every key is declared here; a config file sets what makes it itself. Rules are ordered (regex, value) pairs over parameter
paths such as `decoder/stack/blocks/attn/q`; the first that is found wins.
"""

from ml_collections import ConfigDict

# Every rule list ends in names, not in `.*`, so that a parameter of an unknown name is an error that names it.
PRODUCTS = r"(^|/)(q|k|v|o|gate_proj|up|down)(/[ab])?$|(^|/)(project|item_head|head)$|(^|/)heads/"  # weights of matrix products
UNSPLIT = r"(^|/)(gate|mlp_gate|scale|latents|recency|position|[qkv]_bias|mask_token|catalogue)$|(^|/)(features|heads|lora)/"
# A part is the first name of a parameter's path. The parts are those of `UserEncoder`, `Decoder` and `UserLLM`.
ENCODER_PARTS = "item|features|project|position|stack|norm|heads|mask_token|tower"
LLM_PARTS = "embed|stack|norm|head"
USER_LLM_PARTS = "encoder|resampler|soft|decoder|items|item_norm|item_head"
ANY_PART = rf"^({ENCODER_PARTS}|{LLM_PARTS}|{USER_LLM_PARTS})(/|$)"

# What never decays: gates, norms, biases, embeddings, latents and other tables.
DECAY = (
    (r"(^|/)(gate|attn_gate|mlp_gate|scale|latents|recency|position|[qkv]_bias|mask_token|catalogue)$", False),
    (r"(^|/)(item|items|embed)$", False),
    (r"(^|/)features/", False),
    (PRODUCTS, True),
)

# How many of a weight's last axes are inputs and outputs of its product, where Muon is to move it.
MATRICES = (
    (r"(^|/)(q|k|v)$", (1, 2)),
    (r"(^|/)o$", (2, 1)),
    (r"(^|/)(gate_proj|up|down|project)$", (1, 1)),
    (ANY_PART, ()),
)

STORED = "(/codes|/scale)?$"  # the end of a weight's path, or of the parts of a quantised one
# The axes of the mesh that split each parameter; leading axes (layers) stay whole.
SHARDING = (
    (rf"attn/(q|k|v){STORED}|cross/(q|k|v)$|layers/\d+/(q|k|v)$", ("fsdp", "tensor", None)),
    (rf"attn/o{STORED}|cross/o$|layers/\d+/o$", ("tensor", None, "fsdp")),
    (rf"mlp/(gate_proj|up){STORED}", ("fsdp", "tensor")),
    (rf"mlp/down{STORED}", ("tensor", "fsdp")),
    (r"(^|/)(item|items|embed)$", ("tensor", "fsdp")),
    (r"(^|/)(project|item_head|head|attn_gate)$|blocks/mlp_gate$", ("fsdp", "tensor")),
    (UNSPLIT, ()),
)

# The strategies of contextualization: what trains, and whether the LLM gets low-rank adapters. The names are
# the paper's; which parts each of them trains is our reading of it.
ITS_HEADS = (r"^encoder/heads/", False)  # the encoder's heads are of use in pretraining alone
USER_SIDE = (r"^decoder/stack/cross/", True)
BARE_LLM = (r"^decoder/", False)
FROZEN_ENCODER = (r"^encoder/", False)
OTHER_PARTS = (ANY_PART, True)
STRATEGIES = {
    "none": {"adapters": False, "trainable": ((ANY_PART, False),)},
    "all": {"adapters": False, "trainable": (OTHER_PARTS,)},
    "full": {"adapters": False, "trainable": (ITS_HEADS, OTHER_PARTS)},
    "lora": {"adapters": True, "trainable": (ITS_HEADS, USER_SIDE, (r"/lora/", True), BARE_LLM, OTHER_PARTS)},
    "enc": {"adapters": False, "trainable": (ITS_HEADS, USER_SIDE, BARE_LLM, OTHER_PARTS)},
    "proj": {"adapters": False, "trainable": (USER_SIDE, BARE_LLM, FROZEN_ENCODER, OTHER_PARTS)},
}

# A pretrained encoder moves slowly where it trains, the gates, which start shut, quickly.
CONTEXTUAL_LEARNING_RATES = ((r"^encoder/", 0.1), (r"cross/gate$", 10.0), (ANY_PART, 1.0))

# The same where the LLM is an open one, which a rate made for weights from scratch would undo.
PRETRAINED_LEARNING_RATES = (
    (r"^encoder/", 0.1),
    (r"cross/gate$", 10.0),
    (r"^decoder/stack/cross/", 1.0),
    (r"/lora/", 0.3),
    (r"^decoder/", 0.03),
    (ANY_PART, 1.0),
)

# Where each part of a contextualized LLM starts from; `encoder` and `encoder_init` say it of the encoder.
LOAD = (
    (r"^decoder/stack/cross/|/lora/", "fresh"),
    (r"^decoder/", "pretrain_lm"),
    (ANY_PART, "fresh"),
)


# The LLM ranks by itself, as in the paper: it is drawn to the ranking of its encoder, which goes on training. By default it adds to
# the ranking of its encoder, which stays as it is: then the ranking hardly changes with training, and what the LLM writes goes on
# getting better, so that the last step is kept and titles weigh as much as the ranking.
ALONE = {
    "residual": False,
    "encoder_init": "pretrained",
    "loss.align": 1.0,
    "prompts.next_item.text": 0.2,
    "loop.keep": "best",
    "loop.patience_evals": 8,
}


def block(width: int, heads: int, mlp_width: int, *, dropout: float) -> dict:
    """One transformer layer, `nn.transformer.BlockConfig`."""
    return {
        "width": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads, "mlp_width": mlp_width,
        "rope_theta": 10_000.0, "activation": "silu", "norm_eps": 1e-6, "qk_norm": False, "residual_gate": False,
        "dropout": dropout,
    }  # fmt: skip


def optimizer(learning_rate: float, **changes) -> dict:
    """AdamW or Muon, `training.optimizer.OptimizerConfig`."""
    return {
        "learning_rate": learning_rate, "warmup_steps": 100, "schedule": "constant", "weight_decay": 0.01, "clip_norm": 1.0,
        "b1": 0.9, "b2": 0.98, "first_moment": "float32", "second_moment": "float32", "muon": False, "matrices": MATRICES,
        "lr_multiplier": ((ANY_PART, 1.0),), "decay": DECAY,
    } | changes  # fmt: skip


def loop(total_steps: int, eval_steps: int, *, monitor: str, **changes) -> dict:
    """How long and how often, `training.loop.LoopConfig`."""
    return {
        "total_steps": total_steps, "total_epochs": 0.0, "eval_steps": eval_steps, "save_steps": eval_steps, "log_steps": 20,
        "monitor": monitor, "mode": "max", "patience_evals": 0, "keep": "best", "dtype": "float32", "accumulation_steps": 1,
        "sharding": SHARDING,
    } | changes  # fmt: skip


def base() -> ConfigDict:
    """Data, mesh and models; phases are added by each config in the order in which they run."""
    return ConfigDict(
        {
            "seed": 0,
            "phases": (),
            # Phases by what they change of another one; they exist in a run whose `phases` name them.
            "variants": {},
            # Workdirs of other runs, separated by commas: their finished phases that would come out the same here are taken over.
            "reuse": "",
            "strategies": STRATEGIES,
            # Of strategies with adapters. The targets are weights of a layer; rank 8 is the paper's (second-hand).
            "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": r"attn/(q|k|v|o)|mlp/(gate_proj|up|down)"},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                # movielens | amazon | google_local | events | synthetic, which needs no dir. For MovieLens the dir may also be a
                # zip, or a release's name to download it; for your own events, a file or a glob.
                "source": "movielens",
                # That a batch is put together from; 0 for one of each process. The same number gives the same batches on any.
                "streams": 0,
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
                    # Of numbers in `time`: s, ms, us, ns, YYYYMMDD or YYYYMMDDHHMMSS; "" to decide from all of them.
                    "time_unit": "",
                },
                # Rows that cannot be read: refuse the first, by file and row, or skip (leave out and count) all.
                "bad_rows": "refuse",
                # Whether a run goes on though files of its data, LLM, tokenizer or general text are not what they were: what is finished
                # stays as it is, what is not begins again.
                "accept_changes": False,
                "catalogue_items": 50_000,  # that --compile_only assumes where there is no data
                "ties": "hashed",
                "min_events": 5,
                "split": "leave_last_out",
                # The share of each timeline's end that no phase trains on, beyond the split's targets: the future of favorite_future.
                "withhold": 0.0,
                # A world of films, products or places: movielens | amazon | google_local | events.
                "synthetic": {"layout": "movielens", "num_users": 1500, "num_items": 120, "events_per_user": 40},
            },
            # Of the tasks favorite and favorite_future: the bag that holds an item's classes, and whether the whole bag is one.
            "labels": {"feature": "genres", "whole": False},
            "encoder": {
                "kind": "transformer",  # or an encoder that the caller of user_llm.run gives, with its own options
                "options": {},
                "objective": "autoregressive",  # or masked (BERT4Rec), or dual
                # Whether item vectors are made of the items' ids and bags by an item tower, as those of a dual encoder always are.
                "tower": False,
                "features": ("item", "rating", "genres", "gap"),  # of an event; () for all
                "feature_width": 32,
                "positions": "rotary",
                "max_events": 200,
                "num_layers": 2,
                "dropout": 0.2,
                "heads": (),
                "unroll": True,
                # What the backward pass computes again: none, dots (all but products with weights) or full.
                "remat": "none",
                # What computes self-attention: auto (the platform's), reference, splash (TPU) or cudnn (GPU).
                "attention_kernel": "auto",
                "block": block(128, 2, 256, dropout=0.2),
            },
            # Perplexity before and after contextualization, of an open LLM: of a text file of yours, or of the one that comes along.
            "general_text": {"file": "", "windows": 32, "window": 128},
            "llm": {
                # An open LLM: a directory in Hugging Face layout, a GGUF file, or a name on the hub. What it is then comes from its
                # own config.json, and no phase pretrain_lm runs. Empty to train the small one that is described below.
                "checkpoint": "",
                "published": {},  # what config.json says, where it is known before a download
                # In what form the weights of its layers are kept, which nothing may train then: int8, int4 or nf4; "" as they come.
                "quantize": "",
                "vocab_size": 2048,
                "num_layers": 4,
                "unroll": True,
                "remat": "none",
                "attention_kernel": "auto",
                "block": block(128, 4, 384, dropout=0.1),
            },
        }
    )


def pretrain_encoder(*, total_steps: int, eval_steps: int, **changes) -> ConfigDict:
    """Phase 1: the encoder, over packed histories; by next-event prediction unless its `encoder` changes the objective."""
    return ConfigDict({
        "task": "pretrain_encoder",
        "strategy": "all",
        "method": "encoder",
        "encoder": {},  # what this phase changes of the section `encoder`
        "batch": {"window": 200, "rows": 15, "row_length": 200},
        # Masked: a fifth of the events, and in a share of the histories the last alone, are BERT4Rec's own for MovieLens.
        "loss": {
            "head_weights": {}, "negatives": 0, "in_batch": False, "chunk": 512, "mask_probability": 0.2, "last_only": 0.1,
        },
        # Weights to try for the transitions beside the scores of items (models/transitions.py); () for none.
        "transitions": (),
        "eval": {"max_events": 200, "batch_size": 64, "validation_users": 2000, "pad_whole": False},
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


def prompts(instruction: str, *, max_tokens: int, max_title_tokens: int = 24, history: str = "") -> dict:
    """What is asked, a section `prompts`: a task of weight 0 is neither trained nor measured; `text` weighs the loss of its target.

    Args:
      instruction: of the next item.
      max_tokens: of a row of the next item, and of the history of the other tasks.
      history: the line before the history of the other tasks, where their prompts hold it as text.
    """
    asked = {"instruction": history, "weight": 0.0, "text": 1.0}
    return {
        "max_title_tokens": max_title_tokens,
        "next_item": {"instruction": instruction, "max_tokens": max_tokens, "weight": 1.0, "text": 1.0},
        "favorite": asked | {
            "question": "Favorite of this user:", "max_tokens": max_tokens + 32, "max_target_tokens": 24,
        },
        "favorite_future": asked | {
            "question": "Favorite of this user from now on:", "max_tokens": max_tokens + 32, "max_target_tokens": 24,
        },
        "review": asked | {
            "question": "What this user writes about {title}, rated {rating} of 5:", "column": "review",
            "max_tokens": max_tokens + 96, "max_target_tokens": 48,
        },
    }  # fmt: skip


def contextualize(method: str, *, total_steps: int, eval_steps: int, **changes) -> ConfigDict:
    """Phase 2: the LLM attends to its user's events, by default by cross-attention in every second layer."""
    return ConfigDict({
        "task": "contextualize",
        "strategy": "full",
        "method": method,
        # The phase whose encoder it is, and whether its weights are that phase's (`pretrained`, or `frozen` if they are not to train) or
        # its shape alone (`scratch`).
        "encoder": "pretrain_encoder",
        "encoder_init": "frozen",
        "batch_size": 8,
        "examples": {"max_events": 200, "targets_per_history": 16, "text_items": 0, "history": "titles"},
        # Prompts of so many histories, on average, share rows that hold `room` of the longest; 0 for a row for each prompt. Devices and
        # accumulation share out batch_size / histories.
        "pack": {"histories": 0, "room": 4},
        "prompts": prompts("Next film:", max_tokens=32),
        # cross_attention, soft_prompt or both.
        "injection": "cross_attention",
        # Whether items are ranked by the encoder's own query and what the LLM adds to it, zero at first; else by the LLM's alone.
        "residual": True,
        "cross": {"every": 2, "heads": 4, "head_dim": 32, "seat": "after_attention"},
        # Behind the instruction, whose K/V all users then share, or in front of the whole prompt.
        "soft_prompt": {"after_instruction": True},
        # perceiver, or none for a user token of each event.
        "resampler": {
            "kind": "perceiver", "num_latents": 16, "heads": 4, "head_dim": 32, "mlp_width": 256, "num_layers": 1,
            "recency_buckets": 8,
        },
        "load": LOAD,
        "loss": {"catalogue": 1.0, "align": 0.0, "trie_softmax": False, "teacher": 1.0, "all_words": 0.1, "chunk": 512},
        # As for the encoder; the model directory ranks by the sum.
        "transitions": (),
        "eval": {"batch_size": 64, "validation_users": 1000, "generate_users": 0, "beams": 10, "guide": (), "rerank": 0,
                 "review_users": 500, "bert_score": "", "control_users": 500, "samples": 3, "pad_whole": False},
        "optimizer": optimizer(1e-3, lr_multiplier=CONTEXTUAL_LEARNING_RATES),
        "loop": loop(total_steps, eval_steps, monitor="ndcg@10", keep="last"),
    } | changes)  # fmt: skip


def text_prompt(items: int, past: str, *, total_steps: int, eval_steps: int, max_tokens: int, **changes) -> ConfigDict:
    """The baseline: the same decoder reads the last `items` titles as text, after the line `past`; no encoder."""
    phase = contextualize(
        f"text_prompt_{items}",
        total_steps=total_steps,
        eval_steps=eval_steps,
        examples={"max_events": 0, "targets_per_history": 1, "text_items": items, "history": "titles"},
        prompts=prompts(past, max_tokens=max_tokens, history=past),
        **({"optimizer": optimizer(1e-3)} | changes),
    )
    phase.update_from_flattened_dict(ALONE)
    return phase


def with_bidirectional(phase: ConfigDict) -> dict:
    """Return what changes in a contextualization whose encoder sees both ways and so runs anew for each end of a history.

    A quarter of the ends of four times the histories: the LLM costs as much as before.
    """
    ends = -(-phase.examples.targets_per_history // 4)
    return {"batch_size": phase.batch_size * 4, "examples.targets_per_history": ends}


def with_fresh_encoder(phase: ConfigDict) -> dict:
    """Return what changes in a contextualization whose encoder starts from scratch: it learns as fast as the rest and teaches nothing."""
    rates = tuple(rule for rule in phase.optimizer.lr_multiplier if rule[0] != r"^encoder/")
    return ALONE | {"encoder_init": "scratch", "loss.align": 0.0, "optimizer.lr_multiplier": rates}
