"""What phases depend on, and a run's directory settled by that; nothing is trained."""

import json
import sys
from pathlib import Path

import pytest
from etils import epath

from user_llm.common.hashes import data_hashes
from user_llm.config.check import check
from user_llm.config.inputs import training_settings
from user_llm.config.reader import read_config
from user_llm.data.dataset import Dataset
from user_llm.data.splits import make_split
from user_llm.models import pretrained
from user_llm.phases import depends, identities
from user_llm.phases.run import Run
from user_llm.training import phases
from user_llm.training.identity import read_identity

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_quickstart import tiny_config

DATA = {"data/ratings.csv": "r", "data/movies.csv": "m"}
ALL = ("pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10")
READERS_OF_TEXT = ALL[1:]


def _identities(config, data=None, llm=None):
    found, config = {}, read_config(config)
    for name in depends.with_sources(config):
        built_on = {source: found[source].hash for source in depends.sources(config, name)}
        found[name] = identities.phase_identity(config, name, data or DATA, llm or {"tokenizer/tokenizer.json": "t"}, built_on)
    return found


def _config(changes):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"seed": 1}, ALL),
        ({"data.min_events": 4}, ALL),
        ({"data.ties": "file"}, ALL),
        ({"data.split": "global_time"}, ALL),
        ({"data.withhold": 0.1}, ALL),
        ({"data.streams": 2}, ALL),
        ({"data.synthetic.num_users": 61}, ALL),
        ({"user_llm.loop.total_steps": 5}, ("user_llm",)),
        ({"user_llm.optimizer.learning_rate": 1.0}, ("user_llm",)),
        ({"user_llm.eval.beams": 5}, ("user_llm",)),
        ({"user_llm.prompts.next_item.instruction": "Next:"}, ("user_llm",)),
        ({"user_llm.strategy": "enc"}, ("user_llm",)),
        ({"user_llm.pack.histories": 4}, ("user_llm",)),
        ({"user_llm.pack.room": 2}, ()),  # prompts are not packed
        ({"text_prompt_10.loop.total_steps": 3}, ("text_prompt_10",)),
        ({"pretrain_lm.loop.total_steps": 5}, ("pretrain_lm", "user_llm", "text_prompt_10")),
        ({"pretrain_encoder.loop.total_steps": 9}, ("pretrain_encoder", "user_llm")),
        ({"pretrain_encoder.encoder": {"num_layers": 3}}, ("pretrain_encoder", "user_llm")),
        ({"encoder.num_layers": 2}, ("pretrain_encoder", "user_llm")),
        ({"encoder.block.width": 32}, ("pretrain_encoder", "user_llm", "text_prompt_10")),
        ({"llm.num_layers": 3}, READERS_OF_TEXT),
        ({"llm.block.dropout": 0.5}, READERS_OF_TEXT),
        ({"user_llm.encoder_init": "scratch"}, ("user_llm",)),
        ({"user_llm.encoder_init": "pretrained"}, ("user_llm",)),
        # What no phase of the run depends on.
        ({"phases": (*ALL, "user_llm_lora")}, ("user_llm_lora",)),
        ({"variants.user_llm_lora.like": "text_prompt_10"}, ()),
        ({"lora.rank": 4}, ()),
        ({"labels.feature": "x"}, ()),
        ({"general_text.windows": 1}, ()),
        ({"user_llm.prompts.favorite.max_tokens": 9}, ()),
        ({"data.category": "Books"}, ()),
        ({"data.columns.user": "u"}, ()),
        ({"data.dir": "elsewhere"}, ()),
        ({"data.catalogue_items": 9, "data.accept_changes": True, "reuse": "runs/other"}, ()),
        ({"mesh.fsdp": 4, "user_llm.loop.sharding": ()}, ()),
        ({"encoder.remat": "full", "llm.unroll": False, "llm.attention_kernel": "reference"}, ()),
        ({"user_llm.loop.save_steps": 1, "user_llm.loop.log_steps": 1}, ()),
        ({"pretrain_encoder.eval.batch_size": 3, "user_llm.loss.chunk": 8}, ()),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_phase_depends_on_what_it_reads_and_on_nothing_else(changes, differ):
    before, after = _identities(tiny_config()), _identities(_config(changes))
    assert {name for name in after if after[name] != before.get(name)} == set(differ)


@pytest.mark.parametrize(
    ("files", "differ"),
    [
        ({"data": {**DATA, "data/ratings.csv": "other"}}, ALL),
        ({"llm": {"tokenizer/tokenizer.json": "other"}}, READERS_OF_TEXT),
    ],
)
def test_a_phase_depends_on_the_content_of_its_files(files, differ):
    before, after = _identities(tiny_config()), _identities(tiny_config(), **files)
    assert {name for name in ALL if after[name] != before[name]} == set(differ)


def test_of_an_open_llm_the_files_count_and_not_the_sizes_of_the_small_one():
    config = _config({"llm.checkpoint": "elsewhere/llm"})
    llm = {"checkpoint/model.safetensors": "w", "tokenizer/tokenizer.json": "t"}
    before = _identities(config, llm=llm)
    assert set(before) == set(ALL) - {"pretrain_lm"}
    config.update_from_flattened_dict({"llm.num_layers": 9, "llm.checkpoint": "moved/llm", "llm.published": {"x": 1}})
    assert _identities(config, llm=llm) == before
    after = _identities(config, llm=llm | {"checkpoint/model.safetensors": "other"})
    assert {name for name in before if after[name] != before[name]} == {"user_llm", "text_prompt_10"}
    assert not any("llm.quantize" in identity.settings for identity in before.values())
    config.llm.quantize = "nf4"
    after = _identities(config, llm=llm)
    assert {name for name in before if after[name] != before[name]} == {"user_llm", "text_prompt_10"}
    config.llm.quantize, config.general_text.windows = "", 1
    assert {name for name in before if _identities(config, llm=llm)[name] != before[name]} == {"user_llm", "text_prompt_10"}


@pytest.mark.parametrize(
    ("phase", "off", "on"),
    [
        (
            "user_llm",
            {
                "loss.trie_softmax": False,
                "eval.guide": (),
                "eval.rerank": 0,
                "eval.bert_score": "",
                "eval.control_users": 0,
                "residual": False,
                "transitions": (),
            },
            {
                "loss.trie_softmax": True,
                "eval.guide": (0.5,),
                "eval.rerank": 9,
                "eval.bert_score": "best",
                "eval.control_users": 7,
                "residual": True,
                "transitions": (1.0,),
            },
        ),
        (
            "pretrain_encoder",
            {"loss.in_batch": False, "transitions": ()},
            {"loss.in_batch": True, "transitions": (1.0,)},
        ),
    ],
)
def test_what_is_off_is_no_part_of_a_phase_and_what_is_on_is(phase, off, on):
    """A phase that code without these keys has trained has none of them among its settings."""
    more = {"loss.trie_softmax": {"loss.teacher", "loss.all_words"}}  # what counts with a key alone
    before = _identities(_config({f"{phase}.{key}": value for key, value in off.items()}))[phase]
    assert not {f"{phase}.{key}" for key in (*off, *more["loss.trie_softmax"])} & before.settings.keys()
    for key, value in on.items():
        after = _identities(_config({f"{phase}.{k}": v for k, v in off.items()} | {f"{phase}.{key}": value}))[phase]
        added = {f"{phase}.{key}" for key in (key, *more.get(key, ()))}
        assert after.settings.keys() - before.settings.keys() == added and after != before


def test_which_step_is_kept_counts_only_where_it_is_not_the_best():
    found = {keep: _identities(_config({f"{name}.loop.keep": keep for name in ALL})) for keep in ("best", "last")}
    assert not any(key.endswith("loop.keep") for identity in found["best"].values() for key in identity.settings)
    assert all(f"{name}.loop.keep" in found["last"][name].settings for name in ALL)


@pytest.mark.parametrize(("keep", "patience", "counts"), [("last", 0, False), ("last", 3, True), ("best", 0, True)])
def test_a_phase_that_chooses_nothing_is_not_trained_again_because_it_looks_more_often(keep, patience, counts):
    settings = {"user_llm.loop.keep": keep, "user_llm.loop.patience_evals": patience}
    before = _identities(_config(settings))["user_llm"]
    for key, value in (("eval_steps", 7), ("monitor", "recall@10"), ("mode", "min")):
        after = _identities(_config(settings | {f"user_llm.loop.{key}": value}))["user_llm"]
        differ = training_settings(after.settings) != training_settings(before.settings)
        assert after != before and differ == counts, key


def test_a_teacher_counts_only_where_there_is_an_encoder():
    text_prompt = _identities(_config({"text_prompt_10.loss.trie_softmax": True}))["text_prompt_10"].settings
    assert "text_prompt_10.loss.all_words" in text_prompt and "text_prompt_10.loss.teacher" not in text_prompt


def test_a_tower_counts_for_what_reads_the_encoder_and_only_where_it_is_on():
    off, on = (_identities(_config({"encoder.tower": tower})) for tower in (False, True))
    assert all("encoder.tower" not in identity.settings for identity in off.values())
    differing = {name for name in off if off[name] != on[name]}
    assert "pretrain_encoder" in differing and "user_llm" in differing and "text_prompt_10" not in differing


def test_adapters_and_favourites_count_where_they_are_used():
    used = {"user_llm.strategy": "lora", "text_prompt_10.prompts.favorite.weight": 1.0}
    before = _identities(_config(used))
    after = _identities(_config(used | {"lora.rank": 4, "labels.feature": "x"}))
    assert {name for name in ALL if after[name] != before[name]} == {"user_llm", "text_prompt_10"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_llm.method": "../../x\0"}, r"^user_llm\.method '.*' has a character that cannot be printed"),
        ({"user_llm.method": ""}, r"^user_llm\.method='': it must be a text that is not empty"),
    ],
)
def test_what_has_no_identity_is_refused(changes, message):
    with pytest.raises((ValueError, KeyError), match=message):
        _identities(_config(changes))


@pytest.fixture
def settle(tmp_path, make_timelines, mesh_of):
    """Return `settle(config, workdir, data)`, which settles a run as `main` does; its tokenizer is trained on a toy catalogue."""
    timelines = make_timelines([[1, 2, 3, 4, 5]] * 3)

    def settle(config, name="run", data=None):
        workdir, read = epath.Path(tmp_path / name), check(config)
        depends.check_settings(read, workdir)
        dataset = Dataset(timelines, make_split(timelines, config.data.split), data or DATA)
        return depends.settle_run(Run(read, workdir, mesh_of()), dataset)

    return settle


def _finish(workdir, *names):
    """Write what finished phases leave."""
    for name in names:
        (workdir / name).mkdir(exist_ok=True)
        (workdir / name / "results.json").write_text(json.dumps([{"phase": name}]))


def test_a_run_that_is_started_again_has_the_same_identities(settle, tmp_path):
    first = settle(tiny_config())
    assert set(first) == {"baselines", *ALL} and len(set(first.values())) == 5
    _finish(tmp_path / "run", *ALL)
    assert settle(tiny_config()) == first and not (tmp_path / "run" / "earlier").exists()


def test_another_dataset_protocol_or_seed_in_a_workdir_is_refused_once_something_has_begun(settle, tmp_path):
    settle(tiny_config())
    settle(_config({"seed": 2}))  # nothing has begun
    settle(tiny_config())
    _finish(tmp_path / "run", "pretrain_encoder")
    for changes, difference in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data.min_events": 9}, "data.min_events: 5 -> 9"),
        (
            {"data.split": "global_time", "data.ties": "file"},
            'data.split: "leave_last_out" -> "global_time", data.ties: "hashed" -> "file"',
        ),
    ):
        with pytest.raises(ValueError, match=r"holds a run of another config \((.*)\): choose another --workdir\.$") as refused:
            settle(_config(changes))
        assert difference in str(refused.value)


def test_changed_data_under_what_was_trained_is_refused_unless_accepted(settle, tmp_path):
    before = settle(tiny_config())
    _finish(tmp_path / "run", *ALL)
    changed = {**DATA, "data/ratings.csv": "other"}
    with pytest.raises(
        ValueError,
        match=r"^pretrain_encoder, pretrain_lm, text_prompt_10, user_llm in .* saw other data \(data/ratings\.csv changed\): "
        r"choose another --workdir, or keep what is finished by --config\.data\.accept_changes=True\.$",
    ):
        settle(tiny_config(), data=changed)
    assert settle(tiny_config()) == before  # the refusal left everything as it was
    accepted = settle(_config({"data.accept_changes": True}), data=changed)
    assert {name: accepted[name] for name in ALL} == {name: before[name] for name in ALL}
    assert accepted["baselines"] != before["baselines"]
    with pytest.raises(ValueError, match="was trained on other files"):
        settle(tiny_config(), data=changed)


def test_a_changed_tokenizer_is_refused_by_what_was_trained_with_it(settle, tmp_path):
    settle(tiny_config())
    _finish(tmp_path / "run", "pretrain_encoder", "pretrain_lm")
    path = tmp_path / "run" / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(
        ValueError, match=r"^pretrain_lm in .* was trained on other files \(tokenizer/tokenizer_config\.json changed\)"
    ):
        settle(tiny_config())


def test_a_tokenizer_of_other_settings_is_made_again_and_the_encoder_stays(settle, tmp_path):
    before = settle(tiny_config())
    _finish(tmp_path / "run", *ALL)
    after = settle(_config({"llm.vocab_size": 290}))
    assert {name for name in ALL if after[name] != before[name]} == set(READERS_OF_TEXT)
    tokenizers = [tmp_path / "run" / "tokenizer", *(tmp_path / "run" / "earlier").glob("tokenizer-*")]
    sizes = [read_identity(epath.Path(path)).settings["llm.vocab_size"] for path in tokenizers]
    assert sizes == [290, 300]
    assert settle(tiny_config()) == before  # everything comes back


def test_data_that_changed_before_anything_was_trained_make_a_new_tokenizer(settle, tmp_path):
    settle(tiny_config())
    settle(tiny_config(), data={**DATA, "data/ratings.csv": "other"})
    assert read_identity(epath.Path(tmp_path / "run" / "tokenizer")).inputs["data/ratings.csv"] == "other"


def test_what_starts_from_a_phase_that_is_measured_again_stays(settle, tmp_path):
    settle(tiny_config())
    _finish(tmp_path / "run", *ALL)
    for name in ALL:
        (tmp_path / "run" / name / "checkpoints" / "2").mkdir(parents=True)
    for weights in ((0.5,), (1.0,)):
        settle(_config({"pretrain_encoder.transitions": weights}))
        finished = {name for name in ALL if phases.has_results(epath.Path(tmp_path / "run" / name))}
        assert finished == set(ALL) - {"pretrain_encoder"} and not (tmp_path / "run" / "earlier").exists()
    settle(tiny_config())
    assert all(phases.has_results(epath.Path(tmp_path / "run" / name)) for name in ALL)


def test_a_phase_that_changed_is_set_aside_with_those_that_are_built_on_it(settle, tmp_path):
    before = settle(tiny_config())
    _finish(tmp_path / "run", *ALL)
    settle(_config({"pretrain_encoder.loop.total_steps": 9}))
    stand = {name for name in ALL if (tmp_path / "run" / name / "results.json").exists()}
    assert stand == {"pretrain_lm", "text_prompt_10"}
    aside = {path.name for path in (tmp_path / "run" / "earlier").iterdir()}
    assert aside == {f"{name}-{before[name]}" for name in ("pretrain_encoder", "user_llm")}


def test_finished_phases_of_other_runs_are_reused_by_identity(settle, tmp_path):
    first = settle(tiny_config(), "one")
    _finish(tmp_path / "one", *ALL)
    config = _config({"user_llm.loop.total_steps": 5, "reuse": f"{tmp_path / 'one'}, {tmp_path / 'run'}"})
    config.phases = (*ALL, "user_llm_lora")  # whose prompts would make another tokenizer
    (tmp_path / "run").mkdir()
    second = settle(config)
    reused = [name for name in ALL if (tmp_path / "run" / name / "results.json").exists()]
    assert reused == ["pretrain_encoder", "pretrain_lm", "text_prompt_10"]
    assert {name: second[name] for name in reused} == {name: first[name] for name in reused}
    for name in (*reused, "tokenizer"):
        record = json.loads((tmp_path / "run" / name / "identity.json").read_text())
        assert record["reused_from"] == str(tmp_path / "one" / name)


def test_a_run_to_reuse_that_is_not_there_is_named(settle):
    with pytest.raises(ValueError, match=r"^--config\.reuse names nowhere/x, and there is no such run"):
        settle(_config({"reuse": "nowhere/x"}))


def test_a_phase_that_is_needed_and_not_run_is_named_or_reused(settle, tmp_path):
    config = _config({"phases": ("pretrain_encoder", "text_prompt_10")})
    with pytest.raises(
        ValueError, match="^Parameters of pretrain_lm are needed, and it is not finished here: add pretrain_lm to"
    ):
        settle(config)
    settle(tiny_config(), "other")
    _finish(tmp_path / "other", "pretrain_lm")
    config.reuse = str(tmp_path / "other")
    settle(config)
    assert (tmp_path / "run" / "pretrain_lm" / "results.json").exists()


def test_processes_that_read_different_files_are_refused(settle, monkeypatch):
    monkeypatch.setattr(depends, "gather", lambda files: [files, {**files, "data/ratings.csv": "other"}])
    with pytest.raises(ValueError, match=r"^Process 1 reads other files than this one \(data/ratings\.csv changed\)"):
        settle(tiny_config())


def test_names_of_data_files_are_told_apart_and_do_not_hold_where_they_are(tmp_path):
    for folder in ("a/x", "a/y", "b/x", "b/y"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "part.csv").write_text(folder[2:])
    one, other = (data_hashes([tmp_path / top / "x/part.csv", tmp_path / top / "y/part.csv"], tmp_path) for top in "ab")
    assert one == other and list(one) == ["data/x/part.csv", "data/y/part.csv"]
    assert list(data_hashes([tmp_path / "a/x/part.csv"], tmp_path)) == ["data/part.csv"]


def test_files_of_a_checkpoint_are_those_that_are_read(tmp_path):
    for name in (
        "config.json",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (tmp_path / name).write_text(name)
    before = pretrained.checkpoint_hashes(tmp_path, tmp_path)
    assert sorted(before) == [
        "checkpoint/config.json", "checkpoint/model-1.safetensors", "checkpoint/model.safetensors.index.json",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    ]  # fmt: skip
    (tmp_path / "README.md").write_text("")
    assert pretrained.checkpoint_hashes(tmp_path, tmp_path) == before
