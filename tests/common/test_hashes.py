import hashlib
import json
import os

import pytest

from user_llm.common import hashes
from user_llm.common.hashes import REMEMBERED, content_hashes


@pytest.fixture
def read(monkeypatch):
    """The names of the files whose content was read; nothing is remembered yet in this process."""
    names = []
    real = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: (names.append(os.path.basename(path)), real(path))[1])
    monkeypatch.setattr(hashes, "_known", {})
    return names


@pytest.fixture
def settled(monkeypatch):
    """Every file counts as old enough to be remembered."""
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)


def _sha(content):
    return hashlib.sha256(content).hexdigest()


def test_an_untouched_file_is_read_once_by_all_processes(tmp_path, read, settled, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    assert content_hashes([path], tmp_path) == content_hashes([path], tmp_path) == [_sha(b"1")]
    monkeypatch.setattr(hashes, "_known", {})  # as in a later process
    assert content_hashes([path], tmp_path) == [_sha(b"1")]
    assert read == ["a"]


def test_a_file_that_was_touched_is_read_again_though_size_and_time_were_set_back(tmp_path, read, settled):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    before = path.stat()
    content_hashes([path], tmp_path)
    path.write_bytes(b"2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == 1
    assert content_hashes([path], tmp_path) == [_sha(b"2")]
    (tmp_path / "b").write_bytes(b"3")
    os.replace(tmp_path / "b", path)
    assert content_hashes([path], tmp_path) == [_sha(b"3")]


def test_a_file_that_was_just_written_is_not_trusted_to_stay(tmp_path, read):
    """A quick edit may leave all times as they are."""
    path = tmp_path / "a"
    path.write_bytes(b"1")
    for _ in range(2):
        content_hashes([path], tmp_path)
    assert read == ["a", "a"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": [1, 2]}'])
def test_a_damaged_memory_is_forgotten(tmp_path, read, settled, content):
    (tmp_path / REMEMBERED).write_text(content)
    path = tmp_path / "a"
    path.write_bytes(b"1")
    assert content_hashes([path], tmp_path) == [_sha(b"1")]
    assert str(path) in json.loads((tmp_path / REMEMBERED).read_text())
