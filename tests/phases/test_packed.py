"""Contextualization on packed rows: the loss, what is logged and every gradient are those of a row for each prompt."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_quickstart import tiny_config

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.config import defaults
from user_llm.config.check import check
from user_llm.data.dataset import open_dataset
from user_llm.data.packing import PackedExamples, Packing
from user_llm.data.schema import Feature, Schema
from user_llm.models.choices import Choices
from user_llm.models.decoder import DecoderConfig
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn import columns
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.phases.builders import BUILDERS
from user_llm.phases.contextual_loss import contextual_counts, contextual_loss
from user_llm.phases.run import Run

BLOCK = BlockConfig(width=12, heads=2, kv_heads=2, head_dim=6, mlp_width=16)
CROSS = CrossAttentionConfig(user_width=8, every=2, heads=2, head_dim=4)
CONFIG = UserLLMConfig(
    decoder=DecoderConfig(vocab_size=13, num_layers=2, block=BLOCK, tie_embeddings=True, cross=CROSS),
    encoder=UserEncoderConfig(
        schema=Schema((Feature("item", "item", 12),)),
        block=BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=12),
        num_layers=1,
    ),
    resampler=ResamplerConfig(num_latents=2, input_width=8, heads=2, head_dim=4, mlp_width=12),
    table_rows=128, item_width=8, num_items=11, soft_prompt=True,
)  # fmt: skip
WEIGHTS = {"catalogue": 1.0, "align": 0.5, "chunk": 8, "leading": {"next_item": 1}}
LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.0, targets=".*")
WINDOWED = dataclasses.replace(BLOCK, window=3, window_rope_theta=1e3)
by_event = dataclasses.replace(CROSS, seat="before_block", recency_buckets=3)


def _changed(config, *, cross=None, **decoder):
    decoder |= {} if cross is None else {"cross": cross}
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))


VARIANTS = {
    "cross-attention and soft prompt, lora, residual": dataclasses.replace(
        _changed(CONFIG, block=dataclasses.replace(BLOCK, lora=LORA)), residual=True
    ),
    "by event, before the block, windows": dataclasses.replace(
        _changed(CONFIG, cross=by_event, block=WINDOWED, windowed=(True, False)), resampler=None, soft_prompt=False
    ),
    "an encoder that sees both ways": dataclasses.replace(
        CONFIG, soft_prompt=False, encoder=dataclasses.replace(CONFIG.encoder, objective="masked")
    ),
    "text alone": dataclasses.replace(
        _changed(CONFIG),
        decoder=dataclasses.replace(CONFIG.decoder, cross=None),
        encoder=None,
        resampler=None,
        soft_prompt=False,
    ),
}
QUICK = ("cross-attention and soft prompt, lora, residual", "text alone")


def make_examples(config, count, seed=0):
    """Return histories of 3 to 5 events with up to three ends, and prompts of 4 to 7 tokens; of text alone, with two answers."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(rng.integers(3, 6))
        ends = 1 if config.encoder is None else int(rng.integers(1, 4))
        prefix = np.sort(rng.permutation(np.arange(1, length + 1))[:ends])
        text_lengths, pad = rng.integers(4, 8, ends), 3 - ends if config.encoder is not None else 0
        text = np.where(np.arange(7) < text_lengths[:, None], rng.integers(1, 13, (ends, 7)), 0)
        answers = np.tile([1] if config.encoder is not None else [1, 3], (ends, 1))
        items = rng.integers(1, 12, answers.shape)
        example = {"prefix": prefix, "text": text, "text_lengths": text_lengths, "answers": answers, "items": items}
        example = {name: np.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) for name, a in example.items()}
        if config.encoder is None:
            example["prefix"] *= 0
        else:
            events = np.where(np.arange(6) < length, rng.integers(1, 12, 6), 0)
            example |= {"events": events, "lengths": np.array(length)}
        found.append(example | {"text_weight": {"next_item": np.float32(0.25)}})
    return found


def stacked(examples):
    """Return a batch with a row for each prompt."""
    batch = jax.tree.map(lambda *arrays: np.stack(arrays), *examples)
    return batch | ({"events": batch["events"][..., None]} if "events" in batch else {})


def packed(config, examples, bundles=1):
    """Return the same examples as a batch of packed bundles."""
    soft = config.num_tokens if config.soft_prompt else 0
    each = [examples[part::bundles] for part in range(bundles)]
    found = []
    for part in each:
        source = grain.MapDataset.source([*part, part[0]]).to_iter_dataset()
        prompts = sum(int((example["text_lengths"] > 0).sum()) for example in part)
        sizes = Packing(prompts, len(part) + 1, len(part) * 2, 2 * (7 + soft) + 4, 4, soft, leading=1)
        found.append(next(iter(PackedExamples(source, sizes))))
    batch = stacked(found)
    if "events" in batch:
        batch["events"] = np.maximum(batch["events"], 0)
    segments, counts = batch["segments"], batch["segments"].max(-1)
    assert (counts > 1).any() and (counts == 0).any() and (np.diff(segments) < 0).any()  # several to a row, padding, empty rows
    return batch


def some_choices():
    """Return sets of the tokens of titles: which places of each item's title are choices, and among what, is drawn."""
    of_title = np.random.default_rng(1).integers(-1, 2, (12, 3)).astype(np.int32)
    return Choices(
        np.zeros_like(of_title),
        of_title,
        columns.packed(np.ones((1, 13), bool)),
        np.array([0, 12]),
        np.arange(1, 13, dtype=np.int32),
    )


def found_by(graphdef, params, batch, choices=None, **shares):
    """Return loss, scalars and gradients."""

    @functools.partial(jax.jit)
    def run(params, batch, choices):
        loss = lambda params: contextual_loss(trees.merge(graphdef, params), batch, None, choices=choices, **shares, **WEIGHTS)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    return run(params, batch, choices)


def assert_close(first, second, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), *jax.device_get((first, second)))


@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_packed_rows_give_the_loss_and_the_gradients_of_a_row_for_each_prompt(drawn, variant):
    config = VARIANTS[variant]
    graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(0)))
    examples = make_examples(config, 6)
    alone, together = found_by(graphdef, params, stacked(examples)), found_by(graphdef, params, packed(config, examples))
    assert_close(together, alone)
    grads = trees.flatten(alone[1])
    still = {path for path, grad in grads.items() if not np.any(grad)}
    assert still <= {path for path in grads if "/heads/" in path or "mask_token" in path}


@pytest.mark.parametrize("variant", QUICK)
def test_the_choices_of_titles_are_found_in_packed_rows(drawn, variant):
    config = VARIANTS[variant]
    graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(0)))
    examples, choices = make_examples(config, 6), some_choices()
    batches = stacked(examples), packed(config, examples)
    for shares in ({}, {"all_words": 0.5}):
        counted = [int(contextual_counts(batch, choices, **shares)["tokens"]) for batch in batches]
        assert counted[0] == counted[1] < int(contextual_counts(batches[0])["tokens"])
    assert_close(*(found_by(graphdef, params, batch, choices, teacher=0.75, all_words=0.5) for batch in batches))


@pytest.mark.slow
def test_bundles_are_shared_out_over_eight_devices(drawn, mesh_of):
    config = VARIANTS["cross-attention and soft prompt, lora, residual"]
    graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(0)))
    batch, found = packed(config, make_examples(config, 24), bundles=8), []
    for mesh in (mesh_of(), mesh_of(4, 2, 1)):
        placed = jax.device_put(params, meshes.shardings(defaults.SHARDING, params, mesh))
        with jax.set_mesh(mesh):
            choices = meshes.put_whole(some_choices(), mesh)
            found.append(found_by(graphdef, placed, meshes.put_batch(batch, mesh), choices, teacher=0.75, all_words=0.5))
    assert_close(*found)


def test_a_phase_of_two_tasks_packs_each_and_its_streams_resume(tmp_path, mesh_of):
    config = tiny_config()
    config.data.streams = 2
    config.user_llm.pack.update(histories=2, room=3)
    config.user_llm.update(injection="both", batch_size=8)
    config.user_llm.prompts.favorite.weight = 1.0
    read = check(config)
    run = Run(read, epath.Path(tmp_path), mesh_of())
    data = open_dataset(read, run.workdir)
    build = lambda: BUILDERS["contextualize"]("user_llm", run, data)  # noqa: E731
    task = build()
    feed, seen = iter(task.train_data), []
    for _ in range(3):
        next(feed)
    state = json.loads(json.dumps(feed.get_state()))
    again = iter(build().train_data)
    again.set_state(state)
    for _ in range(4):
        batch = next(feed)
        jax.tree.map(np.testing.assert_array_equal, next(again), batch)
        [(name, weight)] = batch["text_weight"].items()
        assert len(weight) == 4 == len(batch["segments"])
        value, scalars = jax.eval_shape(task.loss, task.shapes, batch | task.beside, jax.random.key(0), None)
        assert value.shape == () and f"{name}/text_loss" in scalars
        assert task.count_events(batch) == sum(map(int, (batch["prefix"] > 0).reshape(-1))) > 8
        seen.append(name)
    assert set(seen) == {"next_item", "favorite"}
