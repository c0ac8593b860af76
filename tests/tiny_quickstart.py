"""The quick start, or any other config on a synthetic world, in seconds: a tiny world, tiny models, few steps."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from user_llm.common import mesh as meshes

PHASES = ("pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10")
TINY = {
    "data.synthetic.num_users": 60,
    "data.synthetic.num_items": 48,
    "data.synthetic.events_per_user": 14,
    "encoder.num_layers": 1,
    "encoder.max_events": 16,
    "llm.num_layers": 1,
    "llm.vocab_size": 300,
    "pretrain_encoder.loop.total_steps": 8,
    "pretrain_encoder.loop.eval_steps": 4,
    "pretrain_encoder.batch.rows": 8,
    "pretrain_encoder.batch.window": 16,
    "pretrain_encoder.batch.row_length": 16,
    "pretrain_encoder.loss.chunk": 64,
    "pretrain_lm.loop.total_steps": 4,
    "pretrain_lm.loop.eval_steps": 2,
    "pretrain_lm.eval.batches": 1,
    "pretrain_lm.batch.rows": 8,
    "pretrain_lm.batch.row_length": 64,
    "user_llm.loop.total_steps": 4,
    "user_llm.loop.eval_steps": 2,
    "user_llm.cross.every": 1,
    "user_llm.batch_size": 8,
    "user_llm.examples.max_events": 16,
    "user_llm.examples.targets_per_history": 2,
    "user_llm.prompts.next_item.max_tokens": 48,
    "user_llm.eval.generate_users": 10,
    "user_llm.eval.beams": 4,
    "user_llm.eval.guide": (),  # `serving/test_ranking.py` measures what the item head adds to the writing
    "user_llm.eval.rerank": 0,
    "user_llm.transitions": (0.5, 1.0),
    "text_prompt_10.loop.total_steps": 2,
    "text_prompt_10.loop.eval_steps": 2,
    "text_prompt_10.batch_size": 8,
    "text_prompt_10.prompts.next_item.max_tokens": 96,
} | {f"{phase}.optimizer.warmup_steps": 1 for phase in PHASES}


def tiny_config(config: ConfigDict | None = None) -> ConfigDict:
    config = config or quickstart.get_config()
    config.phases = tuple(phase for phase in PHASES if phase in config.phases)
    config.update_from_flattened_dict(TINY)
    return config


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of a process with so many CPU devices; the fewer there are, the sooner a run ends."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@contextmanager
def one_device() -> Iterator[None]:
    """Runs of this process take its first device alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", partial(meshes.make_mesh, devices=jax.devices()[:1]))
        yield
