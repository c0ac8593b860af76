"""The tables of launch/TOPOLOGIES.md, with a stand-in for the compiler: which settings are recommended, and what is kept between runs."""

import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import topologies
from topologies import Found, Row, recommend

from user_llm.ahead.check import Checked
from user_llm.ahead.chips import CHIPS
from user_llm.ahead.collectives import Collective

ENCODER = Row("movielens_encoder", "pretrain_encoder", "all", "batch.rows", 16)
LORA = Row("movielens_xattn:qwen3_0_6b", "user_llm", "lora", "batch_size", 8)
FULL = Row("movielens_xattn:qwen3_0_6b", "user_llm", "full", "batch_size", 8)


class Compiler:
    """Answers with programs that need what `gigabytes(changes, part)` says, and remembers what it was asked for."""

    def __init__(self, gigabytes):
        self.gigabytes, self.asked = gigabytes, []

    def __call__(self, row, topology, changes, part):
        self.asked.append((changes, part))
        chip = CHIPS[topology.split(":")[0]]
        needed = self.gigabytes(changes, part) * 1e9
        names = {"train": [row.phase], "evaluation": [f"{row.phase}: {what}" for what in ("encode", "score", "prefill")]}
        return [Checked(name, chip, needed / 2, needed / 2, 2e12, (Collective("all-gather", 1e6, 3),)) for name in names[part]]


def _remat_and_batch(row, changes):
    return changes["llm.remat"], changes[f"{row.phase}.{row.batch}"]


def test_all_rows_of_the_issue_are_there():
    rows = topologies.rows()
    assert {row.config for row in rows if ":" not in row.config} == {
        f"{dataset}_{method}" for dataset in ("movielens", "amazon", "google_local")
        for method in ("encoder", "xattn", "softprompt", "textprompt")
    }  # fmt: skip
    llms = {row.config.partition(":")[2] for row in rows} - {""}
    assert llms >= {"gemma3_270m", "gemma3_1b", "gemma3_4b", "qwen3_0_6b", "qwen3_8b", "llama3_2_1b", "llama3_1_8b"}
    for llm in llms:
        assert {row.strategy for row in rows if row.config.endswith(f":{llm}")} == {"full", "lora", "enc", "proj"}


@pytest.mark.parametrize("row", topologies.rows(), ids=lambda row: f"{row.config}-{row.strategy}")
def test_settings_are_settings_of_the_row(row):
    """A key that the config lacks would be refused here."""
    first, *_, last = topologies.settings(row, 8)
    for changes in (first[0], last[-1]):
        config = topologies.changed(row, changes)
        assert config[row.phase].strategy == row.strategy
        assert config.encoder.remat == changes["encoder.remat"]


def test_large_batches_come_before_small_ones_and_the_least_memory_last():
    lists = list(topologies.settings(FULL, 256))
    sizes = [{changes["user_llm.batch_size"] for changes in batch} for batch in lists]
    assert sizes == 2 * [{2048}, {1024}, {512}, {256}]
    for batch in lists:
        assert (batch[0]["llm.remat"], batch[0]["mesh.fsdp"]) == ("none", 1)
        assert (batch[-1]["llm.remat"], batch[-1]["mesh.fsdp"], batch[-1]["mesh.data"]) == ("full", 32, 8)
    assert all("user_llm.optimizer.first_moment" not in changes for batch in lists[:4] for changes in batch)
    assert all(changes["user_llm.optimizer.second_moment"] == "factored" for batch in lists[4:] for changes in batch)


def test_the_first_settings_that_fit_are_recommended_and_little_else_is_compiled(tmp_path):
    def gigabytes(changes, part):
        factor = {"none": 4, "dots": 2, "full": 1}[changes["llm.remat"]]
        return factor * changes["user_llm.batch_size"] / 4 / (1 if changes["mesh.fsdp"] == 1 else 2)

    compiler = Compiler(gigabytes)
    changes, [train] = recommend(Found(tmp_path / "found", compiler), FULL, "v6e-8")
    # 64 rows take 64, 32, 32, 16 GB ...: 32 is what a chip has.
    assert (changes["llm.remat"], changes["mesh.fsdp"], changes["user_llm.batch_size"]) == ("none", 8, 64)
    assert train["total"] == 32e9 and train["sent"] == 3e6
    assert len(compiler.asked) == 3  # the first, the last, the second

    compiler = Compiler(lambda changes, part: 100 if changes["user_llm.batch_size"] > 8 else 1)
    changes, _ = recommend(Found(tmp_path / "small", compiler), FULL, "v6e-8")
    assert changes["user_llm.batch_size"] == 8 and changes["llm.remat"] == "none"
    assert len(compiler.asked) == 2 * 3 + 1

    compiler = Compiler(lambda changes, part: 1 if "user_llm.optimizer.first_moment" in changes else 100)
    changes, _ = recommend(Found(tmp_path / "lean", compiler), FULL, "v6e-8")
    assert changes["user_llm.batch_size"] == 64 and changes["user_llm.optimizer.first_moment"] == "bfloat16"


def test_nothing_is_recommended_where_nothing_fits(tmp_path):
    found = Found(tmp_path / "found", Compiler(lambda changes, part: 100))
    assert recommend(found, FULL, "v6e-8") == ({}, [])
    assert "| none of those tried fits |" in topologies.topology_table(found, "qwen3_0_6b user_llm full v6e-8")


def test_evaluation_counts_on_the_smallest_for_the_strategy_that_ships(tmp_path):
    def gigabytes(changes, part):
        return 17 if part == "evaluation" and changes["mesh.fsdp"] == 1 else 1

    for row, topology, parts, fsdp in (
        (LORA, "v5e-8", {"train", "evaluation"}, 8),
        (ENCODER, "v5e-8", {"train", "evaluation"}, 8),
        (FULL, "v5e-8", {"train"}, 1),
        (LORA, "v6e-8", {"train"}, 1),
    ):
        compiler = Compiler(gigabytes)
        changes, programs = recommend(Found(tmp_path / f"{row.strategy}-{topology}", compiler), row, topology)
        assert {part for _, part in compiler.asked} == parts
        assert changes["mesh.fsdp"] == fsdp and len(programs) == (4 if "evaluation" in parts else 1)


def test_an_interrupted_run_goes_on(tmp_path):
    class Interrupted(Exception):
        pass

    def killed(row, topology, changes, part):
        if topology.startswith("v6e"):
            raise Interrupted
        return compiler(row, topology, changes, part)

    compiler, path, only = Compiler(lambda changes, part: 1), tmp_path / "found", "movielens_encoder"
    with pytest.raises(Interrupted):
        topologies.topology_table(Found(path, killed), only)
    done = len(compiler.asked)
    assert done == len(path.read_text().splitlines()) == 2  # v5e-8: train and evaluation
    assert topologies.topology_table(Found(path)).count("`movielens_encoder`") == 1  # what there is
    table = topologies.topology_table(Found(path, compiler), only)
    assert len(compiler.asked) == done + 4
    again = Compiler(lambda changes, part: 1)
    assert topologies.topology_table(Found(path, again), only) == table == topologies.topology_table(Found(path))
    assert not again.asked
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == list(topologies.TOPOLOGIES)


def test_rows_side_by_side_are_written_in_their_order(tmp_path):
    """Also where the first is the last to be compiled."""
    compiler = Compiler(lambda changes, part: 1)

    def slow_at_first(row, *asked):
        if row.config == "movielens_encoder":
            time.sleep(0.2)
        return compiler(row, *asked)

    only = "^(movielens|amazon)_encoder"
    table = topologies.topology_table(Found(tmp_path / "several", slow_at_first), only, jobs=2)
    assert json.loads((tmp_path / "several").read_text().splitlines()[0])["config"] == "amazon_encoder"
    assert table == topologies.topology_table(Found(tmp_path / "one", compiler), only)


def test_a_row_by_hand(tmp_path):
    found = Found(tmp_path / "found", Compiler(lambda changes, part: 4))
    table = topologies.topology_table(found, "^movielens_encoder pretrain_encoder all v5e-8").splitlines()[2:]
    # 4 GB each written and read at 819 GB/s; evaluation has no decoding of its own here.
    assert table == [
        "| `movielens_encoder` pretrain_encoder | v5e-8 | as it is | 4.00 of 16 | 2.000 | 0.003 | 10.15 | compute | 4.00, 4.00, - |"
    ]
    changes = next(topologies.settings(FULL, 256))[-1]
    assert topologies.flags(FULL, changes) == (
        "`--config.mesh.data=8 --config.mesh.fsdp=32 --config.encoder.remat=full --config.llm.remat=full "
        "--config.user_llm.batch_size=2048 --config.user_llm.strategy=full`"
    )


def test_scaling_is_to_the_eight_chips(tmp_path):
    def gigabytes(changes, part):
        return 8 / changes["mesh.fsdp"] + changes["mesh.data"]

    compiler = Compiler(gigabytes)
    table = topologies.scaling_table(Found(tmp_path / "found", compiler), "movielens_encoder").splitlines()[2:]
    assert [line.split(" | ")[1:6] for line in table] == [
        ["v5e:2x4", "1 x 8", "16", "2.00", "1.00"],
        ["v5e:4x8", "1 x 32", "16", "1.25", "0.62"],
        ["v5e:8x8", "2 x 32", "16", "2.25", "1.12"],
        ["v5e:16x16", "8 x 32", "16", "8.25", "4.12"],
    ]
    assert [changes["pretrain_encoder.batch.rows"] for changes, _ in compiler.asked] == [128, 512, 1024, 4096]


def test_a_table_replaces_its_own_section_alone(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "# A\n<!-- topology table -->\nold\n<!-- /topology table -->\nB\n<!-- scaling table -->\n<!-- /scaling table -->\n"
    )
    topologies.write_section(page, "topology", "| one |")
    assert page.read_text() == (
        "# A\n<!-- topology table -->\n| one |\n<!-- /topology table -->\nB\n<!-- scaling table -->\n<!-- /scaling table -->\n"
    )
    with pytest.raises(ValueError, match="no section between <!-- cost table --> and <!-- /cost table -->"):
        topologies.write_section(page, "cost", "")


def test_the_page_has_both_sections(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text((ROOT / "launch" / "TOPOLOGIES.md").read_text())
    compiler = Compiler(lambda changes, part: 1)
    monkeypatch.setattr(topologies, "compiler", lambda workdir: compiler)
    command = ["topologies.py", f"--page={page}", f"--found={tmp_path / 'runs' / 'found'}", "--only=movielens_encoder"]
    for more, marks in (([], "topology"), (["--scaling"], "scaling")):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        topologies.main()
        section = page.read_text().partition(f"<!-- {marks} table -->")[2].partition(f"<!-- /{marks} table -->")[0]
        assert section.count("`movielens_encoder`") == (5 if marks == "topology" else 4)
    assert all(json.loads(line)["programs"] for line in (tmp_path / "runs" / "found").read_text().splitlines())
