import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from user_llm.common import trees
from user_llm.data.schema import Feature, Schema
from user_llm.evals import cost
from user_llm.evals.cost import METHODS, PromptSizes, Request
from user_llm.evals.cost_compiled import COUNTING, compile_request, inputs, least, serve, step_timer, structure
from user_llm.models.decoder import DecoderConfig
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLMConfig
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig

ROOT = Path(__file__).parents[2]
SCHEMA = Schema((Feature("item", "item", 101), Feature("rating", "ordinal", 11), Feature("genres", "multi", 20, 3)))
SIZES = PromptSizes(instruction=5, text_instruction=10, title=2.5)


def model(
    width=64,
    mlp=128,
    layers=2,
    vocab=256,
    user_width=64,
    latents=4,
    seat="after_attention",
    tied=True,
    every=2,
    depth=2,
    **block,
):
    """A model with grouped heads; its layers are scanned, which counting must undo."""
    return UserLLMConfig(
        decoder=DecoderConfig(
            vocab, layers, BlockConfig(**{"width": width, "heads": 4, "kv_heads": 2, "head_dim": width // 4, "mlp_width": mlp} | block),
            tie_embeddings=tied, cross=CrossAttentionConfig(user_width, every=every, heads=2, head_dim=16, seat=seat),
        ),
        table_rows=128, item_width=user_width, num_items=100,
        encoder=UserEncoderConfig(SCHEMA, BlockConfig(user_width, 2, 2, user_width // 2, 128), num_layers=depth, feature_width=8),
        resampler=ResamplerConfig(latents, user_width, heads=2, head_dim=16, mlp_width=96, num_layers=depth, recency_buckets=6),
    )  # fmt: skip


def test_every_term_by_hand():
    terms = cost.flops(model(), Request(3, cached=7, user="events", events=5))
    assert terms == {
        "projections": 2 * 3 * (2 * 64 * 64 * 2 + 2 * 64 * 32 * 2),
        "attention": 2 * 3 * 10 * (2 * 64 * 2 + 4 * 4),
        "mlp": 2 * 3 * 3 * 2 * 64 * 128,
        "head": 2 * 64 * 256,
        "cross projections": 1 * 3 * 2 * (2 * 64 * 32),
        "cross attention": 1 * 3 * 4 * (2 * 2 * 32 + 4 * 2),
        "user kv": 1 * 4 * 2 * (2 * 64 * 32),
        # q and o of 4 latents, k and v of 9, their MLP, scores and values, and the biases of 5 events.
        "resampler": 2 * (4 * 2 * 4096 + 9 * 2 * 4096 + 4 * 6 * 64 * 96 + 4 * 9 * (2 * 2 * 32 + 8) + 2 * 4 * 2 * 5 * 6),
        "encoder": 5 * 2 * (64 + 8 + 8) * 64 + 2 * (5 * 4 * 2 * 64 * 64 + 25 * (2 * 2 * 64 + 8) + 5 * 6 * 64 * 128),
    }


def test_what_is_stored_is_not_computed():
    everything, tokens, kv = (
        set(cost.flops(model(), Request(3, user=user, events=5 if user == "events" else 0)))
        for user in ("events", "tokens", "kv")
    )
    assert everything - tokens == {"resampler", "encoder"}
    assert tokens - kv == {"user kv"}
    assert kv - set(cost.flops(model(), Request(3))) == {"cross projections", "cross attention"}


@pytest.mark.parametrize(
    ("config", "request_"),
    [
        # A long prompt, for which the formula would fall short without the softmax's operations.
        pytest.param(model(), Request(600), marks=pytest.mark.slow),
        (model(tied=False), Request(1, cached=300)),
        (model(seat="before_block", residual_gate=True, qk_norm=True), Request(20, user="events", events=60)),
    ],
)
def test_formula_and_compiled_program_agree(config, request_):
    expected = sum(cost.flops(config, request_).values())
    assert compile_request(config, request_, to_run=False).flops == pytest.approx(expected, rel=0.05)


MEDIUM = model(512, 1536, layers=4, vocab=8192, user_width=256, latents=16, heads=8)
GEMMA = model(
    640, 2048, layers=6, vocab=32_768, user_width=256, kv_heads=1, head_dim=256, post_norms=True, qk_norm=True, norm_offset=1.0,
    activation="gelu_tanh", window=128, window_rope_theta=1e4,
)  # fmt: skip
GEMMA = dataclasses.replace(GEMMA, decoder=dataclasses.replace(GEMMA.decoder, windowed=(True,) * 5 + (False,)))


@pytest.mark.slow
@pytest.mark.parametrize("config", [model(), MEDIUM, GEMMA], ids=["tiny", "medium", "gemma"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("events", [50, 200])
def test_formula_and_compiled_programs_agree_for_every_way_of_serving(config, method, events):
    for request in cost.requests(method, events, SIZES).values():
        expected = sum(cost.flops(config, request).values())
        assert compile_request(config, request, to_run=False).flops == pytest.approx(expected, rel=0.05), request


SHALLOW = model(layers=1, every=1, depth=1)  # compiles soon


def random_params(config):
    """Drawn by numpy: compiling what draws, or `jnp.asarray` for each shape, takes longer than all else."""
    rng = np.random.default_rng(0)
    shapes = structure(config)[1]
    return jax.tree.map(
        lambda a: jax.device_put(rng.normal(0.0, a.shape[-1] ** -0.5 if a.shape else 1.0, a.shape).astype(a.dtype)), shapes
    )


@pytest.mark.slow
def test_every_way_of_serving_computes_the_same():
    graphdef, params = structure(SHALLOW)[0], random_params(SHALLOW)
    rng = np.random.default_rng(1)
    text = rng.integers(1, 256, (1, 12)).astype(np.int32)
    events = rng.integers(1, 11, (1, 9, SCHEMA.width)).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=COUNTING)  # one program, since to compile several takes longer
    def answers(params, text, events):
        whole = trees.merge(graphdef, params)
        encoded = whole.encode(events, jnp.array([[9]]))
        given = {
            "events": events,
            "tokens": whole.resampler(encoded.states, jnp.ones((1, 1, 9), bool))[:, 0],
            "kv": whole.user(encoded).kv,
        }
        empty = whole.decoder.init_cache(1, 12)
        found = {name: serve(graphdef, params, {"text": text, name: user}, empty)[0] for name, user in given.items()}
        found["none"], _ = serve(graphdef, params, {"text": text}, empty)
        _, prefix = serve(graphdef, params, {"text": text[:, :10]}, whole.decoder.init_cache(1, 10))
        longer = KVCache(*(jnp.pad(a, [(0, 0)] * 3 + [(0, 2), (0, 0)]) for a in prefix))
        found["cached"], _ = serve(graphdef, params, {"text": text[:, 10:]}, longer)
        return found

    found = jax.device_get(answers(params, text, events))
    for one, other in (("tokens", "events"), ("kv", "events"), ("cached", "none")):
        np.testing.assert_allclose(found[one], found[other], rtol=1e-4, atol=1e-4 * np.abs(found[other]).max())
    assert np.abs(found["kv"] - found["none"]).max() > 0.1 * np.abs(found["none"]).max()


def test_stored_bytes_are_those_of_the_arrays():
    def held(tree):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    config, (user_llm, *_, text) = model(), METHODS
    served = cost.requests(user_llm, 50, SIZES)
    for serving, name in (("user_tokens_stored", "tokens"), ("user_kv_stored", "kv")):
        assert cost.state_bytes(config, serving, served[serving]) == held(inputs(config, served[serving])[0][name])
    served = cost.requests(text, 50, SIZES)
    before = inputs(config, Request(served["prompt_kv_stored"].cached))[1]
    assert cost.state_bytes(config, "prompt_kv_stored", served["prompt_kv_stored"]) == held(before)
    assert cost.state_bytes(config, "prefix_cached", served["prefix_cached"]) == 0


def test_ways_of_serving_by_hand():
    user_llm, hybrid, text_10, _, text_all = METHODS
    assert cost.requests(user_llm, 200, SIZES) == {
        "recomputed": Request(5, user="events", events=200),
        "user_tokens_stored": Request(5, user="tokens"),
        "user_kv_stored": Request(5, user="kv"),
    }
    assert cost.requests(hybrid, 200, SIZES)["user_kv_stored"] == Request(35, user="kv")
    assert cost.requests(text_all, 200, SIZES) == {
        "recomputed": Request(510),
        "prefix_cached": Request(500, cached=10),
        "prompt_kv_stored": Request(1, cached=509),
    }
    assert cost.requests(text_10, 4, SIZES)["recomputed"] == Request(20)  # no more titles than events
    padded = cost.requests(text_all, 200, SIZES, pad=lambda length: -(-length // 64) * 64)
    assert padded["recomputed"] == Request(512)
    assert padded["prompt_kv_stored"] == Request(1, cached=509)


def test_ratios_are_to_the_full_text_prompt_of_the_same_user():
    rows = cost.table(model(), SIZES, [50, 200])
    assert len(rows) == 2 * (2 * 3 + 3 * 3)
    full = {row.events: row for row in rows if row.method.name == "text_prompt_all" and row.serving == "recomputed"}
    for row in rows:
        assert row.flops_ratio == sum(full[row.events].flops.values()) / sum(row.flops.values())
    stored = [row for row in rows if row.method.name == "user_llm" and row.serving == "user_kv_stored"]
    assert stored[0].flops == stored[1].flops  # however long the history
    assert {row.step.user for row in rows if row.method.attends} == {"kv"}


def test_what_does_not_fit_is_refused():
    no_cross = dataclasses.replace(model().decoder, cross=None)
    bare = dataclasses.replace(model(), decoder=no_cross, encoder=None)
    with pytest.raises(ValueError, match="a transformer as `encoder`, and a `resampler`"):
        cost.flops(bare, Request(3, user="kv"))
    with pytest.raises(ValueError, match="set `cross`"):
        cost.flops(dataclasses.replace(model(), decoder=no_cross, soft_prompt=True), Request(3, user="kv"))
    assert cost.flops(bare, Request(3))
    for wrong in ({"user": "vector"}, {"tokens": 0}, {"events": 5}, {"user": "events"}, {"user": "kv", "events": 5}):
        with pytest.raises(ValueError):
            Request(**{"tokens": 3} | wrong)


def test_programs_run_and_the_least_of_their_timings_counts():
    config = SHALLOW
    params = random_params(config)
    taken = compile_request(config, Request(4, user="kv")).timer(params)
    assert 0 < taken() < 10
    assert 0 < step_timer(config, params, Request(1, cached=4, user="kv"), steps=2)() < 10
    turns = iter([0.1, 3.0, 2.0, 5.0])  # the first warms up
    assert least({"a": lambda: next(turns)}, rounds=3) == {"a": 2.0}


@pytest.mark.slow
def test_command_prints_and_writes_the_table(tmp_path):
    out = tmp_path / "cost.json"
    command = [sys.executable, "launch/benchmark_cost.py", "--size=synthetic", "--events=20", "--no-latency", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    written = json.loads(out.read_text())
    assert written["facts"]["tokens_per_title"] > 1
    assert len(written["rows"]) == 15
    assert done.stdout.count("\n| 20 |") == 15
    for row in written["rows"]:
        assert row["flops_hlo"] == pytest.approx(row["flops_formula"], rel=0.05)
        assert row["prefill_ratio"] is None
