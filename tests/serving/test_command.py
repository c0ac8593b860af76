"""The commands that encode, or recommend to, all users of files."""

import importlib
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from absl import flags
from absl.testing import flagsaver

from user_llm.serving.tables import Encode, Recommend


@pytest.fixture
def events(make_model, tmp_path):
    """A file of all users' events."""
    path, known = tmp_path / "events.jsonl", make_model("cross")
    path.write_text("".join(json.dumps(row) + "\n" for user in range(5) for row in known.rows(user)))
    return path


NAMES = ("model", "events", "out", "llm", "items", "share", "bad_rows")


@pytest.fixture
def command():
    """The module, with its flags in place of those that another command has defined in this process."""
    others = {name: flags.FLAGS[name] for name in NAMES if name in flags.FLAGS}
    for name in others:
        delattr(flags.FLAGS, name)
    yield importlib.import_module("user_llm.serving.command")
    del sys.modules["user_llm.serving.command"]
    for name in NAMES:
        delattr(flags.FLAGS, name)
    for name, flag in others.items():
        flags.FLAGS[name] = flag


def run(command, monkeypatch, make, *args, **settings):
    """Run a command in this process."""
    monkeypatch.setattr(command.app, "run", lambda main: main(["command", *args]))
    monkeypatch.setattr(command.flags, "mark_flags_as_required", lambda names: None)
    monkeypatch.setattr(command, "set_up_log", lambda: None)
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        for name, value in settings.items():
            setattr(flags.FLAGS, name, str(value))
        command.run(make)


def test_a_command_writes_all_users_and_says_how_many(command, make_model, events, tmp_path, monkeypatch, capsys):
    directory = make_model("cross").directory
    run(command, monkeypatch, lambda model: Recommend(model, 2), model=directory, events=events, out=tmp_path / "out")
    assert capsys.readouterr().out == f"5 users: {tmp_path / 'out'}\n"
    assert sum(pq.read_metadata(file).num_rows for file in (tmp_path / "out").glob("*.parquet")) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such"}, "Error: There is no model at /no/such: name a model directory"),
        ({"events": "/no/such.csv"}, "Error: .*/no/such.csv"),
        ({"share": "3/2"}, "Error: --share=3/2: name it as INDEX/COUNT"),
    ],
)
def test_a_mistake_of_the_caller_is_one_sentence(command, make_model, events, tmp_path, monkeypatch, changes, message):
    settings = {"model": make_model("cross").directory, "events": events, "out": tmp_path / "out"} | changes
    with pytest.raises(SystemExit, match=message) as error:
        run(command, monkeypatch, Encode, **settings)
    assert "\n" not in str(error.value)
    with pytest.raises(command.app.UsageError, match="Unknown arguments: more"):
        run(command, monkeypatch, Encode, "more", **settings)


@pytest.mark.slow
def test_commands(make_model, events, tmp_path):
    for name, more in (("encode", []), ("recommend", ["--k=3"])):
        args = [f"--model={make_model('cross').directory}", f"--events={events}", f"--out={tmp_path / name}", *more]
        done = subprocess.run([sys.executable, "-m", f"user_llm.{name}", *args], capture_output=True, text=True, check=True)
        assert f"5 users: {tmp_path / name}" in done.stdout
    assert pq.read_table(tmp_path / "recommend").num_rows == 15
    done = subprocess.run(
        [sys.executable, "-m", "user_llm.encode", "--model=/no/such", f"--events={events}", "--out=x"], capture_output=True, text=True
    )  # fmt: skip
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and done.stderr.splitlines()[-1].startswith("Error: There is no model at ")
    )
