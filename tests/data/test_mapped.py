"""Columns in files: what is written is read, by several processes at once, and what was altered is never read."""

import multiprocessing
import shutil

import numpy as np
import pytest

from user_llm.data.mapped import FACTS, Column, Keys, Seconds, Texts, filled, stored

WORDS = ["", "zoë", "漢字 and more", "x", "", "last"]
ROWS = np.array([5, 0, 2, 2, 1], np.uint32)


def pieces():
    yield {"a": np.arange(5), "b": np.arange(6, dtype=np.uint16).reshape(3, 2)}
    yield {"a": np.arange(5, 12), "empty": np.zeros(0, np.uint8)}


def expected():
    return {"a": np.arange(12), "b": np.arange(6).reshape(3, 2), "empty": np.zeros(0)}


def assert_expected(arrays):
    assert arrays.keys() == expected().keys()
    for name, array in expected().items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.fixture
def texts():
    encoded = [word.encode() for word in WORDS]
    offsets = np.cumsum([0, *map(len, encoded)])
    return Texts(offsets, np.frombuffer(b"".join(encoded), np.uint8), ROWS)


def test_arrays_are_written_once_and_mapped(tmp_path):
    assert_expected(stored(tmp_path / "columns", pieces))
    arrays = stored(tmp_path / "columns", lambda: pytest.fail("written again"))
    assert_expected(arrays)
    assert arrays["a"].dtype == np.int64 and arrays["b"].dtype == np.uint16
    assert not arrays["a"].flags.writeable and not arrays["a"].flags.owndata
    (tmp_path / "columns" / "a").write_bytes(np.arange(12)[::-1].tobytes())  # in place, so that what is mapped changes with it
    np.testing.assert_array_equal(arrays["a"], np.arange(12)[::-1])


def test_stretches_that_do_not_fit_together_are_refused(tmp_path):
    with pytest.raises(TypeError, match="stretches of a differ"):
        stored(tmp_path / "columns", lambda: iter([{"a": np.zeros(2, np.int32)}, {"a": np.zeros(2, np.int64)}]))
    assert not (tmp_path / "columns").exists()
    assert_expected(stored(tmp_path / "columns", pieces))  # what was left half done is in nobody's way


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a", "b", FACTS])
def test_every_flipped_bit_is_mended(tmp_path, name, caplog):
    stored(tmp_path / "columns", pieces)
    bits = 8 * (tmp_path / "columns" / name).stat().st_size
    for bit in np.unique(np.linspace(0, bits - 1, 40).astype(int)):
        caplog.clear()
        flip(tmp_path / "columns" / name, bit)
        assert_expected(stored(tmp_path / "columns", pieces))
        # A bit of the facts may be one of blanks, which mean nothing.
        assert name == FACTS or f"{name} is not as it was written" in caplog.text


@pytest.mark.parametrize("harm", ["cut", "longer", "missing", "no facts", "other facts"])
def test_torn_folders_are_mended(tmp_path, harm, caplog):
    folder = tmp_path / "columns"
    stored(folder, pieces)
    content = (folder / "a").read_bytes()
    if harm in ("cut", "longer"):
        (folder / "a").write_bytes(content[:-8] if harm == "cut" else content + b"12345678")
    elif harm == "missing":
        (folder / "a").unlink()
    elif harm == "no facts":
        (folder / FACTS).unlink()
    else:
        (folder / FACTS).write_text("[1]")
    assert_expected(stored(folder, pieces))
    assert "is not as it was written" in caplog.text


def test_a_folder_that_keeps_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("user_llm.data.mapped._altered", lambda folder: "a")
    with pytest.raises(ValueError, match="columns does not keep what is written to it: check the disk"):
        stored(tmp_path / "columns", pieces)


def _open(folder, log, barrier):
    def noting():
        with log.open("a") as file:
            file.write("written\n")
        yield from pieces()

    barrier.wait()
    assert_expected(stored(folder, noting))


@pytest.mark.parametrize("altered", [False, True])
def test_of_several_processes_one_writes(tmp_path, altered):
    folder, log = tmp_path / "columns", tmp_path / "log"
    if altered:
        stored(folder, pieces)
        flip(folder / "a", 77)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_open, args=(folder, log, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "written\n"
    shutil.rmtree(folder)


def test_a_column_is_an_array_in_another_order():
    values = np.arange(10, 16, dtype=np.int32)
    column = Column(values, ROWS)
    plain = values[ROWS]
    assert len(column) == 5 and column.shape == (5,) and column.dtype == np.int32
    for index in (3, -1, slice(1, 4), slice(None, None, -2), np.array([[0, 4], [2, 2]]), plain > 11, np.array([], int)):
        np.testing.assert_array_equal(column[index], plain[index])
    np.testing.assert_array_equal(column, plain)
    np.testing.assert_array_equal(np.diff(column), np.diff(plain))
    np.testing.assert_array_equal(column == 12, plain == 12)
    np.testing.assert_array_equal(column != plain, np.zeros(5, bool))
    assert column.tolist() == [*column] == plain.tolist()
    np.testing.assert_array_equal(Column(values.reshape(3, 2), np.array([2, 0]))[:], [[14, 15], [10, 11]])


def test_seconds_of_ticks_keep_fractions():
    seconds = Seconds(np.array([1_600_000_000_250, -500]), np.array([1, 0]), 1000)
    assert seconds.dtype == np.float64 and seconds.tolist() == [-0.5, 1_600_000_000.25]
    assert seconds[1] == 1_600_000_000.25


def test_texts_of_every_script(texts):
    plain = [WORDS[row] for row in ROWS]
    assert texts.tolist() == plain and texts[1] == "" and texts[2] == "漢字 and more"
    assert texts[np.array([[4, 0]])].tolist() == [["zoë", "last"]]
    assert texts.dtype.kind == texts[:2].dtype.kind == "T" and texts.shape == (5,)
    for column in (texts, texts[:]):  # mapped, and an array
        assert filled(column, slice(None)).tolist() == [True, False, True, True, True]
        assert filled(column, np.array([1, 4])).tolist() == [False, True]
    assert texts[:0].tolist() == []


def test_keys_are_a_sequence_of_strings(texts):
    keys = Keys(texts)
    plain = [WORDS[row] for row in ROWS]
    assert keys == plain and plain == keys and keys == Keys(texts) and list(keys) == plain
    assert keys != plain[:-1] and keys != plain[::-1] and keys != "last"
    assert keys[0] == keys[np.int64(0)] == "last" and keys[-1] == "zoë" and keys[1:3] == plain[1:3]
    assert "zoë" in keys and keys.index("漢字 and more") == 2
    with pytest.raises(IndexError):
        keys[5]
