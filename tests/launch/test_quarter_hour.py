"""What is brought along arrives whole; a part that outruns its limit costs the others nothing; the rehearsal runs every part."""

import argparse
import gzip
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import bring_along
import quarter_hour


def _wheel(folder: Path) -> None:
    """The smallest wheel that pip installs: a package `brought` with one number."""
    info = "brought-1.0.dist-info"
    with zipfile.ZipFile(folder / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "NUMBER = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def parts(tmp_path):
    """Three parts of an archive with a package, data, and a program that needs the package to make an LLM."""
    source, out = tmp_path / "source", tmp_path / "parts"
    (source / "wheels").mkdir(parents=True)
    (source / "data").mkdir()
    out.mkdir()
    _wheel(source / "wheels")
    (source / "data" / "ratings.csv").write_text("userId\n1\n")
    make = "import brought, os, pathlib, sys\npath = pathlib.Path(sys.argv[1])\npath.mkdir()\n"
    (source / "make_llm.py").write_text(
        make + "(path / 'config.json').write_text(f'{brought.NUMBER} {os.environ[\"PIP_NO_INDEX\"]}')\n"
    )
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        for path in source.iterdir():
            tar.add(path, path.name)
    size = (tmp_path / "archive").stat().st_size // 3 + 1
    assert len(bring_along.split(tmp_path / "archive", out, size)) == 3
    return out


def test_parts_become_packages_data_and_an_llm_without_a_network(parts, tmp_path):
    bring_along.unpack(parts, tmp_path / "brought")
    assert (tmp_path / "brought" / "site" / "brought.py").read_text() == "NUMBER = 7\n"
    assert (tmp_path / "brought" / "data" / "ratings.csv").read_text() == "userId\n1\n"
    assert (tmp_path / "brought" / "llm" / "config.json").read_text() == "7 1"


@pytest.mark.parametrize(("harm", "sentence"), [("unlink", r"01 is missing: bring 3 parts along"), ("flip", r"01 is damaged")])
def test_a_part_that_is_missing_or_damaged_is_named(parts, tmp_path, harm, sentence):
    path = parts / "01"
    if harm == "unlink":
        path.unlink()
    else:
        piece = bytearray(path.read_bytes())
        piece[5] ^= 1
        path.write_bytes(bytes(piece))
    with pytest.raises(SystemExit, match=sentence):
        bring_along.unpack(parts, tmp_path / "brought")


@pytest.mark.parametrize("name", ["--data", "--llm"])
def test_what_is_not_there_to_bring_along_is_named_before_anything_is_fetched(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(bring_along, "pack", lambda *args: pytest.fail("it was packed"))
    monkeypatch.setattr(sys, "argv", ["bring_along.py", "pack", f"--out={tmp_path}", f"{name}={tmp_path / 'nowhere'}"])
    with pytest.raises(SystemExit):
        bring_along.main()
    assert f"error: {name}={tmp_path / 'nowhere'}: there is nothing of that name" in capsys.readouterr().err


@pytest.mark.slow
def test_a_program_that_outruns_its_limit_is_stopped_with_what_it_started(tmp_path):
    """The second one does not listen: it ends all the same, and its child with it."""
    run = quarter_hour.Runner(tmp_path, None)
    deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); "
    child = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert run("quick", ["-c", "print('well')"], time.monotonic() + 30)
    assert not run("quick", ["-c", "raise SystemExit(3)"], time.monotonic() + 30)
    start = time.monotonic()
    assert not run("slow", ["-c", "import time; time.sleep(60)"], start + 1)
    assert time.monotonic() - start < 10 and "stopped at its limit by SIGTERM" in (tmp_path / "slow.log").read_text()
    run.grace_s = 1.0
    assert not run("deaf", ["-c", deaf + child], time.monotonic() + 3)
    assert time.monotonic() - start < 40 and "by SIGKILL" in (tmp_path / "deaf.log").read_text()
    assert subprocess.run(["pgrep", "-f", "import time; time.sleep(60)"], capture_output=True, check=False).stdout == b""


def test_compiled_programs_are_kept_in_the_callers_cache_or_beside_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert quarter_hour.Runner(tmp_path, None).env["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert quarter_hour.Runner(tmp_path, None).env["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")


def test_the_busiest_operations_of_a_trace_by_hand(tmp_path):
    """Of 100 microseconds one stream works 40 and another 30, 20 of them at the same time: half of it is idle; the host counts for nothing."""
    span = lambda pid, tid, name, start, took: {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": took}  # noqa: E731
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "Stream #1"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "Stream #2"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 3, "args": {"name": "Steps"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 1, "args": {"name": "python"}},
        span(1, 1, "gemm_fusion.12", 100, 30), span(1, 1, "copy", 190, 10), span(1, 2, "gemm_fusion.7", 110, 30),
        span(1, 3, "step", 100, 100), span(2, 1, "wait", 0, 500),
    ]  # fmt: skip
    path = tmp_path / "x.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert quarter_hour.busiest(path) == {"idle": 0.5, "ms": 0.1, "share": {"gemm_fusion": 60 / 70, "copy": 10 / 70}}


def test_what_one_part_meets_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    def fails(run, args, until):
        raise KeyError("steps")

    monkeypatch.setattr(quarter_hour, "PARTS", {"first": (1.0, fails), "second": (1.0, lambda run, args, until: {"found": 1})})
    monkeypatch.setattr(sys, "argv", ["quarter_hour.py", f"--out={tmp_path}", "--rehearse", "--parts=first,second"])
    quarter_hour.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["first"]["error"] == "KeyError: 'steps'" and results["second"]["found"] == 1
    assert json.loads(capsys.readouterr().out.split("}\n}\n")[0] + "}\n}")["first"]["error"]


def test_what_an_earlier_run_found_is_not_taken_for_this_ones(tmp_path):
    for name, part in (("speed", quarter_hour.speed), ("decode", quarter_hour.decode)):
        (tmp_path / f"{name}.json").write_text('{"lora": {"steps_per_s": 1}}')
        assert part(lambda *_: None, argparse.Namespace(out=tmp_path, rehearse=True), 0.0) == {}


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_to_its_end(tmp_path):
    """With one method of each kind: an encoder, a frozen LLM that attends to users, adapters, and a text prompt without training."""
    trained = {"encoder", "user_llm_enc", "user_llm_lora"}
    phases = "--phases=pretrain_encoder,user_llm_enc,user_llm_lora,llm_text_prompt_10"
    command = [sys.executable, "launch/quarter_hour.py", f"--out={tmp_path}", "--rehearse", phases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["smoke", "movielens", "speed", "decode", "profile", "quantized"]
    assert not any("error" in found for found in results.values()), results
    assert results["smoke"]["attention"] and results["smoke"]["phases"] and results["movielens"]["whole"], logs
    methods = results["movielens"]["methods"]
    assert trained <= methods.keys() and all("recall@10" in methods[method] for method in trained)
    written = {f"{method}/generate" for method in trained - {"encoder"}} | {"llm_text_prompt_10/generate"}
    assert written <= methods.keys() and "recall@10" not in methods["llm_text_prompt_10"]
    # The LLM as it came is what it was: nothing of it has trained.
    assert methods["llm_text_prompt_10"]["perplexity"] == pytest.approx(methods["llm"]["perplexity"], rel=0.02)
    assert all("steps_per_s" in results["speed"][part]["user_llm"] for part in ("lora", "full", "encoder"))
    assert {"batch_1", "batch_2"} <= results["decode"].keys()
    profiled = {part: of for part, of in results["profile"].items() if part != "seconds"}
    assert profiled.keys() == {"lora", "full", "encoder"} and all(of["share"] for of in profiled.values())
    assert (tmp_path / "movielens" / "report.md").exists()
    in_codes = results["quantized"]
    assert in_codes["whole"] and in_codes["same_encoder"] and "recall@10" in in_codes["methods"]["user_llm_lora"], logs
    assert in_codes["methods"]["encoder"] == methods["encoder"]  # reused
    assert in_codes["methods"]["llm"]["perplexity"] != methods["llm"]["perplexity"]
    assert min(in_codes["events_per_s"].values()) > 0
