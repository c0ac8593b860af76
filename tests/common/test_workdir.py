import multiprocessing
import os
import shutil

import pytest
from etils import epath

from user_llm.common.workdir import LOCK, hold, path_part, standing


@pytest.mark.parametrize(
    "name", ["events", "Movies_and_TV", "ml-20m", "Kaffeehäuser", "my events", "a.b", ".hidden", "x" * 200, "日本"]
)
def test_names_that_stay_in_their_folder(name, tmp_path):
    (tmp_path / path_part(name, "data.name")).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (".", "means another folder"),
        ("..", "means another folder"),
        ("../../x", "has a slash"),
        ("/etc/passwd", "has a slash"),
        ("a/b", "has a slash"),
        ("..\\x", "has a slash or a backslash"),
        ("a\0b", "cannot be printed"),
        ("a\nb", "cannot be printed"),
        ("\x1b[31m", "cannot be printed"),
        ("a\u202eb", "cannot be printed"),
        ("\ud800", "cannot be printed"),
        (" a", "begins or ends with a space"),
        ("x" * 201, "is longer than 200 bytes"),
        ("ä" * 101, "is longer than 200 bytes"),
    ],
)
def test_names_that_do_not_are_refused_in_one_printable_sentence(name, fault):
    with pytest.raises(ValueError, match=rf"^data\.name .* {fault}") as refused:
        path_part(name, "data.name")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 200


def _hold(path, result):
    try:
        with hold(epath.Path(path)):
            result.send("held")
            result.recv()
    except ValueError as error:
        result.send(str(error))


def _start(path):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(path), theirs))
    process.start()
    return process, ours


def test_a_workdir_is_held_against_a_second_run_and_free_once_the_first_is_dead(tmp_path):
    """In whatever way it dies."""
    workdir = tmp_path / "runs" / "one"
    first, channel = _start(workdir)
    assert channel.recv() == "held"
    with (
        pytest.raises(ValueError, match=rf"^{workdir} is in use by another run \(process {first.pid} on .*\): wait for it"),
        hold(epath.Path(workdir)),
    ):
        pass
    first.kill()
    first.join()
    for _ in range(2):
        with hold(epath.Path(workdir)):
            assert (workdir / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=rf"^Cannot write the run to --workdir={tmp_path}/file/run: Not a directory\.$"),
        hold(epath.Path(tmp_path / "file" / "run")),
    ):
        pass


@pytest.mark.parametrize("leave", [shutil.rmtree, lambda path: path.rename(path.parent / "b")], ids=["removed", "moved"])
def test_a_workdir_that_is_gone_is_said_to_be_whatever_fails_for_it(tmp_path, leave):
    workdir = tmp_path / "a"
    for failure in (None, OSError("No such file"), RuntimeError("of a library")):
        with (
            pytest.raises(FileNotFoundError, match=rf"^{workdir} was removed or moved while the run was writing to it"),
            hold(epath.Path(workdir)),
        ):
            leave(workdir)
            if failure:
                raise failure
        shutil.rmtree(tmp_path / "b", ignore_errors=True)


def test_other_failures_are_left_as_they_are_while_the_folder_stands(tmp_path):
    with pytest.raises(ZeroDivisionError), standing(epath.Path(tmp_path)) as check:
        check()
        1 / 0  # noqa: B018


def test_a_folder_that_another_has_taken_the_place_of_is_gone(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="was removed"), standing(epath.Path(folder)) as check:
        folder.rmdir()
        folder.mkdir()
        check()


def test_a_store_is_not_locked():
    with hold(epath.Path("gs://bucket/run")):
        pass
