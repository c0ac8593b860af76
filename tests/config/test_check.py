"""Wrong settings end in one sentence that names the key, before a run has left anything; what all configs say is declared."""

import dataclasses
import functools
import operator
import typing

import pytest
from flax import nnx
from ml_collections import ConfigDict

from user_llm import experiment
from user_llm.common import trees
from user_llm.config import experiments, phases, values
from user_llm.config.check import QUANTIZED, check
from user_llm.config.phases import PHASES, Loop, Optimizer
from user_llm.config.reader import read_config
from user_llm.config.records import Encoder, Shared
from user_llm.data.pipeline import ExampleConfig
from user_llm.data.synthetic_files import LAYOUTS
from user_llm.data.tokenizer import MIN_BPE_VOCAB
from user_llm.models.user_encoder import OBJECTIVES, UserEncoderConfig
from user_llm.nn.kernels import KERNELS
from user_llm.nn.mlp import ACTIVATIONS
from user_llm.nn.stored import KINDS
from user_llm.nn.transformer import REMAT, Block, BlockConfig
from user_llm.phases.builders import BUILDERS
from user_llm.phases.kinds import TASKS
from user_llm.training.loop import LoopConfig
from user_llm.training.optimizer import OptimizerConfig

DEFAULT = experiments.experiment("movielens", "xattn", "synthetic")
NAN, INF = float("nan"), float("inf")
RULE = ((".*", 1.0),)


def changed(changes):
    """The quick start with some keys changed; `{"user_llm": {...}}` replaces a section."""
    config = DEFAULT.to_dict()
    for key, value in changes.items():
        *sections, name = key.split(".")
        functools.reduce(operator.getitem, sections, config)[name] = value
    return ConfigDict(config)


# Each: what is set, and the sentence that it ends in.
WRONG = [
    # choices
    ({"pretrain_encoder.encoder": {"kind": "transfomer"}}, "pretrain_encoder.encoder.kind='transfomer': choose transformer (did you mean"),
    (
        {"phases": ("user_llm",), "pretrain_encoder.encoder": {"kind": "lstm"}},
        "user_llm.encoder='pretrain_encoder': its encoder.kind is 'lstm': choose transformer.",
    ),
    (
        {"user_llm.loop.monitor": "mrr/unseen", "user_llm.loop.mode": "min"},
        "user_llm.loop.mode='min': the highest mrr/unseen is the best: set it to max.",
    ),
    ({"pretrain_lm.loop.mode": "max"}, "pretrain_lm.loop.mode='max': the lowest loss is the best: set it to min."),
    ({"user_llm.loop.mode": "min"}, "user_llm.loop.mode='min': the highest ndcg@10 is the best: set it to max."),
    ({"user_llm.task": ["contextualize"]}, "user_llm.task=['contextualize']: choose pretrain_lm, pretrain_encoder or contextualize"),
    ({"user_llm.loop.mode": "banana"}, "user_llm.loop.mode='banana': choose min or max."),
    ({"user_llm.loop.mode": "maxx"}, "user_llm.loop.mode='maxx': choose min or max (did you mean max?)."),
    ({"user_llm.loop.dtype": "int32"}, "user_llm.loop.dtype='int32': choose float32 or bfloat16."),
    ({"user_llm.task": "pretrain"}, "user_llm.task='pretrain': choose pretrain_lm, pretrain_encoder or contextualize"),
    ({"user_llm.optimizer.schedule": "linear"}, "user_llm.optimizer.schedule='linear': choose constant or cosine."),
    ({"user_llm.optimizer.first_moment": "factored"}, "user_llm.optimizer.first_moment='factored': choose float32 or bfloat16."),
    ({"user_llm.optimizer.second_moment": 1}, "user_llm.optimizer.second_moment=1: choose float32, bfloat16 or factored."),
    (
        {"user_llm.loss.catalogue": 0.0, "user_llm.eval.generate_users": 0},
        "user_llm.eval.generate_users=0: with loss.catalogue=0 no item head is trained, and titles must be written: set it to 1 or more.",
    ),
    ({"user_llm.strategy": "lorra"}, "user_llm.strategy='lorra': choose all, enc, full, lora, none or proj (did you mean lora?)."),
    ({"llm.quantize": "int2"}, "llm.quantize='int2': choose '', int8, int4 or nf4 (did you mean int8?)."),
    ({"llm.quantize": "nf4"}, "llm.quantize='nf4': it is for an open LLM: name one by llm.checkpoint, or leave it empty"),
    (
        {"llm.quantize": "nf4", "llm.checkpoint": "x"},
        "user_llm.strategy='full': with llm.quantize=nf4 nothing can train the LLM's own weights: choose lora, enc or proj.",
    ),
    (
        {
            "llm.quantize": "nf4", "llm.checkpoint": "x", "user_llm.strategy": "enc",
            "strategies.enc.trainable": ((r"(^|/)scale$", True), (".*", False)),
        },
        "user_llm.strategy='enc': with llm.quantize=nf4 nothing can train the LLM's own weights: choose lora, enc or proj.",
    ),
    ({"user_llm.injection": "soft"}, "user_llm.injection='soft': choose cross_attention, soft_prompt or both"),
    ({"user_llm.resampler.kind": "x"}, "user_llm.resampler.kind='x': choose perceiver or none."),
    ({"user_llm.cross.seat": "before"}, "user_llm.cross.seat='before': choose after_attention or before_block"),
    ({"user_llm.encoder_init": "random"}, "user_llm.encoder_init='random': choose pretrained, frozen or scratch."),
    ({"user_llm.examples.history": "title"}, "user_llm.examples.history='title': choose titles or summary (did you mean titles?)."),
    ({"data.source": "movie"}, "data.source='movie': choose movielens, amazon, google_local, events or synthetic"),
    ({"data.ties": "none"}, "data.ties='none': choose hashed or file."),
    ({"data.split": "random"}, "data.split='random': choose leave_last_out or global_time."),
    ({"data.synthetic.layout": "synthetic"}, "data.synthetic.layout='synthetic': choose movielens, amazon, google_local or events."),
    ({"encoder.objective": "mask"}, "encoder.objective='mask': choose autoregressive, masked or dual (did you mean masked?)."),
    ({"encoder.positions": "sinus"}, "encoder.positions='sinus': choose rotary or learned."),
    ({"encoder.block.activation": "tanh"}, "encoder.block.activation='tanh': choose silu, relu, gelu or gelu_tanh"),
    ({"llm.remat": "some"}, "llm.remat='some': choose none, dots or full."),
    ({"llm.attention_kernel": "flash"}, "llm.attention_kernel='flash': choose auto, reference, splash or cudnn (did you mean splash?)."),
    # types
    ({"seed": 1.0}, "seed=1.0: it must be a whole number."),
    ({"seed": True}, "seed=True: it must be a whole number."),
    ({"encoder.dropout": "0.1"}, "encoder.dropout='0.1': it must be a number."),
    ({"encoder.dropout": False}, "encoder.dropout=False: it must be a number."),
    ({"encoder.unroll": 1}, "encoder.unroll=1: it must be True or False."),
    ({"data.dir": 7}, "data.dir=7: it must be a text."),
    ({"phases": "user_llm"}, "phases='user_llm': it must be a tuple, written as ('a', 'b'), or ('a',) for one."),
    ({"phases": (3,)}, "phases[0]=3: it must be a text."),
    ({"encoder.features": ("",)}, "encoder.features[0]='': it must be a text that is not empty."),
    ({"encoder.block": 3}, "encoder.block=3: it must be a section of keys."),
    ({"user_llm.load": ("a",)}, "user_llm.load[0]='a': it must be a tuple"),
    ({"user_llm.load": (("a",),)}, "user_llm.load[0]=('a',): it must have 2 entries."),
    ({"user_llm.load": (("(", "fresh"),)}, "user_llm.load[0][0]='(': it must be a regular expression."),
    ({"user_llm.optimizer.decay": RULE}, "user_llm.optimizer.decay[0][1]=1.0: it must be True or False."),
    ({"user_llm.loop.sharding": ((".*", ("fsd",)),)}, "user_llm.loop.sharding[0][1][0]='fsd': choose data, fsdp, tensor or None"),
    ({"strategies.all.trainable": ((".*", "yes"),)}, "strategies.all.trainable[0][1]='yes': it must be True or False."),
    ({"lora.targets": "("}, "lora.targets='(': it must be a regular expression."),
    # ranges
    ({"user_llm.loop.eval_steps": 0}, "user_llm.loop.eval_steps=0: it must be 1 or more."),
    ({"user_llm.loop.save_steps": 0}, "user_llm.loop.save_steps=0: it must be 1 or more."),
    ({"user_llm.loop.log_steps": 0}, "user_llm.loop.log_steps=0: it must be 1 or more."),
    ({"user_llm.loop.total_steps": -1}, "user_llm.loop.total_steps=-1: it must be 0 or more."),
    ({"user_llm.loop.total_epochs": INF}, "user_llm.loop.total_epochs=inf: it must be a finite number."),
    ({"user_llm.loop.patience_evals": -1}, "user_llm.loop.patience_evals=-1: it must be 0 or more."),
    ({"encoder.dropout": 2.0}, "encoder.dropout=2.0: it must be from 0 to below 1."),
    ({"encoder.dropout": 1}, "encoder.dropout=1: it must be from 0 to below 1."),
    ({"encoder.block.dropout": NAN}, "encoder.block.dropout=nan: it must be a finite number."),
    ({"llm.block.dropout": -0.1}, "llm.block.dropout=-0.1: it must be from 0 to below 1."),
    ({"llm.block.head_dim": 7}, "llm.block.head_dim=7: it must be even and 2 or more, for rotary positions."),
    ({"llm.vocab_size": MIN_BPE_VOCAB - 1}, f"llm.vocab_size={MIN_BPE_VOCAB - 1}: it must be {MIN_BPE_VOCAB} or more"),
    ({"llm.vocab_size": 2**31}, "llm.vocab_size=2147483648: it must be a whole number of at most 2147483647."),
    ({"user_llm.eval.beams": 0}, "user_llm.eval.beams=0: it must be 1 or more."),
    ({"user_llm.batch_size": 0}, "user_llm.batch_size=0: it must be 1 or more."),
    ({"user_llm.eval.batch_size": 0}, "user_llm.eval.batch_size=0: it must be 1 or more."),
    ({"pretrain_encoder.batch.rows": 0}, "pretrain_encoder.batch.rows=0: it must be 1 or more."),
    ({"pretrain_encoder.loss.chunk": 0}, "pretrain_encoder.loss.chunk=0: it must be 1 or more."),
    ({"pretrain_encoder.loss.mask_probability": 1.1}, "pretrain_encoder.loss.mask_probability=1.1: it must be from 0 to 1."),
    ({"user_llm.optimizer.learning_rate": 0.0}, "user_llm.optimizer.learning_rate=0.0: it must be above 0."),
    ({"user_llm.optimizer.learning_rate": NAN}, "user_llm.optimizer.learning_rate=nan: it must be a finite number."),
    ({"user_llm.optimizer.b2": 1.0}, "user_llm.optimizer.b2=1.0: it must be from 0 to below 1."),
    ({"user_llm.optimizer.lr_multiplier": ((".*", -1.0),)}, "user_llm.optimizer.lr_multiplier[0][1]=-1.0: it must be 0 or more."),
    ({"user_llm.prompts.review.weight": -1.0}, "user_llm.prompts.review.weight=-1.0: it must be 0 or more."),
    ({"data.withhold": 1.0}, "data.withhold=1.0: it must be from 0 to below 1."),
    ({"data.min_events": 0}, "data.min_events=0: it must be 1 or more."),
    ({"mesh.data": 0}, "mesh.data=0: it must be 1 or more, or -1 for what the other axes leave."),
    ({"general_text.window": 0}, "general_text.window=0: it must be 1 or more."),
    # keys
    ({"encoder.drop": 0.1}, "The config has no key encoder.drop (did you mean dropout?)."),
    ({"sed": 1}, "The config has no key sed (did you mean seed?)."),
    ({"encoder": {}}, "The config lacks the key encoder.kind."),
    ({"pretrain_encoder.encoder": {"layers": 3}}, "The config has no key pretrain_encoder.encoder.layers (did you mean num_layers?)."),
    ({"pretrain_encoder.encoder": {"block": {"dropout": 2}}}, "pretrain_encoder.encoder.block.dropout=2: it must be from 0 to below 1."),
    # what does not fit other keys
    ({"phases": ()}, "phases=(): name one or more of bert4rec, "),
    ({"phases": ("user_llm", "user_llm")}, "phases=('user_llm', 'user_llm'): user_llm stands there twice."),
    ({"phases": ("pretrain_bert",)}, "phases=('pretrain_bert',): there is no phase pretrain_bert; choose from bert4rec"),
    ({"phases": ("data",)}, "phases=('data',): there is no phase data; choose from "),
    (
        {"user_llm.loop.total_steps": 60, "user_llm.optimizer.warmup_steps": 100},
        "user_llm.optimizer.warmup_steps=100: it must be below the 60 steps of loop.total_steps, for the schedule is cosine.",
    ),
    ({"user_llm.loop.total_steps": 0}, "user_llm.loop.total_steps=0: set it or loop.total_epochs (0.0), and the other to 0."),
    ({"user_llm.loop.total_epochs": 1.0}, "user_llm.loop.total_steps=1000: set it or loop.total_epochs (1.0), and the other to 0."),
    ({"user_llm.pack.histories": 3}, "user_llm.pack.histories=3: it must divide the 16 histories of batch_size."),
    ({"user_llm.pack.histories": 4, "user_llm.loop.accumulation_steps": 8},
     "user_llm.loop.accumulation_steps=8: it must divide the 4 rows of batch_size, over pack.histories."),
    ({"user_llm.pack.histories": 4, "user_llm.injection": "soft_prompt", "user_llm.resampler.kind": "none"},
     "user_llm.pack.histories=4: soft prompts of any length are not packed: set it to 0, or resampler.kind to perceiver."),
    ({"user_llm.loop.accumulation_steps": 3}, "user_llm.loop.accumulation_steps=3: it must divide the 16 rows of batch_size."),
    ({"data.streams": 5}, "pretrain_encoder.batch.rows=48: it must be a multiple of data.streams, 5."),
    ({"llm.block.kv_heads": 3}, "llm.block.kv_heads=3: it must divide the 2 heads."),
    ({"llm.block.residual_gate": True}, "llm.block.residual_gate=True: no open family has it, and the model could not be written: set it to False."),
    ({"llm.block.norm_eps": 1.0}, "llm.block.norm_eps=1.0: it must be below 1, or the model could not be written."),
    ({"encoder.block.kv_heads": 4}, "encoder.block.kv_heads=4: it must divide the 2 heads."),
    ({"pretrain_encoder.encoder": {"block": {"heads": 3}}}, "pretrain_encoder.encoder.block.kv_heads=2: it must divide the 3 heads."),
    ({"mesh.fsdp": -1}, "mesh.fsdp=-1: only one axis can take what the others leave, and mesh.data does."),
    ({"pretrain_encoder.batch.row_length": 32}, "pretrain_encoder.batch.row_length=32: it must be 64 or more, to hold a window"),
    ({"encoder.heads": ("rating",)}, "pretrain_encoder.loss.head_weights={}: it lacks the weight of rating, which encoder.heads"),
    ({"pretrain_encoder.loss.head_weights": {"rating": 1.0}}, "pretrain_encoder.loss.head_weights={'rating': 1.0}: encoder.heads"),
    ({"encoder.positions": "learned"}, "pretrain_encoder.eval.max_events=200: an encoder of learned positions reads at most"),
    (
        {"encoder.positions": "learned", "pretrain_encoder.eval.max_events": 64, "user_llm.examples.max_events": 65},
        "user_llm.examples.max_events=65: an encoder of learned positions reads at most encoder.max_events, 64.",
    ),
    ({"user_llm.encoder": "text_prompt_10"}, "user_llm.encoder='text_prompt_10': choose a phase that pretrains an encoder: bert4rec,"),
    ({"user_llm.encoder": "data"}, "user_llm.encoder='data': choose a phase that pretrains an encoder: bert4rec, "),
    ({"user_llm.prompts.next_item.weight": 0.0}, "user_llm.prompts.next_item.weight=0.0: one of next_item, favorite, "),
    ({"user_llm.cross.every": 3}, "user_llm.cross.every=3: the LLM has llm.num_layers=2 layers."),
    ({"user_llm.load": ((".*", "lm"),)}, "user_llm.load[0][1]='lm': choose fresh, the name of a phase."),
    ({"user_llm.load": ((".*", "checkpoint"),)}, "user_llm.load[0][1]='checkpoint': choose fresh, the name of a phase."),
    ({"user_llm.encoder_init": "scratch", "user_llm.loss.align": 1.0}, "user_llm.loss.align=1.0: an encoder from scratch teaches nothing: set it to 0."),
    ({"user_llm.encoder_init": "scratch"}, "user_llm.residual=True: an encoder from scratch ranks nothing yet that an LLM could add to: "),
    (
        {"user_llm.encoder_init": "scratch", "user_llm.encoder": "dual_encoder"},
        "user_llm.encoder_init='scratch': the item tower of its encoder comes pretrained: set it to frozen or pretrained.",
    ),
    (
        {"user_llm.encoder_init": "scratch", "user_llm.strategy": "proj"},
        "user_llm.strategy='proj': it would leave an encoder from scratch untrained: choose another.",
    ),
    (
        {"pretrain_encoder.encoder": {"objective": "dual"}, "pretrain_encoder.loss.negatives": 8},
        "pretrain_encoder.loss.negatives=8: a dual encoder has the negatives of its batch and draws no others: set it to 0.",
    ),
    (
        {"pretrain_encoder.loss.in_batch": True, "pretrain_encoder.loss.negatives": 8},
        "pretrain_encoder.loss.negatives=8: loss.in_batch takes the negatives of its batch and draws no others: set it to 0.",
    ),
    ({"text_prompt_10.residual": True}, "text_prompt_10.residual=True: a text prompt has no encoder to add to: set it to False."),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=lambda value: ",".join(value) if isinstance(value, dict) else "")
def test_a_wrong_setting_ends_in_a_sentence_before_the_run_begins(changes, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "save_config", lambda *_: pytest.fail("the run began"))
    with pytest.raises(ValueError) as error:
        experiment.run(changed(changes), tmp_path / "run")
    message = str(error.value)
    assert message.startswith(sentence) and message.count("\n") == 0 and message.endswith(".")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"user_llm.loss.align": 0, "encoder.dropout": 0},  # a whole number is a number
        {"phases": ["pretrain_encoder"]},  # as JSON has it
        {"phases": ("pretrain_encoder",), "user_llm.loop.total_steps": 0},  # which does not run
        {"user_llm.loop.total_steps": 0, "user_llm.loop.total_epochs": 1.0},
        {"user_llm.eval.generate_users": 0, "user_llm.eval.samples": 0, "user_llm.optimizer.warmup_steps": 0},
        {"user_llm.examples.max_events": 0, "user_llm.residual": False, "user_llm.cross.every": 9},
        {"encoder.heads": ("rating",), "pretrain_encoder.loss.head_weights": {"rating": 0.5}},
        {"mesh.data": 1, "mesh.fsdp": -1},
        {"llm.vocab_size": MIN_BPE_VOCAB},
    ],
)
def test_settings_that_mean_something_pass(changes):
    check(changed(changes))


def test_an_encoder_of_another_kind_has_no_tower():
    """Its section has the key `tower` all the same, which is not read."""
    check(
        changed(
            {"encoder.kind": "mine", "encoder.tower": True, "user_llm.encoder_init": "scratch", "user_llm.residual": False}
        ),
        encoders=("transformer", "mine"),
    )


def test_every_phase_follows_its_kind_even_where_it_does_not_run():
    with pytest.raises(ValueError, match=r"text_prompt_50\.loop\.mode='banana'"):
        check(changed({"phases": ("pretrain_encoder",), "text_prompt_50.loop.mode": "banana"}))


def test_what_is_wrong_with_a_phase_and_its_followers_is_said_of_the_phase():
    config = changed({"phases": ("hybrid_10", "user_llm"), "user_llm.loop.mode": "banana"})
    with pytest.raises(ValueError, match=r"^user_llm\.loop\.mode='banana'"):
        check(config)


def test_records_hold_what_the_config_says():
    run = read_config(changed({"phases": (*DEFAULT.phases, "bert4rec")}))
    sections = run.sections
    assert run.encoder.block.width == 64 and run.data.source == "synthetic" and run.phases == (*DEFAULT.phases, "bert4rec")
    assert sections["user_llm"].prompts.tasks["review"].column == "review" and sections["user_llm"].rows == ("batch_size", 16)
    assert (
        sections["bert4rec"].encoder == {"objective": "masked", "tower": False}
        and run.encoder_of("bert4rec").objective == "masked"
    )
    assert run.said["data"]["source"] == "synthetic" and run.said["phases"] == list(run.phases)


def test_choices_are_those_of_the_library():
    choices = {
        name: typing.get_args(getattr(values, name))
        for name in ("Kernel", "Layout", "Objective", "Activation", "Remat", "Quantization")
    }
    assert choices == {
        "Kernel": KERNELS, "Layout": tuple(LAYOUTS), "Objective": OBJECTIVES, "Activation": tuple(ACTIVATIONS), "Remat": tuple(REMAT),
        "Quantization": ("", *KINDS),
    }  # fmt: skip
    assert (UserEncoderConfig.kind,) == values.ENCODERS
    assert PHASES.keys() == BUILDERS.keys() and {name: task.settings for name, task in TASKS.items()} == phases.TASKS


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_quantised_llm_keeps_in_codes_is_what_the_check_says(kind):
    """A weight that the check does not know could be trained, which nothing can do with codes."""
    config = BlockConfig(**vars(read_config(DEFAULT).llm.block), quantize=kind)
    _, params = trees.abstract(lambda: Block(config, rngs=nnx.Rngs(0)))
    codes = {path.removesuffix("/codes") for path in trees.flatten(params) if path.endswith("/codes")}
    assert codes == set(QUANTIZED)


@pytest.mark.parametrize(
    ("record", "library", "besides"), [(Loop, LoopConfig, set()), (Optimizer, OptimizerConfig, {"trainable"})]
)
def test_records_have_the_fields_that_the_library_takes(record, library, besides):
    names = lambda kind: {field.name for field in dataclasses.fields(kind)}  # noqa: E731
    assert names(library) - names(record) == besides and names(record) <= names(library)
    assert names(PHASES["contextualize"]) and names(ExampleConfig) == names(
        typing.get_type_hints(PHASES["contextualize"])["examples"]
    )
    assert {"encoder", "llm"} <= names(Shared) and "block" in names(Encoder)
