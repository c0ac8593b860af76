"""Experiments by dataset, method and size: all numbers in one place, so that what is compared stays comparable.

| variant | for |
|---|---|
| `full` | the paper's sets, one TPU host |
| an open LLM by its name in `llms.LLMS` | the same with that LLM in place of the small one that is trained from scratch |
| `gpu` | the same sets and an open LLM of some 100 million parameters, by `--config.llm.checkpoint`, on one GPU: minutes |
| `small` | 2 CPU cores and the small real sets, by `--config.data.dir` |
| `cpu` | the same sets and cores and an open LLM of some 100 million parameters, by `--config.llm.checkpoint`: hours |
| `synthetic` | minutes on 2 CPU cores, no data: a generated world in the dataset's layout |
"""

from typing import Any

from ml_collections import ConfigDict

from user_llm.config import defaults
from user_llm.config.llms import LLMS
from user_llm.config.variants import nested

# A few thousand events, of five or ten a user: smaller batches, fewer steps.
TINY = {
    "pretrain_encoder.batch.rows": 4, "pretrain_encoder.loop.total_steps": 400, "pretrain_encoder.loop.eval_steps": 20,
    "user_llm.examples.targets_per_history": 4, "user_llm.loop.total_steps": 200, "user_llm.loop.eval_steps": 25,
    "text_prompt_10.loop.total_steps": 200, "text_prompt_10.loop.eval_steps": 25,
    "text_prompt_50.loop.total_steps": 200, "text_prompt_50.loop.eval_steps": 25,
}  # fmt: skip

# What sets the datasets apart: features of an event, lines of a prompt, classes of the favourites, which tasks besides the next item
# one LLM learns, with their weights, and what the real set at hand for `small` asks for.
DATASETS: dict[str, dict[str, Any]] = {
    "movielens": {
        "items": 27_280,  # MovieLens-20M; as SeqLLM (arXiv 2608.03063, table 9) counts the paper's sets
        "features": ("item", "rating", "genres", "gap"),
        "next": "Next film:",
        "past": "Films this user watched, in order:",
        "labels": {"feature": "genres", "whole": False},
        "tasks": {},
        # Tower and negatives of the batch together, and Muon, paid with three seeds; titles within the trie were tried with two. On Gift
        # Cards the tower and the negatives made no difference. Ranking is the same after 1,000 steps of user_llm; writing takes 3,000.
        "small": {
            "encoder.tower": True,
            "pretrain_encoder.loss.in_batch": True,
            "pretrain_encoder.optimizer.muon": True,
            "user_llm.loss.trie_softmax": True,
            "user_llm.loop.total_steps": 3000,
            "user_llm.loop.eval_steps": 500,
            "user_llm.eval.guide": (0.75, 0.9),
        },
    },
    "amazon": {
        "items": 177_978,  # Movies_and_TV, likewise
        "features": ("item", "rating", "categories", "summary", "gap"),
        "next": "Next product:",
        "past": "Products this user reviewed, in order:",
        "labels": {"feature": "categories", "whole": True},
        "tasks": {"favorite": 0.25, "favorite_future": 0.25, "review": 0.5},
        "small": TINY,
    },
    "google_local": {
        "items": 270_721,  # likewise, not verified against the data
        "features": ("item", "rating", "categories", "review", "gap"),
        "next": "Next place:",
        "past": "Places this user reviewed, in order:",
        "labels": {"feature": "categories", "whole": False},
        "tasks": {"favorite": 0.25, "favorite_future": 0.25, "review": 0.5},
        "small": TINY,
    },
    "events": {
        "items": 100_000,  # of a log that nobody has named yet
        "features": (),  # all that the columns declare
        "next": "Next:",
        "past": "Past events of this user, in order:",
        "labels": {"feature": "", "whole": False},
        "tasks": {},
        "small": {"user_llm.batch_size": 16, "text_prompt_10.batch_size": 32, "text_prompt_50.batch_size": 16},
    },
}

TRANSITIONS = (0.0, 0.5, 1.0, 2.0)  # the weights of the transitions of which validation chooses one

# The phases of each method.
TEXT_PROMPTS = ("text_prompt_10", "text_prompt_50")
METHODS = {
    "encoder": ("pretrain_encoder",),
    "xattn": ("pretrain_encoder", "pretrain_lm", "user_llm", *TEXT_PROMPTS),
    "softprompt": ("pretrain_encoder", "pretrain_lm", "user_llm"),
    "textprompt": ("pretrain_lm", *TEXT_PROMPTS),
}


# Further phases that every experiment has at hand, by `--config.phases`: changes of user_llm, whose names are those of their
# methods; `experiment` adds those that take more to say. In those that stand here the LLM ranks by itself, as in the paper (`ALONE`).
# They share the encoder and the LLM of the phases before them in the same run.
VARIANTS: dict[str, dict[str, Any]] = {
    "user_llm_alone": {},
    "user_llm_soft_prompt": {"injection": "soft_prompt"},
    "user_llm_both": {"injection": "both"},
    "user_llm_every_layer": {"injection": "cross_attention", "cross.every": 1},
    "user_llm_before_block": {"injection": "cross_attention", "cross.seat": "before_block"},
    "user_llm_no_perceiver": {"resampler.kind": "none", "pack.histories": 0},
    "user_llm_8_latents": {"resampler.num_latents": 8},
    "user_llm_32_latents": {"resampler.num_latents": 32},
    "user_llm_lora": {"strategy": "lora"},
    "user_llm_enc": {"strategy": "enc"},
    "user_llm_proj": {"strategy": "proj"},
    "user_llm_50_events": {"examples.max_events": 50},
    "user_llm_100_events": {"examples.max_events": 100},
}
# The paper's tables, each the phases that it compares besides the encoder and the LLM (launch/reproduce.sh).
TABLES = {
    "text_prompts": ("user_llm", *TEXT_PROMPTS, "text_summary", "hybrid_10"),
    "encoders": ("bert4rec", "dual_encoder", "user_llm_alone", "user_llm_bert4rec", "user_llm_dual", "user_llm_scratch"),
    "strategies": ("user_llm_alone", "user_llm_lora", "user_llm_enc", "user_llm_proj"),
    "injections": ("user_llm_alone", "user_llm_soft_prompt", "user_llm_both", "user_llm_every_layer", "user_llm_before_block"),
    "perceiver": ("user_llm_alone", "user_llm_8_latents", "user_llm_32_latents", "user_llm_no_perceiver"),
    "lengths": ("user_llm_alone", "user_llm_50_events", "user_llm_100_events"),
}
TABLES["all"] = tuple(dict.fromkeys(phase for phases in TABLES.values() for phase in phases))
# What an open LLM gains by its users, beside the same LLM that reads titles, and as it came.
TABLES["open_llm"] = ("user_llm", "user_llm_lora", *TEXT_PROMPTS, "llm_text_prompt_10")


def experiment(dataset: str, method: str, variant: str) -> ConfigDict:
    """Return the config of one of METHODS on one of DATASETS.

    Raises:
      ValueError: an unknown variant.
    """
    facts, config = DATASETS[dataset], defaults.base()
    config.phases = METHODS[method]
    config.data.source = dataset
    config.encoder.features = facts["features"]
    config.labels = ConfigDict(facts["labels"])
    config.data.catalogue_items = facts["items"]
    if variant == "synthetic":
        synthetic(config, dataset, facts)
    elif variant == "small":
        small(config, facts)
    elif variant == "gpu":
        gpu(config, facts)
    elif variant == "cpu":
        cpu(config, facts)
    elif variant == "full" or variant in LLMS:
        full(config, facts)
        if variant in LLMS:
            config.llm.checkpoint, published = LLMS[variant]
            config.llm.published = ConfigDict(published)
            for name in ("user_llm", *TEXT_PROMPTS):
                config[name].strategy = "lora"
                config[name].optimizer.lr_multiplier = defaults.PRETRAINED_LEARNING_RATES
    else:
        raise ValueError(
            f"Unknown variant {variant!r}: choose full, gpu, cpu, small, synthetic or an open LLM: {', '.join(LLMS)}."
        )
    more = 1 + sum(facts["tasks"].values())  # so that the next item keeps its steps
    for name in ("user_llm", *TEXT_PROMPTS):
        for task, weight in facts["tasks"].items():
            config[name].prompts[task].weight = weight
        config[name].loop.total_steps = round(config[name].loop.total_steps * more)
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        name: ("user_llm", defaults.ALONE | changes) for name, changes in VARIANTS.items()
    }
    plain = {"encoder.tower": False, "loss.in_batch": False, "optimizer.muon": False}
    variants["plain_encoder"] = "pretrain_encoder", plain
    variants["bert4rec"] = "pretrain_encoder", {"encoder.objective": "masked"} | plain
    variants["dual_encoder"] = "pretrain_encoder", {"encoder.objective": "dual", "loss.negatives": 0} | plain
    both_ways = defaults.with_bidirectional(config.user_llm)
    variants["user_llm_bert4rec"] = "user_llm", defaults.ALONE | {"encoder": "bert4rec"} | both_ways
    variants["user_llm_dual"] = "user_llm", defaults.ALONE | {"encoder": "dual_encoder"}
    variants["user_llm_scratch"] = "user_llm", {"encoder": "plain_encoder"} | defaults.with_fresh_encoder(config.user_llm)
    asked = {f"prompts.next_item.{key}": config.text_prompt_10.prompts.next_item[key] for key in ("instruction", "max_tokens")}
    variants["hybrid_10"] = "user_llm", {"examples.text_items": 10} | asked
    untrained = {"strategy": "none", "loss.catalogue": 0.0, "eval.generate_users": config.user_llm.eval.generate_users}
    variants["llm_text_prompt_10"] = "text_prompt_10", untrained
    variants["text_summary"] = "text_prompt_10", {"examples.history": "summary"}
    for name, (like, changes) in variants.items():
        config.variants[name] = ConfigDict({"like": like, "changes": nested({"method": name} | changes)})
    if method == "softprompt":
        config.user_llm.update(injection="soft_prompt", method="user_llm_soft")  # not the LLM alone, `user_llm_soft_prompt`
    return config


def full(config: ConfigDict, facts: dict) -> None:
    """Fill in the sizes for the paper's sets; 6 encoder layers as in the paper (second-hand)."""
    config.encoder.update(num_layers=6, unroll=False, block=defaults.block(256, 4, 768, dropout=0.1))
    config.llm.update(vocab_size=8192, num_layers=12, unroll=False, block=defaults.block(512, 8, 1536, dropout=0.1))
    batch = {"window": 200, "rows": 128, "row_length": 512}
    config.pretrain_encoder = defaults.pretrain_encoder(total_steps=60_000, eval_steps=1000, batch=batch)
    # Beyond 50,000 items the exact softmax, 6 x 256 FLOPs an item and event, would cost several times as much as the encoder.
    config.pretrain_encoder.loss.negatives = 8192 if facts["items"] > 50_000 else 0
    config.pretrain_lm = defaults.pretrain_lm(total_steps=5000, eval_steps=500, batch={"rows": 64, "row_length": 512})
    steps = {"total_steps": 50_000, "eval_steps": 1000}
    asked = defaults.prompts(facts["next"], max_tokens=32)
    config.user_llm = defaults.contextualize("user_llm", batch_size=64, prompts=asked, **steps)
    config.user_llm.eval.generate_users = 5000
    config.text_prompt_10 = defaults.text_prompt(10, facts["past"], max_tokens=160, batch_size=512, **steps)
    config.text_prompt_50 = defaults.text_prompt(50, facts["past"], max_tokens=640, batch_size=128, **steps)
    for name in ("pretrain_encoder", "pretrain_lm", "user_llm", *TEXT_PROMPTS):  # parameters and optimizers stay float32
        config[name].loop.dtype = "bfloat16"


def small(config: ConfigDict, facts: dict) -> None:
    """Fill in the sizes for 2 CPU cores and some 2,000 users."""
    # 12 passes over the training events of ml-latest-union, 3,000 a step.
    optimizer = defaults.optimizer(2e-3, schedule="cosine")
    config.pretrain_encoder = defaults.pretrain_encoder(total_steps=1200, eval_steps=100, optimizer=optimizer)
    config.pretrain_encoder.transitions = TRANSITIONS
    config.pretrain_lm = defaults.pretrain_lm(total_steps=400, eval_steps=200)
    # The text prompts see more targets: 128, 16 x 10 and 4 x (about) 50 a step.
    asked = defaults.prompts(facts["next"], max_tokens=24, max_title_tokens=18)
    config.user_llm = defaults.contextualize("user_llm", total_steps=1000, eval_steps=200, prompts=asked)
    config.user_llm.eval.generate_users = 500
    config.user_llm.transitions = TRANSITIONS
    past = facts["past"]
    config.text_prompt_10 = defaults.text_prompt(10, past, total_steps=1200, eval_steps=200, max_tokens=128, batch_size=16)
    config.text_prompt_50 = defaults.text_prompt(50, past, total_steps=900, eval_steps=150, max_tokens=640, batch_size=4)
    for name in ("user_llm", *TEXT_PROMPTS):
        config[name].optimizer.schedule = "cosine"
        config[name].eval.validation_users = 2000
    config.update_from_flattened_dict(facts["small"])


def gpu(config: ConfigDict, facts: dict) -> None:
    """Fill in the sizes for one GPU, an open LLM, and two passes over the 290,000 training targets of ml-latest-union.

    Training and evaluation compute in bfloat16, and evaluation pads to one shape, since compiling 30 layers takes longer than it.
    """
    small(config, facts)
    config.llm.unroll = False
    # Some 600,000 targets each: 32 x 16 ends of histories, 64 x 10 titles and 16 x (about) 40 titles a step.
    steps = {"user_llm": (32, 1200), "text_prompt_10": (64, 1000), "text_prompt_50": (16, 1000)}
    tokens = {"user_llm": 32, "text_prompt_10": 192, "text_prompt_50": 704}
    for name, (batch_size, total_steps) in steps.items():
        phase = config[name]
        phase.batch_size, phase.loss.chunk = batch_size, 4096
        phase.prompts.max_title_tokens, phase.prompts.next_item.max_tokens = 24, tokens[name]
        phase.optimizer.lr_multiplier = defaults.PRETRAINED_LEARNING_RATES
        phase.eval.update(pad_whole=True, batch_size=128, generate_users=500, guide=())
        phase.loop.update(total_steps=total_steps, eval_steps=400, save_steps=400, dtype="bfloat16")
    for name in TEXT_PROMPTS:
        config[name].strategy = "lora"
    config.pretrain_encoder.eval.update(pad_whole=True, batch_size=256)


def cpu(config: ConfigDict, facts: dict) -> None:
    """Fill in the sizes for 2 CPU cores and an open LLM, of which all methods see some 20,000 targets, 64 a step, if they go on so long.

    Each is evaluated every 5,120 targets. Text prompts end where validation has not risen for three evaluations.
    """
    small(config, facts)
    few = facts["small"] is TINY  # of events in a history
    config.user_llm.update(strategy="enc", batch_size=16 if few else 4)
    config.user_llm.pack.histories = config.user_llm.batch_size
    config.text_prompt_10.batch_size, config.text_prompt_50.batch_size = (16, 16) if few else (8, 2)
    for name, tokens in (("user_llm", 32), ("text_prompt_10", 192), ("text_prompt_50", 704)):
        phase = config[name]
        phase.prompts.max_title_tokens, phase.prompts.next_item.max_tokens = 24, tokens
        phase.loss.update(trie_softmax=True, chunk=1024)
        phase.optimizer.update(lr_multiplier=defaults.PRETRAINED_LEARNING_RATES, schedule="constant", warmup_steps=20)
        # Few users write titles and reviews: on CPU, writing for 300 of them took longer than all training (BUILD_NOTES: "SmolLM2-135M on Gift Cards").
        phase.eval.update(batch_size=32, validation_users=300, generate_users=100, control_users=100, review_users=50)
        phase.eval.update(guide=(0.5, 0.9))
        phase.loop.update(total_steps=320, eval_steps=80, save_steps=80)
    for name in TEXT_PROMPTS:
        config[name].strategy = "lora"
        config[name].loop.patience_evals = 3


def synthetic(config: ConfigDict, dataset: str, facts: dict) -> None:
    """Fill in the sizes for the generated world."""
    config.data.source = "synthetic"
    config.data.synthetic.layout = dataset
    config.encoder.update(max_events=64, block=defaults.block(64, 2, 128, dropout=0.1), dropout=0.1)
    config.llm.update(vocab_size=768, num_layers=2, block=defaults.block(64, 2, 192, dropout=0.0))
    optimizer = defaults.optimizer(3e-3, schedule="cosine", warmup_steps=30)
    config.pretrain_encoder = defaults.pretrain_encoder(
        total_steps=400, eval_steps=200, batch={"window": 64, "rows": 48, "row_length": 64}, optimizer=optimizer
    )
    config.pretrain_lm = defaults.pretrain_lm(total_steps=100, eval_steps=50)
    config.pretrain_lm.optimizer.warmup_steps = 30
    config.user_llm = defaults.contextualize(
        "user_llm", total_steps=1000, eval_steps=250, batch_size=16,
        examples={"max_events": 64, "targets_per_history": 8, "text_items": 0, "history": "titles"},
        prompts=defaults.prompts(facts["next"], max_tokens=24, max_title_tokens=12),
        optimizer=optimizer | {"lr_multiplier": defaults.CONTEXTUAL_LEARNING_RATES},
    )  # fmt: skip
    config.user_llm.cross.every = 1
    # Within the trie, for so few steps teach no choice among all words: recall@10 of the writing doubles.
    config.user_llm.loss.trie_softmax = True
    config.user_llm.eval.update(generate_users=200, guide=(0.25, 0.5, 0.75, 0.9), rerank=60)
    # The text prompts see some 30,000 training targets each: 96 x 32 x 10 and 96 x 8 x (about) 40. `targets_seen` in results.json counts
    # them.
    steps: dict[str, Any] = {"total_steps": 96, "eval_steps": 48, "optimizer": optimizer}
    config.text_prompt_10 = defaults.text_prompt(10, facts["past"], max_tokens=128, batch_size=32, **steps)
    config.text_prompt_50 = defaults.text_prompt(50, facts["past"], max_tokens=512, batch_size=8, **steps)
    for name in ("user_llm", *TEXT_PROMPTS):
        config[name].eval.validation_users = 200
        config[name].eval.review_users = 100
        config[name].eval.control_users = 200
