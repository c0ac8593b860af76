import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from etils import epath

from user_llm.common.checksums import MANIFEST, check_manifest, write_manifest
from user_llm.common.files import absolute, check_replaceable, local_folder, make_once, whole, whole_folder, write_json


def test_json_is_written_whole_and_by_the_first_process_alone(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "folder" / "rows.json"
    write_json(path, [1])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_json(path, [2])
    assert json.loads(path.read_text()) == [1] and [p.name for p in path.parent.iterdir()] == ["rows.json"]


def _make(folder: Path) -> None:
    """Fail if anyone else is at it."""
    folder.mkdir()
    time.sleep(0.05)
    (folder / "done").write_text("")


def test_of_many_one_makes_a_folder(tmp_path):
    """The lock is the file's, and holds between threads as between processes."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_once(tmp_path / "made", _make), range(8)))
    assert made == [tmp_path / "made"] * 8 and (tmp_path / "made" / "done").exists()


def test_what_a_kill_left_unfinished_is_made_again(tmp_path):
    def fail(folder):
        _make(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()
    make_once(tmp_path / "made", _make)
    make_once(tmp_path / "made", fail)  # it is there: nothing is made
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "made"}


def test_a_remote_workdir_has_a_local_folder_of_its_own(tmp_path):
    assert local_folder(epath.Path(tmp_path)) == tmp_path
    one, other = (local_folder(epath.Path(f"gs://bucket/{name}")) for name in ("a", "b"))
    assert one != other and one == local_folder(epath.Path("gs://bucket/a")) and one.is_absolute()


def test_a_store_has_absolute_paths_and_whole_files_by_itself(tmp_path, monkeypatch):
    path = epath.Path("gs://bucket/a")
    assert absolute(path) == path and absolute(tmp_path) == epath.Path(tmp_path)
    with whole(path) as target:
        assert target == path
    monkeypatch.chdir(tmp_path)
    assert absolute("b") == epath.Path(tmp_path) / "b"


def test_a_file_that_was_not_written_to_its_end_leaves_the_one_before(tmp_path):
    path = epath.Path(tmp_path) / "a"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), whole(path) as target:
        target.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"


@pytest.fixture
def listed(tmp_path) -> Path:
    """A folder of three files with its manifest."""
    folder = tmp_path / "params"
    for name in ("a", "d/b", "d/empty"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name.endswith("empty") else b"0123456789" * 100)
    write_manifest(folder)
    return folder


def test_a_folder_as_it_was_written_is_accepted_wherever_it_stands(listed):
    (listed / "later").write_text("not looked at")
    moved = listed.rename(listed.parent / "moved")
    check_manifest(moved)
    assert set(json.loads((moved / MANIFEST).read_text())) == {"a", "d/b", "d/empty"}


@pytest.mark.parametrize("byte", [0, 501, 999])
@pytest.mark.parametrize("name", ["a", "d/b"])
def test_one_flipped_bit_is_refused_with_the_name_of_its_file(listed, name, byte):
    content = bytearray((listed / name).read_bytes())
    content[byte] ^= 1
    (listed / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{listed}/{name} is damaged: its checksum is not that of what was written\.$"):
        check_manifest(listed)


def test_files_that_are_cut_off_or_missing_are_refused(listed):
    (listed / "a").write_bytes(b"0123456789" * 99)
    with pytest.raises(ValueError, match=rf"^{listed}/a is damaged: it has 990 bytes, and 1,000 were written\.$"):
        check_manifest(listed)
    (listed / "a").unlink()
    with pytest.raises(ValueError, match=rf"^{listed}/a is missing"):
        check_manifest(listed)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"a": 1}', '{"a": {"bytes": "x", "sha256": ""}}'])
def test_no_manifest_and_a_damaged_one_are_refused(listed, content):
    if content is None:
        (listed / MANIFEST).unlink()
    else:
        (listed / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=rf"has no {MANIFEST}|{MANIFEST} is damaged"):
        check_manifest(listed)


def test_several_callers_share_the_work(listed):
    """Of three files, each of two callers looks at its own."""
    (listed / "d/b").write_bytes(b"")
    check_manifest(listed, part=0, parts=2)
    with pytest.raises(ValueError, match="d/b"):
        check_manifest(listed, part=1, parts=2)


def test_a_whole_folder_takes_the_place_of_an_older_one_or_leaves_it(tmp_path):
    path = tmp_path / "folder"
    with whole_folder(path) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(KeyError), whole_folder(path) as folder:
        (folder / "b").write_text("half")
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["a"]

    path.rename(tmp_path / "folder.replaced")  # a kill came while the two changed places, and another one comes
    with pytest.raises(KeyError), whole_folder(path):
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["a"]

    with whole_folder(path) as folder:
        (folder / "c").write_text("2")
    assert [file.name for file in path.iterdir()] == ["c"]
    assert [left.name for left in tmp_path.iterdir()] == ["folder"]


def test_what_is_of_others_is_not_replaced(tmp_path):
    thesis = tmp_path / "docs" / "thesis"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="docs holds files, and no mark"):
        check_replaceable(thesis.parent, "mark")
    with pytest.raises(ValueError, match="thesis is a file"):
        check_replaceable(thesis, "mark")
    thesis.parent.rename(tmp_path / "model.replaced")
    with pytest.raises(ValueError, match="model.replaced holds files"):
        check_replaceable(tmp_path / "model", "mark")

    ours, empty = tmp_path / "ours", tmp_path / "empty"
    for folder, name in ((ours, "mark"), (empty, ".gitkeep")):
        folder.mkdir()
        (folder / name).touch()
        check_replaceable(folder, "mark")
    check_replaceable(tmp_path / "none" / "yet", "mark")


def test_a_whole_folder_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("v1")
    for number in "12":
        with whole_folder(tmp_path / "current") as folder:
            (folder / "mark").write_text(number)
    assert (tmp_path / "current").is_symlink() and (tmp_path / "v1" / "mark").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]
