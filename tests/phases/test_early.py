"""What would fail after a phase has trained fails before the first of them begins, and names what is to be changed."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from user_llm import experiment
from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.checkpoint import save_params
from user_llm.config import experiments
from user_llm.config.reader import read_config
from user_llm.data.dataset import Dataset, open_dataset
from user_llm.data.tokenizer import train_bpe
from user_llm.models.config_json import config_from_settings
from user_llm.models.families import FAMILIES, table
from user_llm.phases import early, pretrain_lm, starting
from user_llm.phases.contextualize import build_examples, title_choices
from user_llm.phases.run import Run
from user_llm.tasks.review import ReviewExamples

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_quickstart import tiny_config


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run that may be built: its config can still be changed."""

    config: ConfigDict
    dataset: Dataset
    mesh: Mesh
    workdir: epath.Path

    def build(self):
        return early.build_tasks(Run(read_config(self.config), self.workdir, self.mesh), self.dataset)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny world with ratings, categories and reviews, prepared once, and the workdir that holds it."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    config = tiny_config(experiments.experiment("amazon", "xattn", "synthetic"))
    return Opened(config, open_dataset(read_config(config), workdir), meshes.make_mesh(), workdir)


@pytest.fixture
def opened(world, monkeypatch, tmp_path):
    """Return `make(changes)`: the run with a changed config, whose tasks read and draw no parameters."""
    monkeypatch.setattr(trees, "init", lambda *_, **__: pytest.fail("parameters were drawn"))
    monkeypatch.setattr(starting, "load_params", lambda *_: pytest.fail("parameters were read"))

    def make(changes):
        config = world.config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        return dataclasses.replace(world, config=config)

    return make


def test_all_phases_are_built_of_shapes_in_their_order(opened):
    context = opened({})
    tasks = context.build()
    assert tuple(tasks) == context.config.phases and tasks["user_llm"].metrics[0] == "recall@1"
    assert not any((context.workdir / name).exists() for name in tasks)
    assert {leaf.__class__ for leaf in jax.tree.leaves(tasks["user_llm"].shapes)} == {jax.ShapeDtypeStruct}


PHASES = ("pretrain_encoder", "pretrain_lm", "user_llm")
QUESTION = "What this user writes about {title}, rated {rating} of 5:"
WRONG = [
    ({"phases": ("user_llm", "pretrain_encoder", "pretrain_lm")}, "user_llm: it starts from pretrain_encoder, which does not run before it: "
     "put pretrain_encoder before user_llm in phases, or set user_llm.encoder_init=scratch."),
    ({"phases": ("pretrain_encoder", "user_llm")}, "user_llm: it starts from pretrain_lm, which does not run before it: put pretrain_lm before user_llm in phases."),
    ({"phases": ("text_prompt_10",)}, "text_prompt_10: it starts from pretrain_lm, which does not run before it: "),
    ({"user_llm.encoder": "dual_encoder"}, "user_llm: it starts from dual_encoder, which does not run before it: put dual_encoder"),
    ({"user_llm.load": ((r"^decoder/stack/cross/", "fresh"), (r"^decoder/stack/", "pretrain_lm"), (".*", "fresh"))},
     "user_llm: it cannot start from pretrain_lm: embed is (300, 64) there and missing here; change user_llm.load or the sizes"),
    ({"user_llm.load": ((r"^decoder/", "pretrain_lm"), (".*", "fresh"))}, "user_llm: it cannot start from pretrain_lm: stack/cross/"),
    ({"user_llm.load": ((r"^decoder/", "fresh"),)}, "user_llm: No rule covers parameter 'item_head'"),
    ({"user_llm.loop.monitor": "ndcg"}, "user_llm.loop.monitor='ndcg': choose one of recall@1, recall@5"),
    ({"pretrain_lm.loop.monitor": "accuracy"}, "pretrain_lm.loop.monitor='accuracy': choose one of loss, perplexity."),
    ({"pretrain_encoder.loop.monitor": "loss"}, "pretrain_encoder.loop.monitor='loss': choose one of recall@1"),
    ({"user_llm.prompts.next_item.weight": 0.0}, "user_llm.loop.monitor='ndcg@10': choose one of accuracy."),
    ({"user_llm.optimizer.decay": ((r"^encoder", True),)}, "user_llm: No rule covers parameter 'decoder/"),
    ({"user_llm.loop.sharding": ((r".*", ("data",) * 9),)}, "user_llm: Sharding rule"),
    ({"user_llm.optimizer.b2": 0.999, "user_llm.optimizer.second_moment": "bfloat16"}, "user_llm.optimizer.b2=0.999: a second moment in bfloat16 cannot follow it"),
    ({"user_llm.optimizer.schedule": "cosine", "user_llm.loop.total_steps": 0, "user_llm.loop.total_epochs": 0.1,
      "user_llm.optimizer.warmup_steps": 100}, "user_llm.optimizer.warmup_steps=100: a cosine schedule of"),
    ({"user_llm.prompts.next_item.max_tokens": 12}, "user_llm.prompts.next_item: The instruction 'Next product:' must not be empty, and its"),
    ({"user_llm.prompts.next_item.instruction": ""}, "user_llm.prompts.next_item: The instruction '' must not be empty"),
    ({"user_llm.prompts.review.column": "text"}, "user_llm.prompts.review: amazon-Synthetic has no text 'text' to write: its texts are"),
    ({"user_llm.prompts.review.question": "About {book}:"}, "user_llm.prompts.review: The question of review asks for {book}"),
    ({"user_llm.prompts.review.max_tokens": 70}, "user_llm.prompts.review: The question 'What this user writes about"),
    ({"user_llm.prompts.favorite.max_tokens": 24}, "user_llm.prompts.favorite: The question 'Favorite of this user:"),
    ({"labels.feature": "genres"}, "user_llm.prompts.favorite: amazon-Synthetic has no 'genres' to be a favourite: set labels.feature to one of its own"),
    ({"encoder.features": ("item", "genres")}, "pretrain_encoder.encoder: No feature 'genres'"),
    ({"encoder.features": ("rating", "item")}, "pretrain_encoder.encoder: A schema starts with its one item feature"),
    ({"encoder.heads": ("gap",), "pretrain_encoder.loss.head_weights": {"gap": 1.0}}, "pretrain_encoder.encoder: No head can predict feature 'gap'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=lambda value: ",".join(value) if isinstance(value, dict) else "")
def test_what_a_phase_cannot_do_is_refused(opened, changes, sentence):
    context = opened({"phases": PHASES})
    weights = changes.pop("pretrain_encoder.loss.head_weights", None)
    context.config.update_from_flattened_dict(changes)
    if weights:
        context.config.pretrain_encoder.loss.head_weights = weights
    with pytest.raises(ValueError) as error:
        context.build()
    assert str(error.value).startswith(sentence), error.value
    assert str(error.value).endswith(".")


def test_the_last_of_many_phases_is_refused_before_the_first_trains(world, tmp_path, monkeypatch):
    """The whole run: nothing is begun, measured or trained."""
    config = world.config.copy_and_resolve_references()
    config.text_prompt_10.loop.monitor = "nothing"
    monkeypatch.setattr(experiment, "open_dataset", lambda *_: world.dataset)
    with pytest.raises(ValueError, match=r"^text_prompt_10\.loop\.monitor='nothing'"):
        experiment.run(config, tmp_path)
    left = {"audit.json", "values", "metrics.jsonl", "checkpoints", "params", "results.json"}
    assert not {path.name for path in tmp_path.rglob("*")} & left


def _texts(timelines, text, titles=None):
    """The same timelines with another text in every event, or other titles."""
    catalogue = timelines.catalogue
    columns = {
        name: np.full_like(column, text) if column.dtype.kind == "T" else column for name, column in timelines.columns.items()
    }
    titles = [titles(number, title) for number, title in enumerate(catalogue.titles)] if titles else catalogue.titles
    return dataclasses.replace(timelines, columns=columns, catalogue=dataclasses.replace(catalogue, titles=titles))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: _texts(t, ""),
            "user_llm.prompts.review: nobody wrote anything in training: set its weight to 0",
        ),
        (
            lambda t: _texts(t, "x", lambda n, title: "Same" if n in (3, 9) else title),
            "user_llm.prompts.next_item: Items 3 and 9 have",
        ),
        (
            lambda t: _texts(t, "x", lambda n, title: "a\nb" if n == 3 else title),
            "user_llm.prompts.next_item: The title of item 3 must",
        ),
    ],
)
def test_texts_and_titles_that_cannot_be_measured_are_refused(opened, world, change, sentence):
    context = opened({"phases": PHASES})
    dataset = dataclasses.replace(context.dataset, timelines=change(context.dataset.timelines))
    context = dataclasses.replace(context, dataset=dataset)
    with pytest.raises(ValueError) as error:
        context.build()
    assert str(error.value).startswith(sentence), error.value


def test_prompts_are_not_packed_where_training_has_none(opened, monkeypatch):
    """The sizes of bundles are settled by one epoch alone: an endless stream would never give a first prompt."""
    context = opened({"phases": PHASES, "user_llm.pack.histories": 2})
    monkeypatch.setattr(ReviewExamples, "row", lambda *_: None)
    with pytest.raises(
        ValueError, match=r"^user_llm\.prompts\.review: nobody has what it asks for in training: set its weight"
    ):
        context.build()


def test_a_task_whose_prompts_cannot_hold_anothers_history_is_refused(opened, monkeypatch):
    context = opened({"phases": PHASES})
    prompt = ReviewExamples.prompt
    monkeypatch.setattr(ReviewExamples, "prompt", lambda self, user, end: prompt(self, user, end))
    with pytest.raises(
        ValueError, match=r"^user_llm\.prompts\.review: its prompt\(user, end, whose\) takes whose history .*=0\.$"
    ):
        context.build()
    context.config.user_llm.eval.control_users = 0
    assert context.build()


def test_titles_are_chosen_in_the_trie_where_they_alone_are_written(opened):
    """A task that ranks items and writes something else has a softmax over the whole vocabulary, in training as in decoding."""
    context = opened({"phases": PHASES})
    asked = build_examples("user_llm", Run(read_config(context.config), context.workdir, context.mesh), context.dataset)
    own = copy.copy(asked["review"])
    own.ranks = True
    assert set(title_choices({"own": own, **asked}, 300)) == {"next_item"}


def test_parts_without_targets_are_refused(opened):
    context = opened({"phases": PHASES})
    nobody = (np.zeros(0, int), np.zeros(0, int))
    for part in ("validation", "test"):
        split = dataclasses.replace(context.dataset.split, targets=context.dataset.split.targets | {part: nobody})
        with pytest.raises(ValueError, match=f"^pretrain_encoder: no user of the {part} part has a next item"):
            dataclasses.replace(context, dataset=dataclasses.replace(context.dataset, split=split)).build()
    split = dataclasses.replace(context.dataset.split, train_stop=np.minimum(context.dataset.split.train_stop, 1))
    with pytest.raises(ValueError, match=r"pretrain_encoder: no user has two events to train on"):
        dataclasses.replace(context, dataset=dataclasses.replace(context.dataset, split=split)).build()


def test_batches_that_the_devices_cannot_share_are_refused(opened, mesh_of):
    context = dataclasses.replace(
        opened({"phases": ("pretrain_lm",), "pretrain_lm.batch.rows": 6}), mesh=mesh_of(data=2, fsdp=2)
    )
    with pytest.raises(ValueError, match=r"^pretrain_lm\.batch\.rows=6: it must be a multiple of 4, for 1 parts"):
        context.build()
    context.config.pretrain_lm.batch.rows = 8
    assert context.build()
    context.config.pretrain_lm.loop.accumulation_steps = 4
    with pytest.raises(ValueError, match=r"^pretrain_lm\.batch\.rows=8: it must be a multiple of 16"):
        context.build()


def test_a_phase_may_start_from_one_that_is_finished_in_the_workdir(opened, tmp_path):
    context = dataclasses.replace(opened({"phases": ("text_prompt_10",)}), workdir=epath.Path(tmp_path))
    first = dataclasses.replace(opened({"phases": ("pretrain_lm",)}), workdir=epath.Path(tmp_path)).build()
    shapes = first["pretrain_lm"].shapes
    save_params(tmp_path / "pretrain_lm" / "params", jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    with pytest.raises(ValueError, match="it starts from pretrain_lm"):  # not finished
        context.build()
    (tmp_path / "pretrain_lm" / "results.json").write_text("[]")
    assert context.build()
    context.config.llm.block.mlp_width += 2
    with pytest.raises(ValueError, match=r"cannot start from pretrain_lm: stack/blocks/mlp/down is \(1, 192, 64\) there"):
        context.build()


LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True, "vocab_size": 300,
}  # fmt: skip


LONG = LLAMA | {
    "model_type": "phi3", "pad_token_id": 0, "max_position_embeddings": 4096, "original_max_position_embeddings": 20,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 4.0]},
}  # fmt: skip
ALONE = {f"user_llm.prompts.{task}.weight": 0.0 for task in ("favorite", "favorite_future", "review")}


def _write_llm(folder, settings):
    """Write an open LLM of these settings with weights of zeros, and return its tensors."""
    train_bpe(["a line\n"], 300, folder)
    (folder / "config.json").write_text(json.dumps(settings))
    family = FAMILIES[settings["model_type"]]
    tensors = {"model." + t.name: np.zeros(t.theirs, np.float32) for t in table(config_from_settings(settings, ""), family)}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_texts_longer_than_an_open_llm_is_read_for_are_refused(opened, tmp_path):
    folder = tmp_path / "llm"
    _write_llm(folder, LONG)
    context = opened(ALONE | {"phases": PHASES, "llm.checkpoint": str(folder), "user_llm.cross.every": 1})
    with pytest.raises(
        ValueError, match=r"^general_text\.window: a text of 128 tokens is asked for, .* texts of at most 20: make"
    ):
        context.build()
    context.config.general_text.window = 20
    with pytest.raises(ValueError, match=r"^user_llm\.prompts\.next_item: A prompt with its answer of 48 tokens is asked for"):
        context.build()
    (folder / "config.json").write_text(json.dumps(LONG | {"original_max_position_embeddings": 48}))
    assert context.build()


def test_a_window_of_general_text_is_read_with_the_longest_soft_prompt(opened, tmp_path):
    folder = tmp_path / "llm"
    context = opened(
        ALONE
        | {"phases": PHASES, "llm.checkpoint": str(folder), "user_llm.injection": "soft_prompt", "general_text.window": 80}
    )
    latents = context.config.user_llm.resampler.num_latents + 1  # and the encoder's last state
    _write_llm(folder, LONG | {"original_max_position_embeddings": 80 + latents - 1})
    refusal = rf"^user_llm\.general_text\.window: a text, soft prompt included, of {80 + latents} tokens is asked for"
    with pytest.raises(ValueError, match=refusal):
        context.build()
    context.config.general_text.window = 79
    assert context.build()


def test_an_open_llm_is_checked_with_its_weights_and_the_general_text(opened, tmp_path):
    folder = tmp_path / "llm"
    tensors = _write_llm(folder, LLAMA)
    context = opened(ALONE | {"phases": PHASES, "llm.checkpoint": str(folder), "user_llm.cross.every": 1})
    assert tuple(context.build()) == ("pretrain_encoder", "user_llm")

    (folder / "vocab_old").symlink_to(tmp_path / "elsewhere")  # a link that nothing follows before the model is written
    with pytest.raises(ValueError, match=r"vocab_old"):
        context.build()
    (folder / "vocab_old").unlink()
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link that leads out of .*: put a copy in its place"):
        context.build()
    (folder / "tokenizer.json").unlink()
    (tmp_path / "elsewhere").rename(folder / "tokenizer.json")
    context.config.general_text.file = str(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match=r"^general_text\.file='.*nothing\.txt': it cannot be read as UTF-8 text"):
        context.build()
    context.config.general_text.file = ""
    context.config.user_llm.cross.every = 3
    with pytest.raises(ValueError, match=r"^user_llm: Cross-attention in every 3th of 2 layers"):
        context.build()
    save_file(tensors | {"model.norm.weight": np.zeros(9, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the config: model\.norm\.weight is \[9\] and not \[8\]"):
        context.build()


@pytest.mark.parametrize("titles", [2, 3, 20])
def test_a_small_catalogue_keeps_a_line_for_validation(opened, titles, monkeypatch):
    context = opened({"phases": ("pretrain_lm",)})
    lines = [f"Title {number}\n" for number in range(titles)]
    parts = []
    monkeypatch.setattr(pretrain_lm, "corpus", lambda data, seed: lines)
    monkeypatch.setattr(pretrain_lm, "packed_text", lambda lines, **_: parts.append(len(lines)))
    monkeypatch.setattr(Run, "streams", lambda self, make, rows: make((0, 1), rows))
    task = context.build()["pretrain_lm"]
    assert 1 <= parts[0] < titles and task.steps_per_epoch > 0
    lines[1:] = []
    with pytest.raises(ValueError, match=r"^pretrain_lm: a catalogue of 1 titles is too small"):
        context.build()
