"""Tiny models with drawn parameters, each read back from its directory, and the dataset whose users they are asked about."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from user_llm.common import mesh as meshes
from user_llm.data.dataset import Dataset
from user_llm.data.fields import Fields, Number
from user_llm.data.prompts.base import Lines, Question
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.splits import leave_last_out
from user_llm.data.timelines import Timelines
from user_llm.data.tokenizer import train_bpe
from user_llm.data.vocabulary import Vocabulary
from user_llm.models.decoder import DecoderConfig
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.lora import LoRAConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.predictor import Predictor
from user_llm.tasks.asking import Asking
from user_llm.tasks.favorite import FavoriteExamples, Labels, OfHistory
from user_llm.tasks.next_item import NextItemExamples

EVENTS = 6  # that an encoder reads
EVERYWHERE = ((".*", ()),)  # the rule of sharding by which every device holds all of every parameter
BLOCK = BlockConfig(width=12, heads=2, kv_heads=2, head_dim=6, mlp_width=16)
RESAMPLER = ResamplerConfig(num_latents=3, input_width=8, heads=2, head_dim=4, mlp_width=12)
# Cross-attention, soft prompt, resampler, the encoder's objective, titles in the prompt and how; what trained items gave a head.
VARIANTS = {
    "cross": dict(cross=True, soft=False, resampler=True, objective="autoregressive", text_items=0),
    "soft": dict(cross=False, soft=True, resampler=True, objective="masked", text_items=2),
    "both, by event": dict(
        cross=True, soft=True, resampler=False, objective="autoregressive", text_items=0, residual=True,
    ),
    "titles": dict(cross=False, soft=False, resampler=False, objective="", text_items=3),
    "summary": dict(cross=False, soft=False, resampler=False, objective="", text_items=3, history="summary"),
    "written": dict(cross=True, soft=False, resampler=True, objective="dual", text_items=0, ranks=False),
    "lora": dict(cross=True, soft=False, resampler=True, objective="autoregressive", text_items=0, lora=LoRAConfig(2, 4.0, 0.0, ".*"), residual=True),
}  # fmt: skip


def variants(*fast: str) -> list:
    """Return all variants as parameters of a test; those that are not named are slow."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in VARIANTS]


@dataclasses.dataclass(frozen=True)
class Made:
    """A model in its directory, as it was written, and the dataset that it knows."""

    directory: Path
    written: Personalizer
    asking: Asking

    @property
    def timelines(self) -> Timelines:
        return self.asking.data.timelines

    def rows(self, user: int, stop: int | None = None, start: int = 0) -> list[dict[str, Any]]:
        """Return the raw events [start, stop) of a user, in the columns that the model names."""
        t = self.timelines
        stop = int(t.lengths[user]) if stop is None else stop
        return [
            {"user": t.user_keys[user], "item": t.catalogue.keys[t.item[e]], "rating": int(t.columns["rating"][e]),
             "timestamp": int(t.order[e])}
            for e in range(int(t.offsets[user]) + start, int(t.offsets[user]) + stop)
        ]  # fmt: skip


def make_dataset(make_timelines: Callable[..., Timelines]) -> Timelines:
    """Users of 3 to 11 events, the last one with none but 2, and ties in time."""
    rng = np.random.default_rng(5)
    lengths = [3, 8, 11, 5, 7]
    items = [rng.integers(1, 10, n).tolist() for n in lengths]
    times = [(np.sort(rng.choice(50, n, replace=False)) * 3600).tolist() for n in lengths]
    made = make_timelines(items, times, num_items=9)
    return dataclasses.replace(made, fields=Fields(numbers={"rating": Number.of_scale("rating", range(1, 11))}))


def make_models(
    dataset: Timelines, drawn: Callable[..., Any], folder: Path, variants: Mapping[str, dict[str, Any]] = VARIANTS
) -> Callable[[str], Made]:
    """Return `make(variant)`: writes the model of that variant to a folder, and returns it.

    Args:
      drawn: the fixture of that name.
      variants: the settings of each variant, as VARIANTS has them.
    """
    lines_of = ["Next:", *dataset.catalogue.titles[1:], "Favorite?", "Action Comedy Drama War"]
    tokenizer = train_bpe([f"{line}\n" for line in lines_of], 280, folder / "tokenizer")
    made: dict[str, Made] = {}
    bag = next(iter(dataset.catalogue.multi))  # of which a favourite is asked

    def make(variant: str) -> Made:
        if variant in made:
            return made[variant]
        v = variants[variant]
        encoder = v["objective"] and UserEncoderConfig(
            schema=dataset.schema, num_layers=1, objective=v["objective"], feature_width=4, max_events=EVENTS,
            block=BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=12),
        )  # fmt: skip
        cross = CrossAttentionConfig(user_width=8, every=1, heads=2, head_dim=4) if v["cross"] else None
        block = dataclasses.replace(BLOCK, lora=v.get("lora"))
        config = UserLLMConfig(
            decoder=DecoderConfig(tokenizer.vocab_size, 1, block, tie_embeddings=True, cross=cross),
            encoder=encoder or None, resampler=RESAMPLER if v["resampler"] else None, soft_prompt=v["soft"], table_rows=128,
            item_width=8, num_items=dataset.schema.num_items, residual=v.get("residual", False),
        )  # fmt: skip
        graphdef, params = drawn(lambda: UserLLM(config, rngs=nnx.Rngs(params=0)))
        history = v.get("history", "titles")
        lines = Lines(tokenizer, dataset.catalogue, max_title_tokens=20, history=history, text_items=v["text_items"])
        split = leave_last_out(dataset)
        question = Question(lines, instruction="", question="Favorite?", max_tokens=300, max_target_tokens=8)
        examples = {
            "next_item": NextItemExamples(NextItem(lines, instruction="Next:", max_tokens=300), dataset, split),
            "favorite": FavoriteExamples(question, OfHistory(Labels(dataset, feature=bag, whole=False), split)),
        }
        mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        params = jax.device_put(
            params, meshes.shardings(EVERYWHERE, params, mesh)
        )  # as loaded ones, which share their programs
        predictor = Predictor(
            config, graphdef, params, mesh, {task: of.template for task, of in examples.items()},
            max_events=EVENTS if encoder else 0, batch_size=4, ranks=v.get("ranks", True),
        )  # fmt: skip
        names = {"favorite": {n: name for n, name in enumerate(dataset.catalogue.vocab[bag]) if n}}
        model = Personalizer("", predictor, Vocabulary.of(dataset), lines, names)
        facts = {
            "dataset": "toy",
            "users": 5,
            "events": 20,
            "items": 9,
            "columns": ["item"],
            "phase": "user_llm",
            "command": "none",
            "rows": [],
        }
        counts = np.arange(len(dataset.catalogue.keys))
        how = artifact.Making(None, True, folder / "tokenizer", EVERYWHERE, "float32", counts, facts)
        directory = folder / variant.replace(", ", "-").replace(" ", "-") / "model"
        written = artifact.save(directory, model, how)
        made[variant] = Made(directory, written, Asking(predictor, Dataset(dataset, split), examples))
        return made[variant]

    return make
