"""A run knows its inputs: changed data, shared phases, damaged files and a second run, by the whole command on an encoder alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from user_llm import main
from user_llm.common.workdir import hold
from user_llm.report.build import write_report

sys.path.insert(0, str(Path(__file__).parent))

from tiny_quickstart import TINY, environment
from untrained import untrained, untrained_config, write_world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained():
    """The names of the phases that were trained since it was cleared."""
    with untrained() as names:
        yield names


@pytest.fixture(scope="module")
def original(tmp_path_factory, trained):
    """Return the folder of the data and the workdir of a finished run."""
    folder = tmp_path_factory.mktemp("original")
    write_world(folder / "data")
    main.run(untrained_config(folder / "data"), epath.Path(folder / "run"))
    assert trained == ["pretrain_encoder"]
    return folder


@pytest.fixture
def finished(original, tmp_path, trained):
    """Return copies of both."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    trained.clear()
    return tmp_path / "data", tmp_path / "run"


def _edit(data):
    lines = (data / "ratings.csv").read_text().splitlines()
    user, item, rating, time = lines[1].split(",")
    lines[1] = ",".join([user, item, "1.0" if rating != "1.0" else "2.0", time])
    (data / "ratings.csv").write_text("\n".join(lines) + "\n")


def _flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 8
    path.write_bytes(content)


def test_results_of_old_data_do_not_stand_beside_baselines_of_new(finished, trained):
    data, workdir = finished
    before = (workdir / "results.json").read_text()
    _edit(data)
    with pytest.raises(
        ValueError, match=r"^pretrain_encoder in .*/run saw other data \(data/ratings\.csv changed\): choose another "
    ):
        main.run(untrained_config(data), epath.Path(workdir))
    assert (workdir / "results.json").read_text() == before and not trained
    rows = main.run(untrained_config(data, **{"data.accept_changes": True}), epath.Path(workdir))
    assert not trained and {row["method"] for row in rows} == {"popularity", "popularity_7d", "transitions", "encoder"}
    hashes = {row["method"]: row["config_hash"] for row in rows}
    assert hashes["encoder"] in before and hashes["popularity"] not in before
    (tmp := workdir.parent / "other").mkdir()
    main.run(untrained_config(data), epath.Path(tmp))
    assert trained == ["pretrain_encoder"]


def test_data_that_moved_are_the_same_data(finished, trained):
    data, workdir = finished
    shutil.copytree(data, data.parent / "elsewhere" / "data")
    shutil.rmtree(data)
    rows = main.run(untrained_config(data.parent / "elsewhere" / "data"), epath.Path(workdir))
    assert not trained and rows == json.loads((workdir / "results.json").read_text())


def test_a_phase_is_reused_where_another_ones_settings_changed(finished, trained):
    data, workdir = finished
    config = untrained_config(data)
    config.phases = ("pretrain_encoder", "bert4rec")
    main.run(config, epath.Path(workdir))
    config.variants.bert4rec.changes.loop = {"total_steps": 4}
    rows = main.run(config, epath.Path(workdir))
    assert trained == ["bert4rec", "bert4rec"]
    assert {row["method"] for row in rows} == {"popularity", "popularity_7d", "transitions", "encoder", "bert4rec"}
    assert len({row["config_hash"] for row in rows}) == 3
    config.variants.bert4rec.changes.loop = {}
    main.run(config, epath.Path(workdir))  # what was set aside comes back
    assert trained == ["bert4rec", "bert4rec"]


def test_finished_phases_of_another_run_are_found_and_recorded(finished, trained, caplog):
    data, workdir = finished
    new = workdir.parent / "new"
    with caplog.at_level("INFO", logger="absl"):
        rows = main.run(untrained_config(data, reuse=f"{workdir}"), epath.Path(new))
    assert not trained and f"pretrain_encoder: reused from {workdir}/pretrain_encoder" in caplog.text
    assert rows == json.loads((workdir / "results.json").read_text())
    assert json.loads((new / "pretrain_encoder" / "identity.json").read_text())["reused_from"] == f"{workdir}/pretrain_encoder"
    shutil.rmtree(workdir)
    main.run(untrained_config(data), epath.Path(new))  # it stands by itself
    assert not trained
    report = write_report(new).read_text()
    assert "encoder" in report and "popularity" in report


def test_one_flipped_bit_of_parameters_or_prepared_records_is_refused_by_the_name_of_the_file(finished, trained):
    data, workdir = finished
    files = [path for path in (workdir / "pretrain_encoder" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)  # all of them: common/test_checkpoint.py
    for path in (largest, next((workdir / "data").rglob("*.array_record*"))):
        whole = path.read_bytes()
        _flip(path)
        with pytest.raises(ValueError, match=rf"^{path} is damaged: its checksum is not that of what was written\. Delete "):
            main.run(untrained_config(data), epath.Path(workdir))
        path.write_bytes(whole)
    assert not trained


def test_deleted_parameters_are_named(finished, trained):
    data, workdir = finished
    shutil.rmtree(workdir / "pretrain_encoder" / "params")
    with pytest.raises(FileNotFoundError, match=rf"^No parameters at {workdir}/pretrain_encoder/params: they were deleted"):
        main.run(untrained_config(data), epath.Path(workdir))


def test_a_second_run_in_a_workdir_is_refused(finished, trained):
    data, workdir = finished
    with (
        hold(epath.Path(workdir)),
        pytest.raises(ValueError, match=rf"^{workdir} is in use by another run \(process {os.getpid()} on"),
    ):
        main.run(untrained_config(data), epath.Path(workdir))


@pytest.mark.parametrize(("source", "key"), [("amazon", "category"), ("google_local", "states"), ("events", "name")])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a\0b", "", "x" * 300, "a\x1bb"])
def test_names_from_configs_cannot_leave_the_workdir(tmp_path, source, key, name):
    config = untrained_config(tmp_path)
    config.data.source = source
    config.data[key] = (name,) if key == "states" else name
    with pytest.raises(ValueError, match=rf"^data\.{key}(\[0\])?[ =]") as refused:
        main.run(config, epath.Path(tmp_path / "run"))
    assert str(refused.value).isprintable()


def _start(workdir, *flags):
    settings = [f"--config.{key}={value}" for key, value in TINY.items()]
    command = [sys.executable, "-m", "user_llm.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *settings]
    command += ["--config.phases=('pretrain_encoder',)", "--config.pretrain_encoder.loop.total_steps=100000", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_command_refuses_a_second_run_and_ends_in_one_line_on_sigint(tmp_path):
    workdir = tmp_path / "run"
    first = _start(workdir, "--config.pretrain_encoder.loop.eval_steps=50000", "--config.pretrain_encoder.loop.save_steps=1000")
    metrics = workdir / "pretrain_encoder" / "metrics.jsonl"

    def wait(process, steps):
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train"') >= steps):
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()

    wait(first, 1)
    second = _start(workdir, "--config.data.accept_changes")
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 1 and errors.strip().endswith(
        f"process {first.pid} on {os.uname().nodename}): wait for it, or choose another --workdir."
    )
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130 and "Traceback" not in errors
    assert "pretrain_encoder: SIGINT, saved at step" in errors.splitlines()[-1]
