"""Hostile inputs, a row each: events, checkpoints, run folders, model directories, reports, config values. One driver asserts of every row.

A row ends in its right result or in one sentence of an error, as the command lines show it: without a traceback, within SECONDS and
MEMORY, with nothing written outside of its workdir, and nothing of a secret file shown. Rows that the tests of one part hold for all
its kinds (`data/test_hostile_files.py`, `report/test_hostile_runs.py`, `config/test_check.py`) are not repeated here.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl.testing import flagsaver
from etils import epath
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))

from test_report import make_run
from tiny_models import make_dataset, make_models
from untrained import untrained, untrained_config, write_world

from user_llm import export, main
from user_llm.common.printable import printable
from user_llm.data import event_files
from user_llm.data.tokenizer import load_tokenizer, train_bpe
from user_llm.models.export import tokenizer_files
from user_llm.models.families import table
from user_llm.models.pretrained import check_weights, decoder_config, load_decoder
from user_llm.report import __main__ as report_command

SECONDS, MEMORY = 20, 400  # that a row may take: of a busy machine, and MiB
SECRET = "the-secret-of-another-file"
DEEP = "[" * 100_000 + "]" * 100_000


# --- what a row does with its folder `place/run`; beside it lies `outside`, with a secret and files that nobody may touch ---


def write(name: str, content: str | bytes | Any) -> Callable[[Path], None]:
    """Put a file of text, bytes or JSON there."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))

    return make


def in_place_of(name: str, put: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Remove a file or folder, and put something else at its path."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        put(path)

    return make


def link_out(name: str) -> Callable[[Path], None]:
    """Put a link to the secret, or to the folder where it lies, in the place of a file or folder."""
    target = "outside/secret" if "." in name else "outside"
    return in_place_of(name, lambda path: path.symlink_to(next(p for p in path.parents if p.name == "place").parent / target))


def pipe(name: str) -> Callable[[Path], None]:
    return in_place_of(name, os.mkfifo)


def folder(name: str) -> Callable[[Path], None]:
    return in_place_of(name, lambda path: path.mkdir())


def loop_of(name: str) -> Callable[[Path], None]:
    return in_place_of(name, lambda path: path.symlink_to(path.name))


def huge(name: str) -> Callable[[Path], None]:
    """Put a sparse file of 64 GiB there."""
    return in_place_of(name, lambda path: (path.touch(), os.truncate(path, 64 << 30)))


def largest(folder: Path, pattern: str) -> Path:
    return max((path for path in folder.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)


def flip(pattern: str) -> Callable[[Path], None]:
    """Turn one bit of the largest file of a pattern."""

    def make(folder: Path) -> None:
        path = largest(folder, pattern)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 8
        path.write_bytes(content)

    return make


def cut(pattern: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(path := largest(folder, pattern), path.stat().st_size - 9)


def change(name: str, **keys: Any) -> Callable[[Path], None]:
    """Change keys of a JSON object."""
    return lambda folder: write(name, json.loads((folder / name).read_text()) | keys)(folder)


# --- events ---

HEADER = b"user,item,time,title\n"
COLUMNS = event_files.Columns("user", "item", time="time", title="title")


def read_events(place: Path, source: str = "", columns: event_files.Columns = COLUMNS) -> list[tuple[str, ...]]:
    raw = event_files.find(source or str(place / "e.csv"), columns, name="e")
    rows = [row for batch in raw.events() for row in batch.to_pylist()]
    titles = {
        row["item"]: row["title"] for batch in raw.items() for row in batch.to_pylist()
    }  # known once the events were read
    return sorted((row["user"], row["item"], titles[row["item"]]) for row in rows)


def events(content: bytes, name: str = "e.csv") -> tuple[Callable, Callable]:
    return write(name, content), lambda place: read_events(place, str(place / name))


def parquet(columns: dict[str, Any]) -> tuple[Callable, Callable]:
    return (
        lambda folder: pq.write_table(pa.table(columns), folder / "e.parquet"),
        lambda place: read_events(place, str(place / "e.parquet")),
    )


def two_loops(folder: Path) -> None:
    write("e.csv", HEADER + b"1,a,1,A\n")(folder)
    for name in ("k=1", "k=2"):
        (folder / name).symlink_to(".")


PLAIN = {"user": ["1"], "item": ["a"], "time": [1], "title": ["A"]}
EVENTS = {
    "column named as SQL": (write("e.csv", b'"a""; DROP TABLE x; --",item,time,title\n1,a,1,A\n'),
                            lambda place: read_events(place, columns=event_files.Columns('a"; DROP TABLE x; --', "item", time="time", title="title")),
                            [("1", "a", "A")]),
    "formula": (*events(HEADER + b"1,=cmd|' /C calc'!A0,1,@SUM(1)\n"), [("1", "=cmd|' /C calc'!A0", "@SUM(1)")]),
    "two columns of one name": (*events(b"user,item,time,title,time\n1,a,1,A,2\n"), r"e\.csv.*time"),
    "open quote": (*events(HEADER + b'1,a,1,"A\n' + b"2,b,2,B\n" * 9), r"e\.csv"),
    "zero byte": (*events(HEADER + b"1,a\x00b,1,A\n"), [("1", "a\x00b", "A")]),
    "time of 400 digits": (*events(HEADER + b"1,a," + b"9" * 400 + b",A\n"), r"e\.csv, row 1: .*time"),
    "time of an exponent": (*events(HEADER + b"1,a,1e999,A\n"), r"e\.csv, row 1: .*time"),
    "half a pair in JSON": (*events(b'{"user": "\\ud800", "item": "a", "time": 1, "title": "A"}\n', "e.jsonl"), r"e\.jsonl, row 1: .*no user that can be read"),
    "__proto__": (*events(b'{"__proto__": {"user": "2"}, "user": "1", "item": "a", "time": 1, "title": "A"}\n', "e.jsonl"), [("1", "a", "A")]),
    "list of users": (*parquet(PLAIN | {"user": [["1"]]}), r"e\.parquet.*user.*list"),
    "struct of times": (*parquet(PLAIN | {"time": [{"a": 1}]}), r"e\.parquet.*time.*struct"),
    "binary that is no text": (*parquet(PLAIN | {"item": [b"\xff\xfe"]}), r"e\.parquet, row 1: no item that can be read"),
    "device": (lambda folder: None, lambda place: read_events(place, "/dev/zero"), "names no file of events"),
    "folder in itself": (two_loops, lambda place: read_events(place, str(place)), "is a link to a folder that it lies in"),
    "link in a circle": (loop_of("e.csv"), read_events, r"e\.csv"),
    "glob of nothing": (lambda folder: None, lambda place: read_events(place, f"{place}/[!"), "names no file of events"),
}  # fmt: skip

# --- checkpoints ---

TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 10,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """Write a tiny Llama with a tokenizer."""
    train_bpe(["Emma"], 300, folder / "tokenizer")
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)
    write("config.json", TINY)(folder)
    tensors = table(decoder_config(folder))
    save_file({t.name if t.name == "lm_head.weight" else f"model.{t.name}": np.ones(t.theirs, np.float32) for t in tensors},
              folder / "model.safetensors")  # fmt: skip


def read_checkpoint(place: Path) -> int:
    check_weights(place)
    return len(load_decoder(place, decoder_config(place))) and load_tokenizer(place).vocab_size


def settings(**keys: Any) -> Callable[[Path], None]:
    return change("config.json", **keys)


def safetensors(header: Any, length: int | None = None, data: bytes = b"") -> Callable[[Path], None]:
    """Write a safetensors file by hand, whose header's length may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write("model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + data)


def index(weight_map: Any) -> Callable[[Path], None]:
    return write("model.safetensors.index.json", {"weight_map": weight_map})


def typed(dtype: Any) -> Callable[[Path], None]:
    """Store all weights as numbers of another type."""

    def make(folder: Path) -> None:
        tensors = table(decoder_config(folder))
        save_file({f"model.{t.name}": np.ones(t.theirs, dtype) for t in tensors}, folder / "model.safetensors")

    return make


TENSOR = "model.norm.weight"
CHECKPOINTS = {
    "as it is": (lambda folder: None, 262),
    "config: deep": (write("config.json", DEEP), r"config\.json: it is nested too deeply"),
    "config: deep where nobody looks": (settings(bos_token_id=json.loads("[" * 900 + "]" * 900)), ".*"),
    "config: NaN": (write("config.json", json.dumps(TINY | {"rms_norm_eps": float("nan")})), "NaN is no number"),
    "config: list": (write("config.json", [1]), r"config\.json: is no object"),
    "config: not UTF-8": (write("config.json", b"\xff{}"), r"config\.json, byte 0: not UTF-8"),
    "config: pipe": (pipe("config.json"), r"config\.json is no regular file"),
    "config: folder": (folder("config.json"), r"config\.json is no regular file"),
    "config: 64 GiB": (huge("config.json"), r"config\.json has 68,719,476,736 bytes"),
    "config: secret": (link_out("config.json"), r"config\.json, line 1: not JSON"),
    "config: number of 10,000 digits": (write("config.json", '{"a": ' + "9" * 10_000 + "}"), r"config\.json: "),
    "config: negative width": (settings(hidden_size=-8), "'hidden_size' is no positive whole number"),
    "config: width of 400 digits": (settings(hidden_size=10**400), "'hidden_size' is no positive whole number"),
    "config: width true": (settings(hidden_size=True), "'hidden_size' is no positive whole number"),
    "config: half a layer": (settings(num_hidden_layers=1.5), "'num_hidden_layers' is no positive whole number"),
    "config: billions of layers": (settings(num_hidden_layers=2**31 - 1), "'num_hidden_layers' = 2147483647 is above 1000"),
    "config: billions of labels": (settings(num_labels=10**9), 262),
    "config: no heads": (settings(num_attention_heads=0), "'num_attention_heads' is no positive whole number"),
    "config: more heads than width": (settings(num_attention_heads=64, num_key_value_heads=64), "not a multiple of the number of attention heads"),
    "config: heads that do not divide": (settings(num_key_value_heads=3), "2 heads of 4 numbers and 3 key-value heads"),
    "config: vocabulary of a billion": (settings(vocab_size=10**9), r"embed_tokens\.weight is \[10, 8\] and not \[1000000000, 8\]"),
    "config: text for eps": (settings(rms_norm_eps="small"), "'rms_norm_eps' is no positive number"),
    "config: rope is a list": (settings(rope_parameters=[1]), "config"),
    "config: negative theta": (settings(rope_parameters={"rope_theta": -1.0}), "'rope_theta' is no positive number"),
    "config: factor is a list": (settings(rope_parameters={"rope_theta": 1.0, "rope_type": "linear", "factor": [8]}), "factor"),
    "config: layer types of numbers": (settings(layer_types=[1, {}]), "'layer_types' 1: is no text"),
    "config: family of a list": (settings(model_type=["llama"]), r"model_type \['llama'\] is not supported"),
    "config: code": (settings(auto_map={"AutoConfig": "evil.Config"}, trust_remote_code=True), "'auto_map' = .* is not supported"),
    "config: escape": (settings(model_type="\x1b]0;x\x07llama"), "is not supported"),
    "weights: header of 2^60 bytes": (safetensors({}, 2**60), r"model\.safetensors is truncated or no safetensors file"),
    "weights: header deep": (safetensors(DEEP.encode()), r"model\.safetensors is truncated or no safetensors file"),
    "weights: shape of 2^60": (safetensors({TENSOR: {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}, data=b"\0" * 4),
                               r"model\.safetensors is truncated or no safetensors file"),
    "weights: offsets beyond": (safetensors({TENSOR: {"dtype": "F32", "shape": [8], "data_offsets": [0, 2**50]}}), "is truncated"),
    "weights: empty": (write("model.safetensors", b""), "is truncated or no safetensors file"),
    "weights: cut": (cut("model.safetensors"), "is truncated or no safetensors file"),
    "weights: pickle": (write("model.safetensors", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."), "is truncated or no safetensors file"),
    "weights: pipe": (pipe("model.safetensors"), r"model\.safetensors is no regular file"),
    "weights: folder": (folder("model.safetensors"), r"model\.safetensors is no regular file"),
    "weights: whole numbers": (typed(np.int32), "is of type I32, and only F64, F32, F16, BF16 are read"),
    "index: elsewhere": (index({TENSOR: "../../outside/model.safetensors"}), "has a slash or a backslash"),
    "index: absolute": (index({TENSOR: "/etc/passwd"}), "has a slash or a backslash"),
    "index: the folder": (index({TENSOR: ".."}), "means another folder"),
    "index: list": (index(["model.safetensors"]), "'weight_map' is no object"),
    "index: numbers": (index({TENSOR: 5}), "weight_map 'model.norm.weight' is no text"),
    "index: deep": (write("model.safetensors.index.json", DEEP), "nested too deeply"),
    "tokenizer: deep": (write("tokenizer.json", DEEP), r"tokenizer\.json is no tokenizer"),
    "tokenizer: not UTF-8": (write("tokenizer.json", b"\xff"), r"tokenizer\.json is no tokenizer"),
    "tokenizer: pipe": (pipe("tokenizer.json"), r"tokenizer\.json is no "),
    "tokenizer: settings of a list": (write("tokenizer_config.json", [1]), r"tokenizer_config\.json: is no object"),
    "tokenizer: template of numbers": (change("tokenizer_config.json", chat_template=[5]), "'chat_template' is no template"),
    "tokenizer: template not UTF-8": (write("chat_template.jinja", b"\xff"), r"chat_template\.jinja, byte 0: not UTF-8"),
    "tokenizer: stops at text": (write("generation_config.json", {"eos_token_id": "</s>"}), "'eos_token_id' is no token ids"),
    "tokenizer: stops below zero": (write("generation_config.json", {"eos_token_id": [-1]}), "'eos_token_id' is no token ids"),
}  # fmt: skip

# --- run folders: a finished run is gone on with ---


def go_on(place: Path) -> set[str]:
    return {row["method"] for row in main.run(untrained_config(place.parent / "data"), epath.Path(place))}


def reuse(place: Path) -> set[str]:
    config = untrained_config(place.parent / "data", reuse=str(place))
    return {row["method"] for row in main.run(config, epath.Path(place.parent / "next"))}


METHODS = {"encoder", "popularity", "popularity_7d", "transitions"}
ENCODER = "pretrain_encoder"
DAMAGED = (f"{ENCODER}/results.json", f"{ENCODER}/identity.json", f"{ENCODER}/params/checksums.json", "baselines/identity.json")
DAMAGES = {
    "pipe": (pipe, "is neither a file nor a folder: delete it"),
    "link to a secret": (link_out, "is a link that leads out of"),
    "deep": (lambda name: write(name, DEEP), "nested too deeply|is damaged"),
    "64 GiB": (huge, "68,719,476,736 bytes|is damaged"),
}
# Each file and each damage is fast once; the other pairs are slow.
SLOW = {f"run: {kind}: {name}" for n, kind in enumerate(DAMAGES) for m, name in enumerate(DAMAGED) if n != m}
RUNS = {
    "as it is": (lambda folder: None, METHODS),
    **{f"{kind}: {name}": (make(name), words) for name in DAMAGED for kind, (make, words) in DAMAGES.items()},
    "results of half a file": (cut(f"{ENCODER}/results.json"), r"results\.json, line \d+: not JSON; delete it"),
    "results of NaN": (write(f"{ENCODER}/results.json", '[{"value": NaN}]'), r"results\.json: NaN is no number"),
    "results of another kind": (write(f"{ENCODER}/results.json", [{"value": 1}]), r"results\.json, row 1: no 'dataset'"),
    "results are a folder": (folder(f"{ENCODER}/results.json"), r"results\.json is no regular file"),
    "settings of another program": (write("config.json", {"version": 99}), METHODS),
    "identity of numbers": (write(f"{ENCODER}/identity.json", {"identity": 5}), r"identity\.json: 'identity' is no text"),
    "identity by hand": (change(f"{ENCODER}/identity.json", inputs={}), r"identity\.json was changed by hand"),
    "parameters gone": (lambda folder: shutil.rmtree(folder / ENCODER / "params"), "No parameters at .*/params: they were deleted"),
    "parameters cut": (cut(f"{ENCODER}/params/**/*"), "is damaged: it has"),
    "parameters flipped": (flip(f"{ENCODER}/params/**/*"), "is damaged: its checksum"),
    "records flipped": (flip("data/**/*array_record*"), "is damaged: its checksum"),
    "phase elsewhere": (link_out(ENCODER), f"{ENCODER} is a link that leads out of"),
    "lock elsewhere": (link_out("run.lock"), r"Cannot write the run to --workdir=.*: "),
    "lock is a pipe": (pipe("run.lock"), r"run\.lock is no regular file: delete it"),
    "report elsewhere": (link_out("report.md"), r"report\.md is a link that leads out of"),
    "link in a circle": (loop_of("samples"), "samples is neither a file nor a folder"),
    "hashes deep": (write("data/hashes.json", DEEP), METHODS),
    "columns deep": (lambda folder: write(str(next(folder.glob("data/**/columns.json")).relative_to(folder)), DEEP)(folder), METHODS),
    "workdir is a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "Cannot write the run to --workdir="),
    "workdir is read-only": (lambda folder: (shutil.rmtree(folder), folder.symlink_to("/proc/self")), "Cannot write the run to --workdir="),
}  # fmt: skip
REUSED = {
    "secret in a run to reuse": (link_out(f"{ENCODER}/samples.json"), r"samples\.json is a link that leads out of"),
    "pipe in a run to reuse": (pipe(f"{ENCODER}/more"), "more is neither a file nor a folder"),
    "run to reuse with a flipped bit": (flip(f"{ENCODER}/params/**/*"), "is damaged: its checksum"),
    "run to reuse by another's word": (write(f"{ENCODER}/identity.json", DEEP), "nested too deeply"),
}  # fmt: skip

# --- model directories, which are exported ---


def exported(place: Path) -> set[str]:
    with flagsaver.as_parsed(model=str(place), out=str(place.parent / "out"), llm="", push=""):
        export.main(["export"])
    return {"config.json", "model.safetensors", "user_llm.json"} & {path.name for path in (place.parent / "out").iterdir()}


SETTINGS = "user_llm.json"
EXPORTED = {
    "as it is": (lambda folder: None, {"config.json", "model.safetensors", SETTINGS}),
    "no model": (lambda folder: shutil.rmtree(folder), r"^There is no model at .*: name a model directory"),
    "out exists": (lambda folder: (folder.parent / "out").mkdir(), "out exists: choose another directory"),
    "settings deep": (write(SETTINGS, DEEP), r"user_llm\.json: it is nested too deeply"),
    "settings of a list": (write(SETTINGS, []), r"user_llm\.json: is no object"),
    "settings of no kind": (write(SETTINGS, {"format": 1, "model": 5}), r"user_llm\.json is not as it was written"),
    "settings are a pipe": (pipe(SETTINGS), r"user_llm\.json is no regular file"),
    "settings of 64 GiB": (huge(SETTINGS), r"user_llm\.json has 68,719,476,736 bytes"),
    "settings elsewhere": (link_out(SETTINGS), r"user_llm\.json is a link that leads out of"),
    "weights flipped": (flip("model.safetensors"), r"model\.safetensors is not as it was written"),
    "weights are a pipe": (pipe("model.safetensors"), r"model\.safetensors is no regular file"),
    "weights elsewhere": (link_out("model.safetensors"), r"model\.safetensors is a link that leads out of"),
    "items in a circle": (loop_of("catalogue.parquet"), r"catalogue\.parquet (is missing|cannot be read)"),
    "secret beside the tokenizer": (link_out("tokens.txt"), r"tokens\.txt is a link that leads out of"),
}  # fmt: skip


# --- reports ---


def reported(place: Path, **flags: str) -> bool:
    report_command.flags = SimpleNamespace(
        FLAGS=SimpleNamespace(**({"cost": "", "out": None, "reference": "", "metric": ""} | flags))
    )
    report_command.main(["report", *([str(place)] if "cost" not in flags else [])])
    return "# Report" in (place / "report.md").read_text()


def cost(content: Any) -> tuple[Callable, Callable]:
    return write("cost.json", content), lambda place: reported(place, cost=str(place / "cost.json"))


COST = {"method": "a", "events": 1, "serving": "b", "prompt_tokens": 1, "flops_formula": 1.0, "flops_hlo": None, "flops_ratio": None,
        "prefill_ratio": None, "decode_ratio": None, "state_bytes": 1}  # fmt: skip
REPORTS = {
    "half a line": (lambda folder: (folder / "user_llm/metrics.jsonl").open("a").write('{"step": 30, "ki'), reported, True),
    "metrics of 64 GiB": (huge("user_llm/metrics.jsonl"), reported, r"metrics\.jsonl has 68,719,476,736 bytes"),
    "results of 64 GiB": (huge("results.json"), reported, r"results\.json has 68,719,476,736 bytes"),
    "results are a folder": (folder("results.json"), reported, r"results\.json is no regular file"),
    "results in a circle": (loop_of("results.json"), reported, "results.json"),
    "no run": (lambda folder: shutil.rmtree(folder), reported, "holds no results.json"),
    "cost deep": (*cost(DEEP), r"cost\.json: it is nested too deeply"),
    "cost of nothing": (*cost({"facts": {"command": "x"}, "rows": [COST | {"flops_formula": 0}]}), "'flops_formula' is no positive number"),
    "cost with escapes": (*cost({"facts": {"command": "\x1b[2J", "\x1b[31m": "\x1b]0;x\x07"}, "rows": [COST]}), True),
}  # fmt: skip

# --- config values, by the whole run up to its data ---


def configured(**values: Any) -> Callable[[Path], Any]:
    def run(place: Path) -> None:
        config = untrained_config(place / "data").unlock()
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
        main.run(config, epath.Path(place / "run"))

    return run


CONFIGS = {
    "reuse of a file": (configured(reuse="/etc/passwd"), "names /etc/passwd, and there is no such run"),
    "reuse of a device": (configured(reuse="/dev/zero"), "names /dev/zero, and there is no such run"),
    "data from a device": (configured(data__dir="/dev/zero"), "/dev/zero"),
    "data from a process": (configured(data__dir="/proc/self/mem"), "/proc/self/mem"),
    "data of a zero byte": (configured(data__dir="a\0b"), "No MovieLens at"),
    "data of 100,000 characters": (configured(data__dir="x" * 100_000), "x"),
    "seed of 400 digits": (configured(seed=10**400), "seed=1000"),
    "seed below zero": (configured(seed=-1), "seed=-1: it must be"),
    "nesting": (configured(encoder__features=json.loads("[" * 300 + "]" * 300)), r"encoder\.features\[0\]=.*it must be a text"),
    "escape": (configured(data__split="\x1b]0;x\x07"), "data.split=.*choose leave_last_out or global_time"),
    "devices without end": (configured(mesh__data=2**31 - 1), "mesh"),
}  # fmt: skip

ROWS = [
    *((f"events: {name}", None, make, do, expected) for name, (make, do, expected) in EVENTS.items()),
    *((f"checkpoint: {name}", "checkpoint", make, read_checkpoint, expected) for name, (make, expected) in CHECKPOINTS.items()),
    *((f"run: {name}", "finished", make, go_on, expected) for name, (make, expected) in RUNS.items()),
    *((f"reuse: {name}", "finished", make, reuse, expected) for name, (make, expected) in REUSED.items()),
    *((f"export: {name}", "model", make, exported, expected) for name, (make, expected) in EXPORTED.items()),
    ("LLM: secret beside the tokenizer", "checkpoint", link_out("tokens.txt"), tokenizer_files, r"tokens\.txt is a link that leads out of"),
    *((f"report: {name}", "report", make, do, expected) for name, (make, do, expected) in REPORTS.items()),
    *((f"config: {name}", "world", lambda folder: None, do, expected) for name, (do, expected) in CONFIGS.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory, make_timelines, drawn) -> Path:
    """Return a folder of what rows change: a checkpoint, a model, a finished run with its data, and a run to report."""
    home = tmp_path_factory.mktemp("originals")
    (home / "checkpoint/run").mkdir(parents=True)
    make_checkpoint(home / "checkpoint/run")
    model = make_models(make_dataset(make_timelines), drawn, tmp_path_factory.mktemp("models"))("cross")
    shutil.copytree(model.directory, home / "model/run")
    write_world(home / "finished/data")
    write_world(home / "world/run/data")
    make_run(home / "report/run")
    with untrained():
        main.run(untrained_config(home / "finished/data"), epath.Path(home / "finished/run"))
        yield home


class Hangs(BaseException):
    """A row that does not end."""


@contextlib.contextmanager
def deadline():
    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ending(do: Callable[[Path], Any], place: Path) -> tuple[bool, Any]:
    """Return whether the row was refused, and its sentence or its result; errors become sentences as the command lines make them."""
    try:
        return False, do(place)
    except (ValueError, OSError, ArithmeticError) as error:
        return True, printable(error)
    except SystemExit as error:
        assert error.code not in (None, 0)
        return True, re.sub("^[Ee]rror: ", "", str(error.code))


def standing_files(home: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(home.rglob("*"))}


@pytest.mark.parametrize(
    ("start", "make", "do", "expected"),
    [pytest.param(*row, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, *row in ROWS],
)
def test_a_hostile_input_ends_rightly_or_in_one_sentence(start, make, do, expected, originals, tmp_path, capfd, monkeypatch):
    place, outside = tmp_path / "place" / "run", tmp_path / "outside"
    shutil.copytree(originals / start, place.parent) if start else place.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    shutil.copyfile(originals / "checkpoint/run/model.safetensors", outside / "model.safetensors")
    make(place)
    before, memory = standing_files(outside), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.chdir(place.parent)
    monkeypatch.setattr(report_command, "flags", report_command.flags)
    begun = time.monotonic()
    with deadline():
        refused, result = ending(do, place)
    assert time.monotonic() - begun < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY << 10
    assert standing_files(outside) == before and {path.name for path in tmp_path.iterdir()} == {"place", "outside"}
    printed = "".join(capfd.readouterr())
    if isinstance(expected, str):
        assert refused, result
        assert re.search(expected, result), result
        assert "\n" not in result and result.isprintable() and len(result) <= 1000
    else:
        assert result == expected
    for shown in (str(result), printed):
        assert SECRET not in shown and "Traceback" not in shown
    for path in place.parent.rglob("*.html"):
        assert SECRET not in path.read_text()
