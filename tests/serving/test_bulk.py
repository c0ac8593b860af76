"""All users of event files: the same as one by one, whatever parts they fall into, killed and started again, or shared out."""

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import killed

import user_llm
from user_llm.data.vocabulary import Vocabulary
from user_llm.serving import bulk
from user_llm.serving.tables import Encode, Recommend
from user_llm.serving.user import User


@pytest.fixture
def known(make_model):
    return make_model("cross")


@pytest.fixture
def events(known, tmp_path):
    """A file of all users' events, shuffled, one item unknown."""
    rows = [row for user in range(5) for row in known.rows(user)]
    rows.append({**rows[0], "item": "no such", "timestamp": 10**9})
    order = np.random.default_rng(0).permutation(len(rows))
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(rows[n]) + "\n" for n in order))
    return path


def read(folder) -> list[dict]:
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["user"], row.get("rank", 0)))


def expected(known) -> tuple[list[dict], dict[str, User]]:
    model = user_llm.load(known.directory)
    users = {known.timelines.user_keys[user]: model.encode(known.rows(user)) for user in range(5)}
    rows = [
        {"user": key, "rank": rank, "item": item.id, "title": item.title, "score": item.score}
        for key, user in sorted(users.items())
        for rank, item in enumerate(model.recommend(user, 3), 1)
    ]
    return rows, users


def same(found: list[dict], wanted: list[dict]) -> None:
    scores = [[row.pop("score") for row in rows] for rows in (found, wanted)]
    assert found == wanted
    np.testing.assert_allclose(*scores, atol=1e-5)


# Bytes of a part, and events of a piece: all users in one part, in several parts, in the pieces of one part, in those of several.
@pytest.mark.parametrize(("size", "piece"), [(10**9, 10**9), (200, 10**9), (10**9, 4), (200, 1)])
def test_all_users_of_a_file_are_those_one_by_one(known, events, tmp_path, monkeypatch, size, piece):
    gathered = []

    def gather(vocabulary, table, real=Vocabulary.gather):
        gathered.append(len(table))
        return real(vocabulary, table)

    monkeypatch.setattr(Vocabulary, "gather", gather)
    monkeypatch.setattr(bulk, "BYTES", size)
    monkeypatch.setattr(bulk, "EVENTS", piece)
    monkeypatch.setattr(bulk, "USERS", 2)
    rows, users = expected(known)
    model = user_llm.load(known.directory)
    gathered.clear()
    assert bulk.run(Recommend(model, 3), str(events), tmp_path / "ranked") == 5
    same(read(tmp_path / "ranked"), rows)
    parts = len(list((tmp_path / "ranked").glob("*.parquet")))
    assert (parts > 1) == (size == 200) and (len(gathered) > parts) == (piece < 10**9)
    assert bulk.run(Encode(model), str(events), tmp_path / "states") == 5
    for row in read(tmp_path / "states"):
        user = User.from_bytes(row["state"])
        assert (row["events"], row["last_time"]) == (users[row["user"]].count, users[row["user"]].last_time)
        np.testing.assert_array_equal(user.events, users[row["user"]].events)
        assert row["unknown"] == (row["user"] == "u0")
    states = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "states").glob("*.parquet")))
    ranked = Recommend(model, 3)(states).to_pylist()
    assert {(row["user"], row["rank"]) for row in ranked} == {(row["user"], row["rank"]) for row in rows}


def test_a_run_that_is_killed_goes_on_without_loss_or_doubles(known, events, tmp_path, monkeypatch):
    """Killed at every write, each time anew."""
    monkeypatch.setattr(bulk, "BYTES", 200)
    rows, _ = expected(known)
    model, out, real, kills = user_llm.load(known.directory), tmp_path / "out", bulk._compute, 0

    class Killed(BaseException):
        pass

    for allowed in range(100):
        done = 0

        def compute(*args, allowed=allowed):
            nonlocal done
            if done == allowed % 4:
                (out / "part-99999.unfinished").write_bytes(b"half")
                raise Killed
            done += 1
            real(*args)

        monkeypatch.setattr(bulk, "_compute", compute)
        try:
            bulk.run(Recommend(model, 3), str(events), out)
            break
        except Killed:
            kills += 1
    assert kills > 2
    same(read(out), rows)
    assert not list(out.glob("scratch*"))


PLACES = (  # in the order in which a run comes to them
    ("user_llm.serving.bulk:write_json", 1),  # OUT does not say yet what it is made of
    ("pyarrow.ipc:new_file", 2),  # one of the files of events is made
    ("pathlib:Path.with_stem", 1),  # the first part is about to be divided into pieces
    ("user_llm.serving.bulk:Vocabulary.gather", 1),  # all events are read; no part is there
    ("pyarrow.parquet:ParquetWriter.write_table", 1),  # the file of the first part is begun
    ("pathlib:Path.rename", 1),  # the first part is complete, and does not have its name yet
    ("pathlib:Path.unlink", 2),  # two parts are there; the events of the second are still there too
    ("pyarrow.parquet:ParquetWriter.close", 2),  # a further part lacks its end
    ("shutil:rmtree", 2),  # all parts are there; the last step is to delete the events
)


def test_sigkill_anywhere_loses_and_doubles_nothing(known, events, tmp_path):
    """Processes with the same OUT are killed one after the other. What each leaves is complete parts, and the next goes on."""
    processes = multiprocessing.get_context("forkserver")  # which imports jax once for all of them
    processes.set_forkserver_preload(["user_llm.serving.bulk"])
    out, parts = tmp_path / "out", []
    wanted = {(f"u{user}", rank) for user in range(5) for rank in range(1, len(known.rows(user)) + 1)}

    def run(*place) -> tuple[int | None, set[tuple[str, int]]]:
        process = processes.Process(target=killed.count, args=(known.written.vocabulary, events, out, *place))
        process.start()
        process.join()
        rows = [(row["user"], row["rank"]) for row in read(out)]
        assert len(set(rows)) == len(rows) and set(rows) <= wanted
        parts.append(len(list(out.glob("*.parquet"))))
        return process.exitcode, set(rows)

    for place in PLACES:
        assert run(*place)[0] == -signal.SIGKILL, place
    assert parts == sorted(parts) and len(set(parts)) > 3
    assert run() == (0, wanted)
    assert {path.suffix for path in out.iterdir() if not path.name.startswith((".", "_"))} == {".parquet"}


def test_processes_share_the_parts(known, events, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "BYTES", 200)
    rows, _ = expected(known)
    model = user_llm.load(known.directory)
    counts = [bulk.run(Recommend(model, 3), str(events), tmp_path / "out", share=bulk.Share(index, 3)) for index in range(3)]
    assert sum(counts) == 5
    same(read(tmp_path / "out"), rows)


def test_results_of_something_else_are_not_added_to(known, events, make_model, tmp_path):
    model, out = user_llm.load(known.directory), tmp_path / "out"
    bulk.run(Recommend(model, 3), str(events), out)
    for function, changes, message in (
        (Recommend(model, 4), {}, "was made with --k=3, and not 4: give it again, or"),
        (Recommend(model, 3, seen=False), {}, "was made with --seen=True, and not False: give it again, or"),
        (Recommend(model, 3), {"skip_bad": True}, "was made with --bad_rows=refuse, and not skip: give it again, or"),
        (Recommend(model, 3), {"share": bulk.Share(1, 2)}, "was made with --share=INDEX/1, and not INDEX/2: give it again, or"),
        (Encode(model), {}, "holds results of another command:"),
        (Recommend(user_llm.load(make_model("titles").directory), 3), {}, "holds results of another model:"),
    ):
        with pytest.raises(ValueError, match=f"{message} choose another --out"):
            bulk.run(function, str(events), out, **changes)
    events.write_text(events.read_text() + events.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="holds results of other events"):
        bulk.run(Recommend(model, 3), str(events), out)
    (out / bulk.FACTS).write_text('{"model": "m", "command": 1, "settings": [], "events": null}')
    with pytest.raises(ValueError, match="choose another --out"):
        bulk.run(Recommend(model, 3), str(events), out)
    for spelled in ("2/2", "x", "1", "-1/2", "1/0"):
        with pytest.raises(ValueError, match="name it as INDEX/COUNT"):
            bulk.Share.of(spelled)


def test_bad_rows_are_refused_by_number_or_left_out(known, events, tmp_path):
    events.write_text(events.read_text() + '{"user": "u0", "item": "10", "rating": 3, "timestamp": "soon"}\n')
    model, out = user_llm.load(known.directory), tmp_path / "out"
    with pytest.raises(ValueError, match=r"events\.jsonl, row \d+: no time that can be read"):
        bulk.run(Recommend(model, 3), str(events), out)
    bulk.run(Recommend(model, 3), str(events), tmp_path / "skipped", skip_bad=True)
    same(read(tmp_path / "skipped"), expected(known)[0])


def test_a_user_is_forgotten_by_writing_the_files_anew(known, events, tmp_path):
    out = tmp_path / "states"
    bulk.run(Encode(user_llm.load(known.directory)), str(events), out)
    before = {row["user"]: row for row in read(out)}
    assert user_llm.forget(out, "u3") == 1 and user_llm.forget(out, "u3") == 0
    assert {row["user"]: row for row in read(out)} == {key: row for key, row in before.items() if key != "u3"}
    assert pq.read_table(out).num_rows == 4  # a folder that readers of Parquet take as it is
    assert all(b"u3" not in file.read_bytes() for file in out.iterdir() if file.is_file())
    with pytest.raises(ValueError, match="no Parquet files of users"):
        user_llm.forget(tmp_path / "nothing", "u3")
    (out / "scratch-0-of-2").mkdir()  # as a killed run leaves it
    (out / "scratch-0-of-2" / "1.arrow").write_bytes(b"u1")
    (out / "part-1.unfinished").write_bytes(b"u1")
    assert user_llm.forget(out, "u1") == 1
    assert all(b"u1" not in file.read_bytes() for file in out.rglob("*") if file.is_file())
    pq.write_table(pa.table({"id": [1]}), out / "other.parquet")
    with pytest.raises(ValueError, match="no column 'user'"):
        user_llm.forget(out, "u2")


def test_items_of_a_file_are_encoded_and_recommended(known, events, tmp_path):
    """States of the one are rankings of the other; a folder is not continued with other items."""
    pq.write_table(pa.table({"id": ["no such"], "title": ["There now"], "genres": [["War"]]}), tmp_path / "items.parquet")
    model = user_llm.load(known.directory, items=tmp_path / "items.parquet")
    bulk.run(Encode(model), str(events), tmp_path / "states")
    states = pq.read_table(tmp_path / "states")
    assert sum(states["unknown"].to_pylist()) == 0 and states["user"].to_pylist()
    rankings = Recommend(str(known.directory), 10, items=str(tmp_path / "items.parquet"))(states)
    assert rankings["title"].to_pylist().count("There now") == len(states)
    with pytest.raises(ValueError, match="holds results of another model"):
        bulk.run(Encode(user_llm.load(known.directory)), str(events), tmp_path / "states")
