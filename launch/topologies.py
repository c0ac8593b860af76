"""Which TPUs take which config, and how: compiles full-size configs ahead of time and writes the tables of launch/TOPOLOGIES.md.

    pip install -e ".[tpu]"
    python launch/topologies.py              # which settings fit which chips
    python launch/topologies.py --scaling    # what a chip holds and sends as chips are added

No TPU is needed, and no code of kernels is waited for. Every compiled program is kept as a line of --found, so that an interrupted run
goes on, and a table can be written from what there is (--only=REGEX compiles some rows). Of the settings of a row, in the order of
`settings`, the first that fits is the one recommended.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from user_llm.ahead import apart
from user_llm.ahead.check import Checked, check
from user_llm.ahead.chips import CHIPS
from user_llm.config.defaults import STRATEGIES
from user_llm.config.llms import LLMS
from user_llm.report import markdown

HERE = pathlib.Path(__file__).parent
# As Google Cloud names them, by cores (v5p) or chips, and as libtpu describes them.
TOPOLOGIES = {
    "v5e-8": "v5e:2x4", "v6e-8": "v6e:2x4", "v5p-8": "v5p:2x2x1", "v5p-128": "v5p:4x4x4", "v6e-256": "v6e:16x16",
}  # fmt: skip
EVALUATED = "v5e-8"  # what evaluation takes is compiled for the smallest alone
SCALING = {8: "v5e:2x4", 32: "v5e:4x8", 64: "v5e:8x8", 256: "v5e:16x16"}
REMATS = ("none", "dots", "full")
WIDEST = 32  # of fsdp, see `shared_out`


@dataclasses.dataclass(frozen=True)
class Row:
    """A phase of a config, and the key that holds its batch, of which `per_chip` on each chip are tried first."""

    config: str
    phase: str
    strategy: str
    batch: str
    per_chip: int

    @property
    def label(self) -> str:
        return f"`{self.config}` {self.phase}" + (f", {self.strategy}" if ":" in self.config else "")


def rows() -> list[Row]:
    """Return what the table has: every dataset by every method, and every open LLM by every strategy."""
    found = []
    for dataset in ("movielens", "amazon", "google_local"):
        found += [
            Row(f"{dataset}_encoder", "pretrain_encoder", "all", "batch.rows", 16),
            Row(f"{dataset}_xattn", "user_llm", "full", "batch_size", 8),
            Row(f"{dataset}_softprompt", "user_llm", "full", "batch_size", 8),
            Row(f"{dataset}_textprompt", "text_prompt_50", "full", "batch_size", 16),
        ]
    llms = [f"movielens_xattn:{llm}" for llm in LLMS]
    strategies = [name for name in STRATEGIES if name not in ("all", "none")]
    return found + [Row(llm, "user_llm", strategy, "batch_size", 8) for llm in llms for strategy in strategies]


LEAN = {"optimizer.first_moment": "bfloat16", "optimizer.second_moment": "factored"}


def shared_out(chips: int) -> dict[str, int]:
    """Return the mesh that shares parameters out over all chips, or over WIDEST where there are more, each of several copies.

    A matrix of 1024 rows over 256 chips leaves 4 on each, less than a tile: XLA then sends all-reduces of the whole matrix for its
    gathers.
    """
    fsdp = min(chips, WIDEST)
    return {"mesh.data": chips // fsdp, "mesh.fsdp": fsdp}


def settings(row: Row, chips: int) -> Iterator[list[dict]]:
    """Yield lists of settings to try, the best first: little computed again before more, parameters whole on every chip before shared.

    A list has one batch, and the last of it needs the least memory: large batches before small ones, and after all of them the same
    with moments that take less.
    """
    for moments in ({}, LEAN):
        share = row.per_chip
        while share:
            yield [
                mesh
                | {"encoder.remat": remat, "llm.remat": remat, f"{row.phase}.{row.batch}": share * chips}
                | {f"{row.phase}.{key}": dtype for key, dtype in moments.items()}
                for remat in REMATS
                for mesh in ({"mesh.data": -1, "mesh.fsdp": 1}, shared_out(chips))
            ]
            share //= 2


def shipped(row: Row) -> ConfigDict:
    """Return the config of a row as it is."""
    name, _, variant = row.config.partition(":")
    return importlib.import_module(f"configs.{name}").get_config(variant or "full")


def changed(row: Row, changes: dict) -> ConfigDict:
    """Return the config of a row with its strategy and some of its keys changed."""
    config = shipped(row)
    config.update_from_flattened_dict({f"{row.phase}.strategy": row.strategy, **changes})
    return config


class Found:
    """What was compiled before, a JSON line each; and what compiles what was not, None for nothing."""

    def __init__(self, path: pathlib.Path, compile: Callable[..., list[Checked]] | None = None):
        self._path, self._compile, self._lock = path, compile, threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {self._key(line): line for line in map(json.loads, lines)}

    @staticmethod
    def _key(line: dict) -> str:
        return json.dumps([line[key] for key in ("config", "phase", "strategy", "topology", "settings", "part")])

    def programs(self, row: Row, topology: str, changes: dict, part: str = "train") -> list[dict] | None:
        """Return the figures of the programs of a row; None if they are not known and nothing compiles.

        Args:
          part: of the phase, one of `ahead.check.PARTS`.
        """
        line = {"config": row.config, "phase": row.phase, "strategy": row.strategy, "topology": topology, "settings": changes}
        line["part"] = part
        if self._key(line) not in self._known:
            if self._compile is None:
                return None
            line["programs"] = [as_json(program) for program in self._compile(row, topology, changes, part)]
            with self._lock, self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._known[self._key(line)] = line
        return self._known[self._key(line)]["programs"]


def compiler(workdir: pathlib.Path) -> Callable[[Row, str, dict, str], list[Checked]]:
    """Return what compiles a part of a row up to where memory is assigned, with stand-ins for data and LLMs in `workdir`."""

    def compile(row: Row, topology: str, changes: dict, part: str) -> list[Checked]:
        print(f"{row.label} {topology} {changes} {part}", file=sys.stderr, flush=True)
        stand_ins = epath.Path(workdir) / row.config / row.strategy
        config = changed(row, changes)
        return apart.run(check, config, topology, stand_ins, phases=(row.phase,), parts=(part,), kernels=False)

    return compile


def as_json(program: Checked) -> dict:
    """Return the figures of a program that the tables show."""
    limit, least = max(program.seconds.items(), key=lambda pair: pair[1])
    return {
        "name": program.phase, "fits": program.fits, "total": program.total, "flops": program.flops,
        "sent": sum(program.sent_by_kind.values()), "least_s": least, "limit": limit,
    }  # fmt: skip


def recommend(found: Found, row: Row, name: str) -> tuple[dict, list[dict]] | None:
    """Return the first settings of a row that fit a topology, with their programs; none if none fits, None if that is not known."""
    topology = TOPOLOGIES[name]
    parts = ["train"]
    if name == EVALUATED and row.strategy in ("all", shipped(row)[row.phase].strategy):
        parts.append("evaluation")

    def tried(changes: dict) -> list[dict] | None:
        """Return all programs if they fit, [] if one does not, None if that is not known."""
        out: list[dict] = []
        for part in parts:
            programs = found.programs(row, topology, changes, part)
            if programs is None or not all(program["fits"] for program in programs):
                return None if programs is None else []
            out += programs
        return out

    for batch in settings(row, count_chips(topology)):
        # Where neither the first nor the last of a list fits, what lies between is not compiled.
        for changes in batch if tried(batch[0]) or tried(batch[-1]) != [] else ():
            programs = tried(changes)
            if programs is None:
                return None
            if programs:
                return changes, programs
    return {}, []


def count_chips(topology: str) -> int:
    """Return how many chips a topology such as v5e:2x4 has."""
    return math.prod(int(side) for side in topology.split(":")[1].split("x"))


HEADER = (
    "config", "topology", "settings", "GB of chip", "TFLOP", "GB sent", "least ms", "limit", "GB of score, prefill, decode",
)  # fmt: skip


def topology_table(found: Found, only: str = "", jobs: int = 1) -> str:
    """Return the table of settings that fit, of all rows that are known or match `only` and can be compiled, `jobs` rows at a time."""

    def lines(row: Row) -> list[tuple]:
        names = [name for name in TOPOLOGIES if re.search(only, f"{row.config} {row.phase} {row.strategy} {name}")]
        tried = [(name, recommend(found, row, name)) for name in names]
        return [topology_line(row, name, *best) for name, best in tried if best is not None]

    return own_table(HEADER, side_by_side(lines, rows(), jobs))


def own_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown of our own."""
    return markdown.table(header, [[markdown.Markdown(cell) for cell in line] for line in lines])


def side_by_side(lines: Callable[[Any], list[tuple]], items: Sequence, jobs: int) -> list[tuple]:
    """Return the lines of all items, in their order, `jobs` items at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return [line for of_item in pool.map(lines, items) for line in of_item]


def topology_line(row: Row, name: str, changes: dict, programs: list[dict]) -> tuple:
    """Return the cells of a row for a topology, settled by `recommend`."""
    if not programs:
        return row.label, name, "none of those tried fits", *[""] * 6
    memory = CHIPS[TOPOLOGIES[name].split(":")[0]].memory / 1e9
    train, *others = programs
    shown = {p["name"].rpartition(": ")[2]: f"{p['total'] / 1e9:.2f}" for p in others}
    return (
        row.label, name, flags(row, changes), f"{train['total'] / 1e9:.2f} of {memory:.0f}",
        f"{train['flops'] / 1e12:.3f}", f"{train['sent'] / 1e9:.3f}", f"{train['least_s'] * 1e3:.2f}", train["limit"],
        ", ".join(shown.get(what, "-") for what in ("score", "prefill", "decode")) if others else "",
    )  # fmt: skip


def flags(row: Row, changes: dict) -> str:
    """Return settings as they are written on the command line, those alone that differ from the config's."""
    default = shipped(row)
    said = []
    for key, value in changes.items():
        section = default
        for part in key.split("."):
            section = section[part]
        if section != value:
            said.append(f"--config.{key}={value}")
    if ":" in row.config and default[row.phase].strategy != row.strategy:
        said.append(f"--config.{row.phase}.strategy={row.strategy}")
    return f"`{' '.join(said)}`" if said else "as it is"


SCALED = (
    (Row("movielens_encoder", "pretrain_encoder", "all", "batch.rows", 16), "none"),
    (Row("movielens_xattn:qwen3_0_6b", "user_llm", "lora", "batch_size", 2), "full"),
    (Row("movielens_xattn:qwen3_0_6b", "user_llm", "full", "batch_size", 2), "full"),
)


def scaling_table(found: Found, only: str = "", jobs: int = 1) -> str:
    """Return what a chip holds and sends at the same batch per chip, parameters shared out; arguments as for `topology_table`."""

    def lines(scaled: tuple[Row, str]) -> list[tuple]:
        row, remat = scaled
        out, first = [], None
        for chips, topology in SCALING.items():
            if not re.search(only, f"{row.config} {row.phase} {row.strategy} {topology}"):
                continue
            changes = shared_out(chips) | {"encoder.remat": remat, "llm.remat": remat}
            changes[f"{row.phase}.{row.batch}"] = row.per_chip * chips
            programs = found.programs(row, topology, changes)
            if programs is None:
                continue
            [train] = programs
            first = first or train
            out.append((
                row.label, topology, f"{changes['mesh.data']} x {changes['mesh.fsdp']}", row.per_chip,
                f"{train['total'] / 1e9:.2f}", f"{train['total'] / first['total']:.2f}",
                f"{train['sent'] / 1e9:.3f}", f"{train['sent'] / first['sent']:.2f}",
            ))  # fmt: skip
        return out

    header = ("config", "topology", "data x fsdp", "batch a chip", "GB a chip", "to 8 chips", "GB sent by a chip", "to 8 chips")
    return own_table(header, side_by_side(lines, SCALED, jobs))


def write_section(path: pathlib.Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a section.

    Raises:
      ValueError: no such marks.
    """
    begin, end = f"<!-- {name} table -->", f"<!-- /{name} table -->"
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path} has no section between {begin} and {end}.")
    before, _, rest = page.partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Compile what is missing and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaling", action="store_true", help="the other table")
    parser.add_argument("--only", default="", help="compile rows whose config, phase, strategy and topology match this regex")
    parser.add_argument("--found", type=pathlib.Path, default=HERE / "topologies.jsonl", help="what was compiled")
    parser.add_argument("--page", type=pathlib.Path, default=HERE / "TOPOLOGIES.md", help="where the table goes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows compiled at a time, of a core each")
    args = parser.parse_args()
    args.found.parent.mkdir(parents=True, exist_ok=True)
    table, name = (scaling_table, "scaling") if args.scaling else (topology_table, "topology")
    with tempfile.TemporaryDirectory() as workdir:
        table(Found(args.found, compiler(pathlib.Path(workdir))), args.only, args.jobs)
    write_section(args.page, name, table(Found(args.found)))


if __name__ == "__main__":
    main()
