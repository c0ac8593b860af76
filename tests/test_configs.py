"""Every config and variant builds: rules cover every parameter, loss and gradients have shapes. Nothing is computed."""

import dataclasses
import functools
import importlib.util
import operator
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.config import experiments
from user_llm.config.check import check
from user_llm.config.llms import LLMS
from user_llm.config.reader import read_config
from user_llm.data.dataset import Dataset
from user_llm.data.schema import Feature, Schema
from user_llm.data.splits import make_split
from user_llm.models.config_json import config_from_settings
from user_llm.models.decoder import Decoder
from user_llm.models.user_llm import UserLLM
from user_llm.phases import starting
from user_llm.phases.builders import BUILDERS
from user_llm.phases.contextualize import model_config
from user_llm.phases.llm import decoder_config
from user_llm.phases.run import Run
from user_llm.training.loop import LoopConfig
from user_llm.training.optimizer import learning_rate_schedule, make_optimizer, partition_trainable

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("configs/*.py"))
VARIANTS = ("full", "small", "synthetic", "cpu", "gpu", *LLMS)


def cases():
    for path in FILES:
        variants = ("small", "full", "synthetic") if path.stem.endswith("xattn") else ("small",)
        for variant in variants if "variant" in path.read_text() else (None,):
            yield pytest.param((path, variant, ()), marks=pytest.mark.slow, id=f"{path.stem}:{variant}")
    path = ROOT / "configs" / "movielens_xattn.py"
    yield pytest.param((path, "small", ("pretrain_encoder", "pretrain_lm", "user_llm")), id="one of each task")
    for table in sorted(experiments.TABLES.keys() - {"all", "open_llm"}):
        phases = [phase for phase in experiments.TABLES[table] if phase not in experiments.METHODS["xattn"]]
        yield pytest.param((path, "small", ("pretrain_encoder", *phases)), marks=pytest.mark.slow, id=table)


def load(path, variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if variant is None else module.get_config(variant)


def written(timelines):
    """The same timelines with what Amazon Review and Google Local hold besides: categories and texts."""
    catalogue, schema = timelines.catalogue, timelines.schema
    texts = {name: np.full(len(timelines.item), "fine and dandy", np.dtypes.StringDType()) for name in ("summary", "review")}
    return dataclasses.replace(
        timelines,
        columns=timelines.columns | texts,
        schema=Schema((*schema, Feature("categories", "multi", 5, 2), *(Feature(name, "text", 64, 4) for name in texts))),
        catalogue=dataclasses.replace(
            catalogue,
            multi=catalogue.multi | {"categories": catalogue.multi["genres"]},
            vocab=catalogue.vocab | {"categories": catalogue.vocab["genres"]},
        ),
    )


def opened(config, timelines, mesh, workdir):
    """The run of a config and its dataset."""
    run = Run(read_config(config), epath.Path(workdir), mesh)
    return run, Dataset(timelines, make_split(timelines, config.data.split))


@pytest.fixture(params=cases())
def context(request, tmp_path, make_timelines, mesh_of):
    """A run of the config on four users, who have all that any dataset has. Batches and depths are small; paths are the same."""
    path, variant, phases = request.param
    config = load(path, variant)
    config.encoder.num_layers, config.llm.num_layers = 1, 2
    config.phases = phases or config.phases
    for name in config.phases:
        if name in config and "batch" in config[name]:
            config[name].batch.rows = 1  # many take long to fill
        elif name in config:
            config[name].batch_size = 2
        elif config.variants[name].like == "pretrain_encoder":
            config.pretrain_encoder.batch.rows = 1
        else:
            config[config.variants[name].like].batch_size = config.variants[name].changes.batch_size = 2
    timelines = written(make_timelines([list(range(1, 101))] * 4))
    return opened(config, timelines, mesh_of(), tmp_path)


def _shapes(context, name, monkeypatch):
    """The task of a phase, and the shapes of its parameters, without what earlier phases would have saved."""
    run, data = context
    monkeypatch.setattr(trees, "init", lambda create, place, wanted=None: trees.abstract(create)[1])
    monkeypatch.setattr(starting, "init", lambda run, create, rules, shapes, place: trees.init(create, place))
    task = BUILDERS[run.config.sections[name].task](name, run, data)
    return task, task.init(None)


@pytest.mark.slow
def test_user_llm_takes_any_encoder(tmp_path, make_timelines, mesh_of, monkeypatch):
    config = load(ROOT / "configs" / "movielens_xattn.py", "small")
    names = ("user_llm_bert4rec", "user_llm_dual", "user_llm_scratch")
    config.phases = ("pretrain_lm", "bert4rec", "dual_encoder", *names)
    config.encoder.num_layers = 1
    config.llm.num_layers = 2
    for name in names:
        config.variants[name].changes.update({"batch_size": 1, "examples": {"targets_per_history": 2}})
    run, data = opened(config, make_timelines([list(range(1, 101))] * 4), mesh_of(), tmp_path)
    found = {}
    monkeypatch.setattr(
        starting, "init", lambda run, create, rules, shapes, place: found.update(rules) or trees.abstract(create)[1]
    )
    sources = {}
    for name in names:
        task = BUILDERS["contextualize"](name, run, data)
        params, batch = task.init(None), next(iter(task.train_data))
        sources[name] = found[r"^encoder/"], {"mask_token", "tower"} & set(params["encoder"])
        assert jax.eval_shape(task.loss, params, batch | task.beside, jax.random.key(0), None)[0].shape == ()
    assert sources == {
        "user_llm_bert4rec": ("bert4rec", {"mask_token"}),
        "user_llm_dual": ("dual_encoder", {"tower"}),
        "user_llm_scratch": ("fresh", set()),
    }


def test_rules_cover_every_parameter_and_losses_have_gradients(context, monkeypatch):
    run, _ = context
    assert run.config.phases
    for name in run.config.phases:
        loop = LoopConfig(**vars(run.config.sections[name].loop))
        optimizer = run.optimizer_config(name)
        task, params = _shapes(context, name, monkeypatch)
        for rules in (optimizer.decay, optimizer.lr_multiplier, optimizer.trainable, loop.sharding):
            trees.match(rules, params)
        learning_rate_schedule(optimizer, loop.total_steps)
        assert task.steps_per_epoch > 0
        batch = jax.eval_shape(lambda batch: batch, next(iter(task.train_data)) | task.beside)
        trainable, frozen = partition_trainable(optimizer, params)
        key = jax.eval_shape(lambda: jax.random.key(0))

        def loss(trainable, frozen, batch, key, task=task):
            return task.loss(trees.combine(trainable, frozen), batch, key, None)

        (value, _), grads = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), trainable, frozen, batch, key)
        assert value.shape == () and value.dtype == np.float32
        assert trees.flatten(grads) == trees.flatten(trainable)
        jax.eval_shape(make_optimizer(optimizer, trainable, loop.total_steps).init, trainable)


def test_gates_norms_embeddings_and_latents_never_decay(context, monkeypatch):
    """Everything else does: the weights of products, stacked or not."""
    config = context[0].config
    for name in config.phases:
        _, params = _shapes(context, name, monkeypatch)
        decays = trees.flatten(trees.match(config.sections[name].optimizer.decay, params))
        product = re.compile(r"/(q|k|v|o|gate_proj|up|down)(/[ab])?$|(^|/)(project|item_head|head|attn_gate)$|(^|/)heads/")
        wrong = [path for path, decay in decays.items() if decay != bool(product.search(path))]
        assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_every_variant_is_declared_and_fits(path):
    """All phases, those too that a variant does not run; each open LLM on one dataset."""
    variants = VARIANTS if path.stem == "movielens_xattn" else VARIANTS[:5]
    for variant in variants if "variant" in path.read_text() else (None,):
        config = load(path, variant)
        for table in experiments.TABLES.values():
            config.phases = tuple(dict.fromkeys((*config.phases, *table)))
        check(config)


@pytest.mark.parametrize(
    "section", ["", "data", "encoder.block", "user_llm.resampler", "variants.bert4rec", "pretrain_lm.optimizer"]
)
def test_a_key_that_nobody_declares_is_refused(section):
    config = load(ROOT / "configs" / "quickstart.py", None)
    place = functools.reduce(operator.getitem, section.split("."), config) if section else config
    place.undeclared = 1
    with pytest.raises(ValueError, match=rf"no key {section and section + '.'}undeclared\."):
        check(config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused(path):
    if "variant" not in path.read_text():
        pytest.skip("has no variants")
    with pytest.raises(
        ValueError, match="Unknown variant 'huge': choose full, gpu, cpu, small, synthetic or an open LLM: gemma3_270m"
    ):
        load(path, "huge")


# The parameters that the models' pages on huggingface.co give; Qwen3-0.6B's stores its tied table twice, here it counts once
# (its page: 0.44B without embeddings, here 596,049,920 - 151,936 x 1024 = 440,467,456). Gemma 3 4B's counts the image side, here
# left out: a SigLIP tower of 416,866,032 and a projection of 2,950,272, by their shapes in transformers.
PUBLISHED = {
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472 - 416_866_032 - 2_950_272,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "llama3_2_1b": 1_235_814_400,
    "llama3_1_8b": 8_030_261_248,
    "smollm2_135m": 134_515_008,
    "smollm3_3b": 3_075_098_624,
    "mistral_7b": 7_248_023_552,
    "ministral3_3b": 3_429_006_336,  # its page rounds it to 3.4B, beside 0.4B of the image side
    "gemma2_2b": 2_614_341_888,
    "olmo2_1b": 1_484_916_736,
    "phi3_mini": 3_821_079_552,
    "granite3_3_2b": 2_533_539_840,
    "qwen3_30b_a3b": 30_532_122_624,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("strategy", ["full", "lora", "enc", "proj"])
def test_open_llms_have_their_published_sizes_and_rules_for_every_parameter(name, strategy, make_timelines, mesh_of, tmp_path):
    config = load(ROOT / "configs" / "movielens_xattn.py", name)
    timelines = make_timelines([list(range(1, 101))] * 4)
    base = config_from_settings(config.llm.published.to_dict(), name)
    _, bare = trees.abstract(lambda: Decoder(base, rngs=nnx.Rngs(params=0)))
    assert trees.count(bare) == PUBLISHED[name]

    config.user_llm.strategy, config.user_llm.injection = strategy, "both"
    full = model_config("user_llm", *opened(config, timelines, mesh_of(), tmp_path), base)
    _, params = trees.abstract(lambda: UserLLM(full, rngs=nnx.Rngs(params=0)))
    chosen = config.strategies[strategy]
    phase = config.user_llm
    for rules in (phase.optimizer.decay, phase.optimizer.lr_multiplier, phase.loop.sharding, phase.load):
        trees.match(rules, params)
    trains = {path for path, yes in trees.flatten(trees.match(chosen.trainable, params)).items() if yes}
    llm = {path for path in trees.flatten(params) if path.startswith("decoder/") and "/cross/" not in path}
    adapters = {path for path in llm if "/lora/" in path}
    assert bool(adapters) == (strategy == "lora")
    assert trains & llm == {"full": llm, "lora": adapters, "enc": set(), "proj": set()}[strategy]
    assert any(path.startswith("encoder/") for path in trains) == (strategy != "proj")
    assert {"item_head", "decoder/stack/cross/gate", "resampler/latents", "soft/project"} <= trains
    sources = trees.flatten(trees.match(phase.load, params))
    assert {path for path, source in sources.items() if source == "pretrain_lm"} == llm - adapters
    # Over eight chips every matrix is split, but for the narrow one that chooses experts.
    where = trees.flatten(meshes.shardings(phase.loop.sharding, params, mesh_of(fsdp=4, tensor=2)))
    wide = {path for path in llm - adapters if not path.endswith("mlp/gate")}
    whole = [path for path in wide if where[path].is_fully_replicated and trees.flatten(params)[path].size > 2**20]
    assert not whole and not where["soft/project"].is_fully_replicated


INJECTED = {"cross_attention": {"decoder/stack/cross/gate"}, "soft_prompt": {"soft/project"}}
INJECTED["both"] = INJECTED["cross_attention"] | INJECTED["soft_prompt"]


@pytest.mark.parametrize("injection", INJECTED)
@pytest.mark.parametrize("kind", ["perceiver", "none"])
def test_injection_and_resampler_say_what_joins_the_parts(injection, kind, make_timelines, mesh_of, tmp_path):
    config = load(ROOT / "configs" / "movielens_xattn.py", "small")
    config.user_llm.injection, config.user_llm.resampler.kind = injection, kind
    run, data = opened(config, make_timelines([list(range(1, 101))] * 4), mesh_of(), tmp_path)
    full = model_config("user_llm", run, data, decoder_config(run, 300))
    paths = set(trees.flatten(trees.abstract(lambda: UserLLM(full, rngs=nnx.Rngs(params=0)))[1]))
    assert paths & INJECTED["both"] == INJECTED[injection]
    assert ("resampler/latents" in paths) == (kind == "perceiver")
