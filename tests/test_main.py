"""The whole command, shrunk: from a synthetic world to the report; killed and started again; bad input refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import flagsaver
from etils import epath

from user_llm import experiment, main
from user_llm.common import trees
from user_llm.config.check import check as check_config
from user_llm.config.llms import LLMS

sys.path.insert(0, str(Path(__file__).parent))

from processes import finish, start
from served import check_served
from tiny_quickstart import PHASES, TINY, environment, one_device, tiny_config

ROOT = Path(__file__).parent.parent


def _tiny():
    """Return the quick start's config, shrunk; with two streams, so that two processes read what one reads."""
    config = tiny_config()
    config.data.streams = 2
    return config


def _command(workdir: Path) -> list[str]:
    """Return the whole command, shrunk."""
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    command = ["-m", "user_llm.main", "--config=configs/quickstart.py", f"--workdir={workdir}", "--config.data.streams=2"]
    return [*command, f"--config.phases={PHASES!r}", *flags]


def _rows(workdir: Path) -> list[dict]:
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    finish(start(_command(workdir), devices=1))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["user_llm", "text_prompt_10"])
def test_the_model_alone_answers_every_test_user_as_the_evaluation_did(finished, tmp_path, phase):
    check_served(finished, _tiny(), tmp_path, phase)


@pytest.mark.slow
def test_the_pretrained_encoder_stays_as_it_is_and_the_rest_trains(finished):
    with ocp.StandardCheckpointer() as checkpointer:
        read = lambda phase: trees.flatten(checkpointer.restore(finished / phase / "params"))  # noqa: E731
        own, pretrained = read("user_llm"), read("pretrain_encoder")
    encoder = {path.removeprefix("encoder/"): a for path, a in own.items() if path.startswith("encoder/")}
    assert encoder and all(np.array_equal(a, pretrained[path]) for path, a in encoder.items())
    assert np.abs(own["item_head"]).max() > 0  # which starts at zero


@pytest.mark.slow
def test_leaves_all_that_the_readme_promises(finished):
    rows = _rows(finished)
    methods = {row["method"] for row in rows}
    assert methods == {
        "popularity",
        "popularity_7d",
        "transitions",
        "encoder",
        "user_llm",
        "user_llm+transitions",
        "user_llm/generate",
        "text_prompt_10",
    }
    for row in rows:
        assert row["dataset"] == "synthetic" and row["task"] == "next_item" and row["split"] == "leave_last_out"
        assert 0 <= row["value"] <= 1 and row["n"] == (10 if row["method"].endswith("generate") else 60)
    metrics = {row["metric"] for row in rows if row["method"] == "user_llm"}
    plain = {"recall@1", "recall@5", "recall@10", "ndcg@10", "mrr"}
    assert metrics == plain | {f"{name}/{kind}" for name in plain for kind in ("unseen", "random_user", "no_user")}
    seen = {row["method"]: row.get("targets_seen", 0) for row in rows}
    assert seen["user_llm"] == seen["user_llm/generate"] >= seen["encoder"] > seen["popularity"] == 0
    report = (finished / "report.md").read_text()
    assert "## Is the user used?" in report and "text_prompt_10" in report and "quickstart" not in report.split("## Runs")[0]
    for phase in PHASES:
        assert (finished / phase / "metrics.jsonl").exists() and list((finished / phase / "tensorboard").iterdir())
    assert {path.parent.name for path in finished.glob("*/values")} == {"baselines", *PHASES} - {"pretrain_lm"}
    for phase in ("user_llm", "text_prompt_10"):
        samples = json.loads((finished / phase / "samples.json").read_text())
        assert [(sample["user"], len(sample["attended"])) for sample in samples] == [
            (u, 5 * (phase == "user_llm")) for u in range(3)
        ]
        for sample in samples:
            assert sample["wanted"] and sample["answer"].count("; ") == 4 and len(sample["history"]) == 5
            weights = [weight for _, _, weight in sample["attended"]]
            assert weights == sorted(weights, reverse=True) and sum(weights) <= 1
    assert "### synthetic: next_item, user 0" in report
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["user_llm"]["resampler"]["num_latents"] == 16 and config["versions"]["jax"]


@pytest.mark.slow
def test_finished_phases_are_not_run_again(finished):
    stamps = {path: path.stat().st_mtime_ns for path in finished.glob("*/params/**/*")}
    before = (finished / "results.json").read_text()
    with one_device():
        main.run(_tiny(), epath.Path(finished))
    assert (finished / "results.json").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/params/**/*")} == stamps


@pytest.mark.slow
def test_other_settings_of_the_test_measure_again_and_train_nothing(finished, tmp_path):
    """Back to the first settings, everything is as it was."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    config, first = _tiny(), _rows(finished)
    config.user_llm.eval.generate_users, config.user_llm.eval.samples = 3, 1
    for asked, written in ((config, 3), (_tiny(), _tiny().user_llm.eval.generate_users)):
        with one_device():
            rows = main.run(asked, epath.Path(workdir))
        assert {row["n"] for row in rows if row["method"] == "user_llm/generate"} == {written}
        kept = [row for row in rows if "generate" not in row["method"]]
        same = [row for row in first if "generate" not in row["method"]]
        assert [(row["method"], row["metric"], row["value"]) for row in kept] == [
            (row["method"], row["metric"], row["value"]) for row in same
        ]
        for phase in ("pretrain_encoder", "user_llm"):
            assert (workdir / phase / "metrics.jsonl").read_text() == (finished / phase / "metrics.jsonl").read_text()
    assert _rows(workdir) == first and not (workdir / "earlier").exists()


@pytest.mark.slow
def test_another_config_in_the_same_workdir_is_refused(finished):
    config = _tiny()
    config.seed = 1
    with pytest.raises(ValueError, match="another config"):
        main.run(config, epath.Path(finished))


def test_which_phases_run_is_no_part_of_a_config_and_those_that_it_lacks_are_refused(tmp_path, monkeypatch):
    config = tiny_config()
    config_hash = experiment.hash_config(check_config(config))
    config.phases, config.reuse = (*config.phases, "text_prompt_50", "user_llm_lora"), "runs/other"
    monkeypatch.setenv("PATH", "")  # a container without git
    experiment.save_config(check_config(config), epath.Path(tmp_path), ["python", "x"])
    facts = json.loads((tmp_path / "config.json").read_text())
    assert experiment.hash_config(check_config(config)) == facts["config_hash"] == config_hash
    assert facts["command"] == ["python", "x"] and facts["git"] == ""
    assert facts["config"]["phases"][-1] == "user_llm_lora" and facts["config"]["user_llm_lora"]["strategy"] == "lora"
    config.seed = 1
    assert experiment.hash_config(check_config(config)) != config_hash
    config.phases = (*config.phases, "pretrain_bert")
    with pytest.raises(ValueError, match=r"^phases=.*there is no phase pretrain_bert; choose from bert4rec, dual_encoder, "):
        main.run(config, epath.Path(tmp_path))


def test_a_config_is_a_file_or_the_name_of_one_that_comes_along(tmp_path, monkeypatch):
    comes_along = Path(main.__file__).parent / "configs"
    assert main.config_file("quickstart") == f"{comes_along}/quickstart.py"
    assert main.config_file("amazon_xattn:small") == f"{comes_along}/amazon_xattn.py:small"
    for path in ("configs/quickstart.py", "configs/amazon_xattn.py:small", "elsewhere/x", "x.py"):
        assert main.config_file(path) == path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # such as a run
    assert main.config_file("quickstart") == f"{comes_along}/quickstart.py"
    (tmp_path / "amazon_xattn").write_text("")  # a file of that name is meant
    assert main.config_file("amazon_xattn") == "amazon_xattn"
    with pytest.raises(
        SystemExit, match=r"^Error: --config=quikstart:x is neither .* \(did you mean quickstart\?\): choose a path, or"
    ):
        main.config_file("quikstart:x")


@pytest.mark.parametrize(
    "form", [["--config=events_xattn:small"], ["--config", "events_xattn:small"], ["-config=events_xattn:small"]]
)
def test_a_name_stands_in_any_form_of_the_flag(form):
    found = main.with_config_file(["main", "--workdir=quickstart", *form, "--config.data.dir=quickstart"])
    assert found[1] == "--workdir=quickstart" and found[-1] == "--config.data.dir=quickstart"
    assert found[2:-1][-1].endswith("configs/events_xattn.py:small") and len(found) == 3 + len(form)
    assert main.with_config_file(["main", "--config"]) == ["main", "--config"]


@pytest.mark.slow
def test_an_installed_wheel_has_its_configs_by_name_and_no_package_besides(tmp_path):
    pip = [sys.executable, "-m", "pip", "-q"]
    shutil.copytree(
        ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "tests", "*.egg-info")
    )
    built = subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(tmp_path / "source")], check=False)
    if built.returncode:
        pytest.skip("the tools that build a wheel cannot be had here")
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", f"--target={tmp_path / 'site'}", str(wheel)], check=True)
    assert {path.name for path in (tmp_path / "site").iterdir() if path.suffix != ".dist-info"} == {"user_llm"}
    command = [sys.executable, "-m", "user_llm.main", "--config=quickstart", "--config.seed=-1"]
    there = {**environment(), "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1] == "Error: seed=-1: it must be 0 or more."


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (
            KeyError('\'widht\'\nDid you mean "width" instead of "widht"?'),
            '\'widht\'. Did you mean "width" instead of "widht"?',
        ),
        (
            KeyError("Attribute <class 'int'>.x does not exist. Attempting to lookup: encoder.block.width.x"),
            "encoder.block.width.x.",
        ),
        (IndexError("0 is not a valid index for <class 'tuple'> (in: phases[0])"), "phases[0]."),
        (AttributeError(KeyError("'objective'")), "'objective'"),
    ],
)
def test_a_key_that_ml_collections_does_not_find_is_named(error, key):
    assert main.missing_key(error) == key


def test_no_data_says_how_to_get_some(tmp_path):
    config = tiny_config()
    config.data.source = "movielens"
    with pytest.raises(ValueError, match=r"--config\.data\.dir"):
        main.run(config, epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("--config.datax.dir=1", 'the config has no key \'datax\'. Did you mean "data" instead of "datax"?'),
        (
            "--config=configs/movielens_xattn.py:huge",
            f"Unknown variant 'huge': choose full, gpu, cpu, small, synthetic or an open LLM: {', '.join(LLMS)}.",
        ),
        ("--config.llm.block.widht=8", 'the config has no key \'widht\'. Did you mean "width" instead of "widht"?'),
        ("--config.seed=abc", "flag --config.seed=abc: invalid literal for int() with base 10: 'abc'"),
        ("--nonsense=1", "Unknown command line flag 'nonsense'"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_sentence(mistake, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=configs/quickstart.py", mistake])  # ml_collections looks there, too
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        main.parse_flags(sys.argv)
    assert ended.value.code == f"Error: {sentence}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config.seed=abc", "flag --config.seed=abc: invalid literal for int() with base 10: 'abc'"),
        ("--workdir=/proc/run", "Cannot write the run to --workdir=/proc/run: No such file or directory."),
    ],
)
def test_a_command_that_fails_prints_its_sentence_alone(flag, sentence):
    command = [sys.executable, "-m", "user_llm.main", "--config=configs/quickstart.py", flag]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip() == f"Error: {sentence}"


@pytest.mark.slow
def test_killed_in_two_phases_gives_the_same_results(finished, tmp_path):
    command = _command(tmp_path / "run")
    for phase, evaluations in (("pretrain_encoder", 2), ("user_llm", 2)):
        [process] = start(command, devices=1)
        metrics = tmp_path / "run" / phase / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"eval"') >= evaluations):
            time.sleep(0.05)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(command, devices=1))
    expected, found = (
        [{k: v for k, v in row.items() if k != "config_hash"} for row in _rows(run)] for run in (finished, tmp_path / "run")
    )
    assert found == expected


@pytest.mark.slow
def test_two_processes_have_the_rows_of_one(finished, tmp_path):
    """Training, evaluation with a remainder, titles by beam search, samples and report, on two times two devices and on one."""
    workdir = tmp_path / "two"
    finish(start(_command(workdir), count=2, devices=4))
    one, two = (
        {tuple(row[k] for k in ("task", "method", "metric")): row["value"] for row in _rows(run)} for run in (finished, workdir)
    )
    assert len(one) > 20 and two == pytest.approx(one, abs=1e-6)
    for name in ("report.md", "config.json", "audit.json", "user_llm/metrics.jsonl", "user_llm/samples.json"):
        assert (workdir / name).exists(), name


@pytest.mark.slow
def test_a_table_is_reproduced_by_one_command_and_not_run_again(tmp_path):
    """All methods read 16 events, so that they share their programs."""
    tiny = TINY | {"user_llm.prompts.next_item.max_tokens": 24, "user_llm.eval.generate_users": 0}
    tiny |= {f"variants.user_llm_{events}_events.changes.examples.max_events": 16 for events in (50, 100)}
    flags = [f"--config.{key}={value}" for key, value in tiny.items() if not key.startswith("text_prompt")]
    command = ["launch/reproduce.sh", "lengths", "synthetic", *flags]
    settings = environment() | {"SEEDS": "1", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        report = (tmp_path / "out" / "report" / "report.md").read_text()
        compared = report.split("compared")[1]
        for method in ("user_llm_alone", "user_llm_50_events", "user_llm_100_events", "encoder", "popularity"):
            assert re.search(rf"\| {method} \| .* \| 60 \| 1 \|", compared)
    assert "user_llm_100_events: finished earlier" in done.stderr
    unknown = subprocess.run(["launch/reproduce.sh", "nothing"], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert unknown.returncode and unknown.stderr.startswith("Unknown table 'nothing': choose cost, ")
