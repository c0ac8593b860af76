"""The reference computes what ours does, so that the comparison is one; figures by hand; a tiny run of all sides."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests")]

import benchmark
from tiny_quickstart import environment
from train_speed import mfu

from user_llm.ahead.check import abstract_batch
from user_llm.ahead.flops import count_flops
from user_llm.common import trees
from user_llm.config.reader import read_config
from user_llm.data.dataset import Dataset
from user_llm.models.config_json import config_from_settings
from user_llm.models.export import save_decoder
from user_llm.models.user_encoder import UserEncoder
from user_llm.models.user_llm import UserLLM
from user_llm.phases.contextual_loss import contextual_loss
from user_llm.phases.contextualize import model_config
from user_llm.phases.pretrain_encoder import EncoderLoss, encoder_config
from user_llm.phases.run import Run
from user_llm.training.loop import LoopConfig, abstract_state, settle_steps

ITEMS, EVENTS = 20, 9


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    import torch_reference

    return torch_reference


@pytest.fixture(scope="module")
def tiny(make_timelines):
    """Return `tiny(part)`: the config of the preset, timelines and the sizes that the reference reads."""
    timelines = make_timelines([[1, 2, 3]], num_items=ITEMS).select(("item",))

    def tiny(part):
        preset = benchmark.preset_config("tiny")
        phase, preset.user_llm.strategy = benchmark.PARTS[part]
        config = read_config(preset)
        return config, timelines, benchmark.model_sizes(config, phase, ITEMS)

    return tiny


def _matrix(weight, inputs):
    """A weight of one layer whose first `inputs` axes go in, as torch has it: [out, in]."""
    return np.reshape(weight, (int(np.prod(weight.shape[:inputs])), -1)).T


def _encoder_weights(params, prefix=""):
    """Our encoder's weights under the reference's names."""
    flat = trees.flatten(params)
    found = {"item.weight": flat["item"][: ITEMS + 1], "project.weight": flat["project"].T, "norm.weight": flat["norm/scale"]}
    for path, stacked in flat.items():
        for layer, weight in enumerate(stacked if path.startswith("stack/") else ()):
            *_, module, name = path.split("/")
            if name == "scale":
                found[f"blocks.{layer}.{module}.weight"] = weight
            else:
                place = f"mlp.{name}" if module == "mlp" else name
                found[f"blocks.{layer}.{place}.weight"] = _matrix(weight, 2 if name == "o" else 1)
    return {prefix + name: weight for name, weight in found.items()}


def _load(model, weights):
    import torch

    loaded = model.load_state_dict({name: torch.tensor(np.array(a)) for name, a in weights.items()}, strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"llm.lm_head.weight"}


def _torch_batch(batch):
    import torch

    return {
        name: torch.tensor(a) if a.dtype == np.float32 else torch.tensor(a).long() for name, a in trees.flatten(batch).items()
    }


def test_both_encoders_have_the_same_loss(reference, tiny, drawn):
    """On packed rows with padding."""
    config, timelines, sizes = tiny("encoder")
    model = encoder_config(config.encoder, timelines.schema, {})
    graphdef, params = drawn(lambda: UserEncoder(model, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(1)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], range(9)])
    events, following = (rng.integers(1, ITEMS + 1, (2, EVENTS, 1)) * (segments > 0)[..., None] for _ in range(2))
    batch = {"events": events, "next": following, "segments": segments, "positions": positions}
    loss = EncoderLoss({}, 0, 64, np.zeros(0), np.zeros(0), 0.0, 0.0)
    ours, _ = jax.jit(lambda params: loss(trees.merge(graphdef, params), batch, jax.random.key(0)))(params)

    theirs = reference.Pretraining(sizes)
    _load(theirs, _encoder_weights(params))
    assert theirs.loss(_torch_batch(batch)).item() == pytest.approx(float(ours), abs=1e-4)


def _llm_weights(params, config, sizes, directory):
    """Our LLM's weights under the reference's names, cross-attention and adapters among them."""
    from safetensors.numpy import load_file

    block = dataclasses.replace(config.block, lora=None)
    flat = trees.flatten(params)
    save_decoder(
        directory,
        trees.unflatten({p: a for p, a in flat.items() if "/lora/" not in p}),
        dataclasses.replace(config, block=block),
    )
    every, adapted = sizes["cross"]["every"], config.block.lora is not None
    layer_of = lambda layer: f"llm.model.layers.{layer}" + (".layer" if layer % every == every - 1 else "")  # noqa: E731

    found = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        name = re.sub(r"^model\.layers\.(\d+)", lambda m: layer_of(int(m[1])), name) if ".layers." in name else f"llm.{name}"
        found[re.sub(r"_proj\.weight$", "_proj.base.weight", name) if adapted else name] = weight
    for path, stacked in flat.items():
        for number, weight in enumerate(stacked if "/cross/" in path or "/lora/" in path else ()):
            *_, module, name = path.split("/")
            if "/cross/" in path:
                place = f"llm.model.layers.{number * every + every - 1}.cross"
                if name == "gate":
                    found[f"{place}.gate"] = weight
                elif name == "scale":
                    found[f"{place}.{module}.weight"] = weight
                else:
                    found[f"{place}.{name}.weight"] = _matrix(weight, 2 if name == "o" else 1)
            else:
                where = "self_attn" if "/attn/" in path else "mlp"
                inputs = 2 if (module, name) == ("o", "a") else 1
                place = f"{layer_of(number)}.{where}.{module.removesuffix('_proj')}_proj"
                found[f"{place}.{name}.weight"] = _matrix(weight, inputs)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["full", "lora"])
def test_both_contextualized_llms_have_the_same_loss(reference, tiny, drawn, tmp_path, part):
    """With open gates, a user without events, and rows without an answer."""
    config, timelines, sizes = tiny(part)
    base = config_from_settings(config.llm.published, "tiny", unroll=True)
    full = model_config("user_llm", Run(config, None, None), Dataset(timelines, None), base)
    graphdef, params = drawn(lambda: UserLLM(full, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(2)
    batch = {
        "events": rng.integers(1, ITEMS + 1, (2, EVENTS, 1)), "lengths": np.array([EVENTS, 5]),
        "prefix": np.array([[3, 9, 7], [5, 2, 0]]), "text": rng.integers(1, 300, (2, 3, 12)),
        "text_lengths": np.array([[12, 9, 0], [8, 12, 10]]), "answers": np.array([[4, 5, 0], [2, 6, 3]])[..., None],
        "items": np.array([[1, 2, 0], [4, 20, 3]])[..., None], "text_weight": {"next_item": np.full(2, 0.2, np.float32)},
    }  # fmt: skip

    @jax.jit
    def loss(params):
        model, key = trees.merge(graphdef, params), None
        return contextual_loss(model, batch, key, catalogue=1.0, align=0.0, chunk=64, leading={"next_item": 0})[0]

    theirs = reference.Contextualization(sizes)
    flat = trees.flatten(params)
    weights = _encoder_weights(params["encoder"], "encoder.") | _llm_weights(params["decoder"], full.decoder, sizes, tmp_path)
    weights |= {"item_norm.weight": flat["item_norm/scale"], "item_head.weight": flat["item_head"].T}
    for path, weight in trees.flatten(params["resampler"]).items():
        name = path.removeprefix("layers/0/").replace("/", ".")
        if name == "latents":
            weights["resampler.latents"] = weight
        elif name.endswith("scale"):
            weights[f"resampler.{name.removesuffix('scale')}weight"] = weight
        else:
            weights[f"resampler.{name}.weight"] = _matrix(weight, 2 if name == "o" else 1)
    _load(theirs, weights)
    assert theirs.loss(_torch_batch(batch)).item() == pytest.approx(float(loss(params)), abs=1e-4)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained < sum(p.numel() for p in theirs.parameters()) if part == "lora" else trained > 0


def test_mfu_by_hand():
    assert mfu(989e12, 2.0, "NVIDIA H100 80GB HBM3") == 0.5
    assert mfu(197e12, 4.0, "TPU v5 lite") == 0.25
    assert mfu(2307e12, 1.0, "TPU7x") == 2.0  # JAX sees two devices in a chip
    assert mfu(1e12, 1.0, "cpu") is None and mfu(1e12, 1.0, "NVIDIA H100 PCIe") is None


def test_figures_by_hand():
    device = "NVIDIA H200"
    both = {"device": device, "loss": 1.0}
    ours = {"step_s": 0.5, "compile_s": 9.0, "peak_bytes": 100, "step_bytes": 30, "flops": 98.9e12, **both}
    theirs = {"step_s": 2.0, "compile_s": None, "peak_bytes": 400, "step_bytes": 60, **both}
    means = {"step": {"events": 300.0, "targets": 20.0}, "loader_events_per_s": 7.0}
    found = benchmark.report(means, {"user_llm": ours, "torch": theirs})
    assert found["flops"] == 98.9e12 and found["loader_events_per_s"] == 7.0
    assert found["user_llm"] == {
        "steps_per_s": 2.0, "events_per_s": 600.0, "targets_per_s": 40.0, "compile_s": 9.0, "peak_bytes": 100,
        "step_bytes": 30, "device": device, "mfu": pytest.approx(0.2),
    }  # fmt: skip
    assert found["torch"] == {
        "steps_per_s": 0.5, "events_per_s": 150.0, "targets_per_s": 10.0, "peak_bytes": 400, "step_bytes": 60,
        "device": device, "mfu": pytest.approx(0.05), "speed_ratio": 4.0, "memory_ratio": 0.25, "step_memory_ratio": 0.5,
    }  # fmt: skip
    on_device = benchmark.report(means, {"user_llm": ours | {"step_bytes": None}, "torch": theirs})
    assert "step_bytes" not in on_device["user_llm"] and on_device["torch"]["step_bytes"] == 60
    assert "step_memory_ratio" not in on_device["torch"]
    on_cpu = benchmark.report(means, {"user_llm": ours | {"device": "cpu"}})
    assert "mfu" not in on_cpu["user_llm"] and "torch" not in on_cpu


def test_what_malloc_keeps_is_not_counted_as_held():
    """100 MB are freed below a block that is still in use, so that malloc does not give them back by itself."""
    program = """
import resource, turns
blocks = [b"x" * 100_000 for _ in range(1_000)]
last = blocks.pop()
blocks.clear()
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * resource.getpagesize() - turns.resident_bytes())
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "launch", capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 50e6


@pytest.mark.parametrize("flag", ["--preset=huge", "--parts=encoder,decoder", "--sides=tensorflow"])
def test_an_unknown_choice_is_refused(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", flag])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert re.search(r"'(huge|decoder|tensorflow)'.*choose", capsys.readouterr().err)


def test_a_part_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    ours = {"step_s": 0.5, "compile_s": 9.0, "peak_bytes": 100, "step_bytes": 30, "flops": 1.0, "device": "cpu", "loss": 1.0}

    def run(command):
        (part,) = next(word for word in command if word.startswith("--parts=")).removeprefix("--parts=").split(",")
        if "batches" in command:
            if part == "full":
                raise SystemExit("no batches")
            return {part: {"step": {"events": 3.0}}}
        if "--parts=lora" in command:
            raise SystemExit("out of memory")
        return ours

    monkeypatch.setattr(benchmark.turns, "run", run)
    out = tmp_path / "found.json"
    command = ["benchmark.py", "--preset=tiny", "--parts=lora,full,encoder", "--sides=user_llm", "--rounds=1", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="^out of memory\nno batches$"):
        benchmark.main()
    found = json.loads(out.read_text())
    assert "lora" not in found and found["encoder"]["user_llm"]["steps_per_s"] == 2
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.slow
def test_a_tiny_benchmark_runs_both_sides(reference, tmp_path):
    """Of one part; all of them on our side: the rehearsal of `test_quarter_hour.py`."""
    part, out, trace = "full", tmp_path / "found.json", tmp_path / "trace"
    command = ["launch/benchmark.py", "--preset=tiny", f"--parts={part}", "--rounds=1", "--steps=2"]
    command += [f"--out={out}", f"--profile={trace}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert json.loads(done.stdout) == found
    ours, theirs = found[part]["user_llm"], found[part]["torch"]
    assert theirs["speed_ratio"] == pytest.approx(ours["steps_per_s"] / theirs["steps_per_s"])
    assert min(ours["events_per_s"], theirs["events_per_s"], ours["compile_s"], theirs["memory_ratio"]) > 0
    for side in (ours, theirs):
        assert 0 < side["step_bytes"] <= side["peak_bytes"]
    assert list((trace / part).rglob("*.xplane.pb"))
    traced = _traced_step("tiny", part, tmp_path)[1]  # 32 rows of up to 32 tokens: not all of their logits count
    assert count_flops(traced, turns=1) < found[part]["flops"] < count_flops(traced)


def _traced_step(preset, part, workdir):
    """Return the shapes of a part's state, and what its step computes."""
    run, _, task = benchmark.open_part(benchmark.preset_config(preset), part, workdir)
    phase = benchmark.PARTS[part][0]
    loop = settle_steps(LoopConfig(**vars(run.config.sections[phase].loop)), task)
    state, step = abstract_state(task, loop, run.optimizer_config(phase), run.mesh, 0)
    with jax.set_mesh(run.mesh):
        return state, step.trace(state, abstract_batch(task, run.mesh)).jaxpr.jaxpr


@pytest.mark.slow
def test_the_sizes_for_a_gpu_trace_to_the_flops_of_their_formula(tmp_path):
    """6 N a token, and attention; N of what a token is multiplied by. Frozen weights have no gradients: 4 N."""
    found, states = {}, {}
    for part in benchmark.PARTS:
        states[part], traced = _traced_step("gpu", part, tmp_path)
        found[part] = count_flops(traced)
    events, row = 8 * 2048, 2048
    attention = 3 * 4 * 8 * row * 512  # forward and twice backward, two products, 8 layers
    assert found["encoder"] == pytest.approx(events * (6 * trees.count(states["encoder"].trainable) + attention), rel=0.01)
    llm = sum(leaf.size for path, leaf in trees.flatten(states["full"].trainable).items() if path.startswith("decoder/"))
    assert 0.55e9 < llm < 0.7e9
    tokens = 16 * 16 * 32
    assert found["full"] == pytest.approx(6 * llm * tokens, rel=0.1)
    assert 0.6 < found["lora"] / found["full"] < 0.8
