"""Preparing is killed (SIGKILL) at several moments in a process of its own, and started again."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from user_llm.data import amazon, prepare, synthetic_files

ROOT = Path(__file__).parents[2]
# Small pieces make many records and files of this little world.
CHILD = """
import os, signal, sys, threading, time
import tensorflow_datasets as tfds
from user_llm.data import amazon, json_lines, numbering, prepare, raw, synthetic_files

folder, prepared, moment = sys.argv[1:]
prepare.ROWS, prepare.SHARD, raw.ROWS, json_lines.ROWS = 300, 3, 300, 300
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def after(count, batches):
    for number, batch in enumerate(batches):
        if number == count:
            die()
        yield batch

def dying(function, count=0):
    return lambda *args: after(count, function(*args))

class Killed:
    # Wraps the database: the process dies while the last query is being sorted.
    def __init__(self, table):
        self.table = table
    def sql(self, query):
        if "ORDER BY users.number" in query:
            threading.Timer(0.001, die).start()
            while True:
                self.table.sql(query).to_arrow_table()
        return self.table.sql(query)

if moment == "reading":
    numbering._numbered = dying(numbering._numbered, 3)
elif moment == "numbering":
    prepare._facts = lambda *args: die()
elif moment == "sorting":
    generate = prepare.Events._generate_examples
    prepare.Events._generate_examples = lambda self, table, scratch: generate(self, Killed(table), scratch)
elif moment == "writing the first file":
    prepare.Events._generate_examples = dying(prepare.Events._generate_examples, 2)
elif moment == "writing the third file":
    prepare.Events._generate_examples = dying(prepare.Events._generate_examples, 8)
elif moment == "writing what the dataset is":
    tfds.core.DatasetInfo.write_to_directory = lambda *args, **options: die()
else:
    record = prepare.Events._generate_examples
    prepare.Events._generate_examples = lambda *args: (print("prepares", file=sys.stderr), record(*args))[1]
print(len(prepare.load(amazon.find(folder, synthetic_files.NAME), prepared).item))
"""
MOMENTS = ["reading", "numbering", "sorting", "writing the first file", "writing the third file", "writing what the dataset is"]


def start(*args):
    command = [sys.executable, "-c", CHILD, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with reviews, and their timelines prepared without disturbance."""
    folder = tmp_path_factory.mktemp("world")
    synthetic_files.write(folder / "raw", layout="amazon", num_users=150, num_items=90, events_per_user=30, seed=0)
    return folder / "raw", prepare.load(amazon.find(folder / "raw", synthetic_files.NAME), folder / "prepared")


def left(prepared):
    return [*prepared.rglob(f"{prepare.SCRATCH}*"), *prepared.rglob("incomplete.*")]


def assert_same(timelines, other):
    assert timelines.user_keys == other.user_keys and timelines.catalogue.titles == other.catalogue.titles
    assert timelines.facts == other.facts and timelines.schema == other.schema
    for name in ("offsets", "item"):
        np.testing.assert_array_equal(getattr(timelines, name), getattr(other, name))
    assert set(timelines.columns) == set(other.columns)
    for name in timelines.columns:
        np.testing.assert_array_equal(timelines.columns[name], other.columns[name])


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(world, tmp_path, caplog, moment):
    folder, undisturbed = world
    killed = start(folder, tmp_path, moment)
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == -9, errors
    assert left(tmp_path)
    assert not [path for path in tmp_path.rglob("dataset_info.json") if "incomplete." not in str(path)]
    timelines = prepare.load(amazon.find(folder, synthetic_files.NAME), tmp_path)
    assert_same(timelines, undisturbed)
    assert not left(tmp_path)
    assert "left by a preparation that was killed" in caplog.text


@pytest.mark.slow
def test_of_two_at_once_one_prepares_and_the_other_waits(world, tmp_path):
    folder, undisturbed = world
    both = [start(folder, tmp_path, "never") for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [out.split()[-1] for out, _ in outputs] == 2 * [str(len(undisturbed.item))], outputs
    assert sum(errors.count("prepares") for _, errors in outputs) == 1
    assert len(list(tmp_path.rglob("*.array_record*"))) > 3
    assert_same(prepare.load(amazon.find(folder, synthetic_files.NAME), tmp_path), undisturbed)
