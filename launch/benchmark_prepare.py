"""Peak memory and speed of preparing a dataset that is larger than what preparing may hold in memory.

    python launch/benchmark_prepare.py --events=20000000

Writes a synthetic file in Amazon Review's layout of 2018 (about 180 bytes an event, users and products Zipf-like, in random order), prepares
it in a process of its own, and prints one JSON object: events, bytes, seconds (and of CPU), events per second, and that process's peak resident
memory in GiB, and bytes of the prepared dataset; beside it the events per second of `json.loads` of every line, in the same
minutes on the same machine, and the ratio of the two. With --load, the seconds and peak memory of loading the timelines as well.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
WORDS = [
    "good",
    "bad",
    "fine",
    "great",
    "poor",
    "small",
    "large",
    "cheap",
    "dear",
    "old",
    "new",
    "works",
    "broke",
    "fits",
    "slow",
    "fast",
    "loud",
    "quiet",
    "soft",
    "hard",
]
PIECE = 1_000_000


def write(folder: pathlib.Path, events: int) -> None:
    """Write reviews and metadata; each user has ten events on average."""
    import numpy as np

    rng = np.random.default_rng(0)
    users, items = max(events // 10, 1), max(events // 200, 1)
    with (folder / "Toys_5.json").open("w") as file:
        for first in range(0, events, PIECE):
            count = min(PIECE, events - first)
            user = rng.integers(0, users, count)
            item = (items * rng.random(count) ** 3).astype(int)
            when = rng.integers(1_000_000_000, 1_600_000_000, count)
            stars = rng.integers(1, 6, count)
            words = rng.choice(WORDS, (count, 8))
            for u, i, w, s, text in zip(user, item, when, stars, words, strict=True):
                file.write(
                    f'{{"overall": {s}.0, "reviewerID": "A{u:09d}", "asin": "B{i:08d}", "reviewText": "{" ".join(text)}", '
                    f'"summary": "{text[0]} {text[1]}", "unixReviewTime": {w}}}\n'
                )
    with (folder / "meta_Toys.json").open("w") as file:
        for i in range(items):
            file.write(
                json.dumps({"asin": f"B{i:08d}", "title": f"Toy number {i}", "category": ["Toys", f"Kind {i % 50}"]}) + "\n"
            )


def prepare(folder: pathlib.Path, *, load: bool) -> None:
    """Prepare and print what it took."""
    sys.path.insert(0, str(HERE.parent))
    from user_llm.data import amazon
    from user_llm.data import prepare as preparing

    raw = amazon.find(folder, "Toys")
    start = time.monotonic()
    facts = preparing.prepare(raw, folder / "prepared").info.metadata["audit"]
    seconds = time.monotonic() - start
    measured = {"seconds": seconds, "cpu_seconds": time.process_time(), "events_per_s": facts["rows"] / seconds}
    measured["peak_gib"] = peak_gib()
    measured["prepared_bytes"] = sum(file.stat().st_size for file in (folder / "prepared").rglob("*") if file.is_file())
    file = folder / "Toys_5.json"
    start = time.monotonic()
    with file.open("rb") as lines:
        for line in lines:
            json.loads(line)
    measured["json_alone_events_per_s"] = facts["rows"] / (time.monotonic() - start)
    measured["of_json_alone"] = measured["events_per_s"] / measured["json_alone_events_per_s"]
    if load:
        start = time.monotonic()
        preparing.load(raw, folder / "prepared")
        measured |= {"load_seconds": time.monotonic() - start, "load_peak_gib": peak_gib()}
    print(json.dumps(facts | {"bytes": file.stat().st_size} | measured))


def peak_gib() -> float:
    """Return the most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Write the file, and prepare it in another process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--load", action="store_true")
    parser.add_argument(
        "--within", help="a folder with room for five times the file; the system's one for temporary files if not given"
    )
    parser.add_argument("--prepare", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, load=args.load)
        return
    with tempfile.TemporaryDirectory(dir=args.within) as folder:
        write(pathlib.Path(folder), args.events)
        command = [sys.executable, __file__, f"--prepare={folder}", *(["--load"] if args.load else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
