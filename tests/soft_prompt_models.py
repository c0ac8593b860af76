"""Models whose users are soft prompts of drawn parameters, on an LLM of a checkpoint, and the users that they are asked about."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tiny_models import EVENTS, EVERYWHERE, RESAMPLER

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.data.prompts.base import Lines
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.timelines import Timelines
from user_llm.data.tokenizer import load_tokenizer, train_bpe
from user_llm.data.vocabulary import Vocabulary
from user_llm.models import export as formats
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.pretrained import decoder_config, load_decoder
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.predictor import Predictor
from user_llm.serving.user import User

TEMPLATE = "{% for m in messages %}{{ bos_token + m.role + '\\n' + m.content + '\\n' }}{% endfor %}{{ 'assistant\\n' }}"
FACTS = {"dataset": "toy", "users": 5, "events": 20, "items": 9, "columns": ["item"], "phase": "user_llm", "command": "none", "rows": []}  # fmt: skip


def write_llm(directory: Path, drawn: Callable[..., Any]) -> None:
    """Write a tiny LLM of drawn parameters, in sizes that vLLM computes: heads of 32. Its embeddings are not tied."""
    tokenizer = train_bpe(["The next film this user watches:\n", "system\nassistant\n"] * 9, 300, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    block = BlockConfig(width=64, heads=2, kv_heads=1, head_dim=32, mlp_width=96)
    config = DecoderConfig(tokenizer.vocab_size, 4, block, tie_embeddings=False)
    _, params = drawn(lambda: Decoder(config, rngs=nnx.Rngs(params=0)), seed=1)
    formats.save_decoder(directory, params, config)


def personalize(
    llm: Path, directory: Path, dataset: Timelines, drawn: Callable[..., Any], cross: CrossAttentionConfig | None = None
) -> Personalizer:
    """Write a model directory whose LLM is a checkpoint's, with the whole LLM in it; return the model.

    Args:
      cross: the cross-attention by which the LLM reads its user; None for a soft prompt.
    """
    tokenizer, bare = load_tokenizer(llm), decoder_config(llm, unroll=True)
    decoder = dataclasses.replace(bare, cross=cross)
    encoder = UserEncoderConfig(
        schema=dataset.schema, num_layers=1, objective="masked", feature_width=4, max_events=EVENTS,
        block=BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=12),
    )  # fmt: skip
    config = UserLLMConfig(
        decoder=decoder, encoder=encoder, resampler=RESAMPLER, soft_prompt=cross is None, table_rows=128, item_width=8,
        num_items=dataset.schema.num_items,
    )  # fmt: skip
    graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(params=0)))
    params = trees.combine(params, {"decoder": load_decoder(llm, bare)})
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = jax.device_put(params, meshes.shardings(EVERYWHERE, params, mesh))
    lines = Lines(tokenizer, dataset.catalogue, max_title_tokens=20, history="titles", text_items=0)
    templates = {"next_item": NextItem(lines, instruction="Next:", max_tokens=300)}
    predictor = Predictor(config, graphdef, params, mesh, templates, max_events=EVENTS, batch_size=4)
    counts = np.arange(len(dataset.catalogue.keys))
    how = artifact.Making(None, True, llm, EVERYWHERE, "float32", counts, FACTS)
    return artifact.save(directory, Personalizer("", predictor, Vocabulary.of(dataset), lines, {}), how, whole=True)


def encode_users(model: Personalizer, count: int) -> list[User]:
    """Return users with events of their own."""
    rng = np.random.default_rng(3)
    rows = [
        {"user": f"user {n}", "item": str(rng.choice(model.vocabulary.catalogue.keys[1:])), "rating": int(rng.integers(1, 11)), "timestamp": 3600 * t}
        for n in range(count)
        for t in range(int(rng.integers(2, 2 + EVENTS)))
    ]  # fmt: skip
    return list(model.encode_many(rows).values())
