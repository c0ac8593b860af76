"""A dataset, a task, an encoder and a family of LLMs of one's own, each as a user of the library would write it."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from user_llm.config.values import Count, Weight
from user_llm.data.fields import Fields
from user_llm.data.prompts.base import Question
from user_llm.data.raw import Raw, pieces
from user_llm.data.schema import Schema
from user_llm.evals.measured import Measured
from user_llm.models.encoder import Encoded, item_scores, valid_rows
from user_llm.models.families import Family
from user_llm.nn.layers import embedding_param, linear_param
from user_llm.tasks.task import Found, PromptTask

# A dataset: lines of listener, track, seconds and genre, with tabs between.


def find_plays(data, keep: Path) -> Raw:
    """Return the plays in a folder."""
    file = epath.Path(data.dir) / "plays.tsv"
    if not file.exists():
        raise ValueError(f"No {file}: set data.dir to the folder of plays.")
    lines = lambda: (line.rstrip("\n").split("\t") for line in file.open())  # noqa: E731
    raw = Raw(
        name="plays",
        files=(file,),
        events=lambda: pieces(((user, track, int(time), 0) for user, track, time, _ in lines()), raw.event_schema),
        items=lambda: pieces(((track, f"Track {track}", [genre]) for _, track, _, genre in lines()), raw.item_schema),
        ordinals={},
        bags=("genre",),
        fields=Fields(user="listener", item="track", time="seconds"),
    )
    return raw


def write_plays(folder: Path, users: int = 24, tracks: int = 12, events: int = 9) -> None:
    """Write listeners who go through the tracks one after another, each from a track of their own on."""
    folder.mkdir()
    rows = [
        f"ann{user}\t{(user + n) % tracks:03}\t{1_700_000_000 + 60 * n}\t{'even' if (user + n) % 2 else 'odd'}"
        for user in range(users)
        for n in range(events)
    ]
    (folder / "plays.tsv").write_text("\n".join(rows) + "\n")


# A task: of which genre is the next track?


@dataclasses.dataclass(frozen=True)
class NextGenreSettings:
    """What a config says under `prompts.next_genre`."""

    question: str
    weight: Weight
    text: Weight
    max_tokens: Count
    max_target_tokens: Count
    instruction: str = ""


class NextGenreExamples:
    """A question at each event that has a genre: the events before it are the history."""

    ranks = False

    def __init__(self, template: Question, data):
        self.template, self.timelines, self.split = template, data.timelines, data.split
        catalogue = data.timelines.catalogue
        self.genres, self.of_item = catalogue.vocab["genre"], catalogue.multi["genre"][:, 0]

    def number(self, user: int, end: int) -> int:
        return int(self.of_item[self.timelines.items(user, end, end + 1)[0]])

    def row(self, user, end):
        return self.template.row(self.history(user, end), self.answer(user, end))

    def stretch(self, user, start, end, rng):
        return self.row(user, int(rng.integers(start + 1, end + 1)))

    def prompt(self, user, end, whose=None):
        return self.template.prompt(self.history(*(whose or (user, end))))

    def history(self, user, end):
        return self.timelines.items(user, self.template.lines.first(end), end)

    def answer(self, user, end):
        return self.genres[self.number(user, end)]

    def targets(self, part):
        return self.split.targets[part]

    def names(self) -> dict[int, str]:
        return {number: name for number, name in enumerate(self.genres) if name}

    def lines(self) -> dict[int, list[int]]:
        return {number: self.template.lines.line(name).tolist() for number, name in self.names().items()}


def _measure(asking, name, part, limit, sizes):
    asked = asking.examples[name]
    users, ends = (array[:limit] for array in asked.targets(part))
    best = asking.choose_name(name, asked.lines(), users, ends)
    wanted = [asked.number(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    return [Found(Measured(users, ends, {"accuracy": (best == wanted).astype(float)}))]


def _show(asking, name, users, ends):
    asked = asking.examples[name]
    return [asked.genres[number] for number in asking.choose_name(name, asked.lines(), users, ends)]


NEXT_GENRE = PromptTask(
    NextGenreSettings,
    ("accuracy",),
    examples=lambda lines, data, settings, config: NextGenreExamples(Question.of(lines, settings), data),
    measure=_measure,
    show=_show,
    names=lambda asked: asked.names(),
)


# An encoder: the running mean of what was embedded so far.


@dataclasses.dataclass(frozen=True)
class MeanConfig:
    """Sizes of the encoder; `size` is its option."""

    kind: ClassVar[str] = "mean"
    objective: ClassVar[str] = "autoregressive"
    causal: ClassVar[bool] = True
    longest: ClassVar[int] = 200

    schema: Schema
    size: Count

    @property
    def width(self) -> int:
        return self.size

    @property
    def table_rows(self) -> int:
        return -(-self.schema.features[0].size // 8) * 8

    def build(self, rngs, catalogue=None):
        return MeanEncoder(self, rngs=rngs)


class MeanEncoder(nnx.Module):
    """Parameters: item [V, D], project [D, D]."""

    heads: ClassVar[dict] = {}

    def __init__(self, config: MeanConfig, *, rngs):
        self.config = config
        self.item = embedding_param(rngs, (config.table_rows, config.size))
        self.project = linear_param(rngs, (config.size, config.size), fan_in=config.size)

    def states(self, events, *, segments, positions, key=None):
        place = jnp.arange(events.shape[1])
        seen = (segments[:, :, None] == segments[:, None, :]) & (place[None, :, None] >= place[None, None, :])
        share = seen / seen.sum(-1, keepdims=True)
        return jnp.einsum("BEF,BFD->BED", share, self.item[...][events[..., 0]]) @ self.project[...]

    def encode(self, events, ends, *, key=None):
        segments = jnp.ones(events.shape[:2], jnp.int32)
        return Encoded(self.states(events, segments=segments, positions=None, key=key), ends)

    def item_vectors(self, items=None):
        return self.item[...] if items is None else self.item[...][items]

    def valid_items(self):
        return valid_rows(self.config.table_rows, self.config.schema.num_items)

    def score(self, states):
        return item_scores(states, self.item_vectors(), self.valid_items())


# A family of LLMs: Llama's layers by other names, in a config.json that transformers does not know.
LAMP = Family(
    "LampForCausalLM",
    names={
        "embed": "words.weight",
        "norm/scale": "last_norm.weight",
        **{f"attn/{x}": f"attention.w{x}.weight" for x in "qkvo"},
        "mlp/gate_proj": "feed.gate.weight",
    },
    layer="blocks.{}.",
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10_000.0},
)
LAMP_SETTINGS = {
    "model_type": "lamp", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def write_lamp(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Write a checkpoint of the family with drawn weights and a tokenizer; return its tensors."""
    import json

    from safetensors.numpy import save_file

    from user_llm.data.tokenizer import train_bpe
    from user_llm.models.config_json import config_from_settings
    from user_llm.models.families import table

    train_bpe(texts, 300, folder)
    rng = np.random.default_rng(0)
    config = config_from_settings(LAMP_SETTINGS, "", {"lamp": LAMP})
    tensors = {f"model.{t.name}": (0.2 * rng.normal(size=t.theirs)).astype(np.float32) for t in table(config, LAMP)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LAMP_SETTINGS))
    return tensors
