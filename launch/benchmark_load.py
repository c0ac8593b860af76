"""Memory and time that opening a large dataset takes, up to the first batches of encoder pretraining.

    python launch/benchmark_load.py --events=20000000 --within=DIR
    python launch/benchmark_load.py --events=20000000 --within=DIR --beside=CHECKOUT  # another state of the project in the same run

Writes a prepared dataset of random events (20 a user on average, a quarter of neighbours tied) without raw files, then opens it in a
process of its own, three times: the first one makes the mapped columns (`first`), the second finds them (`again`), and the third
also audits the data (`audited`). Each line of the output is one JSON object:

    load_s, first_batch_s  seconds to the timelines, and to the first batch, imports left out
    windows_per_s          after the first batches, for --seconds seconds
    windows_per_cpu_s      the same by seconds of CPU time, which other work on the machine disturbs less
    audit_s, audit_cpu_s   of the audit, where it ran: the first one, which reads all events; and seconds of CPU time
    audit_again_s, ...     of the next one, which finds its result
    own_gib, peak_own_gib  memory that no other process shares (RssAnon) above that of the imports: at the end, and at most
    resident_gib           all resident memory at the end, pages of mapped files included

A process that does not keep within --limit_gib of address space is reported as not finished.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
PROTOCOL = {"ties": "hashed", "seed": 0, "min_events": 3}


def make_raw(folder: pathlib.Path):
    """Return the dataset as published, of whose files only the content that identifies it is there."""
    from etils import epath

    from user_llm.data.raw import Raw

    (folder / "raw").write_text("random events")
    nothing = lambda: iter(())  # noqa: E731
    return Raw(name="random", files=(epath.Path(folder / "raw"),), events=nothing, items=nothing, ordinals={"rating": 5})


def write(folder: pathlib.Path, events: int) -> None:
    """Write the prepared dataset, as `prepare.prepare` leaves it."""
    import numpy as np
    import pyarrow as pa

    from user_llm.data import prepare

    items = max(events // 200, 1)
    rng = np.random.default_rng(0)

    def records():
        written, user = 0, 0
        while written < events:
            lengths = rng.integers(5, 36, prepare.ROWS // 20)
            count = int(lengths.sum())
            number = np.repeat(np.arange(user, user + len(lengths)), lengths)
            day = rng.integers(0, 120, count)
            columns = {
                "user": pa.array([f"A{n:09d}" for n in range(user, user + len(lengths))]).take(pa.array(number - user)),
                "number": number,
                "item": (1 + items * rng.random(count) ** 3).astype(np.int32),
                "time": 1_000_000_000 + day * 86_400,
                "level_0": rng.integers(1, 6, count).astype(np.int32),
            }
            columns["rating"] = columns["level_0"]  # as earlier states of the project name it
            identity = (number * 120 + day) * (items + 1) + columns["item"]
            table = pa.table(columns).take(np.sort(np.unique(identity, return_index=True)[1]))  # without duplicates
            yield user, builder._record(table)
            written, user = written + len(table), user + len(lengths)

    def shards(self, dl_manager):
        keys = [f"B{n:08d}" for n in range(items)]
        audit = {"rows": events, "duplicates_dropped": 0, "users_before_min_events": events // 20}
        self.info.metadata.update(
            {"keys": keys, "titles": keys, "bags": {}, "vocab": {}, "ticks_per_second": 1, "edges": {}, "audit": audit}
        )
        return {"train": prepare._shards(records(), events)}

    prepare.Events._shard_iterators_per_split = shards  # the rest of the writing is the project's own
    raw = make_raw(folder)
    builder = prepare.Events(
        config=prepare.EventsConfig(name=raw.name, raw=raw), data_dir=str(folder / prepare.fingerprint(raw.files)),
        file_format="array_record",
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare()


def memory() -> dict[str, float]:
    """Return this process's resident memory in GiB: its own, and all."""
    lines = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 2**20 for name, key in (("own", "RssAnon"), ("resident", "VmRSS"))}


def measure(folder: pathlib.Path, *, seconds: float, audited: bool) -> dict:
    """Open the dataset and return what that took."""
    from user_llm.data import audits, pipeline, prepare, splits

    before, peak, done = memory()["own"], [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], memory()["own"])

    threading.Thread(target=watch, daemon=True).start()
    start = time.monotonic()
    timelines = prepare.load(make_raw(folder), folder, **PROTOCOL)
    measured = {"load_s": time.monotonic() - start}
    split = splits.leave_last_out(timelines)
    batches = iter(pipeline.packed_windows(timelines, split.train_stop, window=200, rows=64, row_length=200, seed=0))
    next(batches)
    measured["first_batch_s"] = time.monotonic() - start
    measured |= speed(batches, seconds)
    if audited:
        for name in ("audit", "audit_again"):
            start, cpu = time.monotonic(), time.process_time()
            audits.audit(timelines, split)
            measured |= {f"{name}_s": time.monotonic() - start, f"{name}_cpu_s": time.process_time() - cpu}
    done.set()
    end = memory()
    facts = {"events": len(timelines.item), "users": len(timelines), **measured}
    return facts | {"own_gib": end["own"] - before, "peak_own_gib": peak[0] - before, "resident_gib": end["resident"]}


def speed(batches, seconds: float) -> dict[str, float]:
    """Return how many windows the batches bring in a second, and in a second of CPU time, after some that fill the buffers."""
    for _ in range(5):
        next(batches)
    windows, start, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() - start < seconds:
        windows += int(next(batches)["segments"].max(axis=1).sum())
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    return {"windows_per_s": windows / wall, "windows_per_cpu_s": windows / cpu}


def run(checkout: pathlib.Path, folder: str, args: argparse.Namespace, *, audited: bool) -> dict:
    """Measure a checkout in a process of its own."""
    command = [sys.executable, __file__, f"--open={folder}", f"--seconds={args.seconds}", *(["--audited"] if audited else [])]
    limit = int(args.limit_gib * 2**30)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    if done.returncode:
        return {"finished": False, "limit_gib": args.limit_gib, "why": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Write the dataset and measure in other processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--seconds", type=float, default=10, help="for which batches are counted")
    parser.add_argument(
        "--within", help="a folder with room for 40 bytes an event; the system's one for temporary files if not given"
    )
    parser.add_argument("--beside", type=pathlib.Path, help="another checkout, which writes the same events and reads them")
    parser.add_argument("--limit_gib", type=float, default=16)
    parser.add_argument("--write", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--open", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--audited", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(measure(args.open, seconds=args.seconds, audited=args.audited)))
        return
    if args.write:
        write(args.write, args.events)
        return
    rounds = [("first", HERE.parent, False), ("again", HERE.parent, False), ("audited", HERE.parent, True)]
    if args.beside:
        rounds.append(("beside", args.beside.absolute(), False))
    written: dict[pathlib.Path, str] = {}
    with tempfile.TemporaryDirectory(dir=args.within) as folder:
        for name, checkout, audited in rounds:
            if checkout not in written:
                start = time.monotonic()
                written[checkout] = tempfile.mkdtemp(dir=folder)
                command = [sys.executable, __file__, f"--write={written[checkout]}", f"--events={args.events}"]
                subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(checkout)})
                print(json.dumps({"written_s": time.monotonic() - start}), flush=True)
            print(json.dumps({"round": name} | run(checkout, written[checkout], args, audited=audited)), flush=True)
        folders = {path.parent.name: path.parent for path in pathlib.Path(folder).rglob("columns.json")}
        sizes = {name: sum(file.stat().st_size for file in path.iterdir()) for name, path in folders.items()}
        print(json.dumps({"bytes": sizes}))


if __name__ == "__main__":
    main()
