"""The tables of one chip, from programs that are known; nothing is compiled here."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import one_chip
import topologies


@pytest.fixture
def found(tmp_path):
    """Return `found(llm, topology, form, gigabytes)`: what is known, of one step."""

    def make(llm, topology, form, gigabytes):
        programs = [{"fits": True, "total": gigabytes * 1e9, "least_s": 0.25}]
        line = {
            "config": f"movielens_xattn:{llm}",
            "phase": "user_llm",
            "strategy": "lora",
            "topology": topology,
            "part": "train",
        }
        (tmp_path / "found.jsonl").write_text(
            json.dumps(line | {"settings": one_chip.settings(form), "programs": programs}) + "\n"
        )
        return topologies.Found(tmp_path / "found.jsonl")

    return make


def test_a_gpu_holds_a_step_that_leaves_it_some_memory(found):
    assert list(one_chip.gpu_lines(found("qwen3_8b", one_chip.LARGEST, "nf4", 14.8))) == [
        ("`qwen3_8b`", "nf4 or int4", "14.80", "no", "yes", "yes", "yes")
    ]


def test_a_chips_row_has_the_command_that_compiles_it(found):
    [row] = one_chip.tpu_lines(found("gemma3_4b", "v5e:1x1", "", 9.79))
    assert row[:6] == ("`gemma3_4b`", "v5e", "bfloat16", "yes", "9.79 of 16", "250") and "--topology=v5e:1x1" in row[6]
    assert "quantize" not in row[6] and "quantize=nf4" in one_chip.command("gemma3_4b", "v5e:1x1", "nf4")


def test_the_page_has_the_tables(tmp_path, found):
    page = tmp_path / "README.md"
    page.write_text((ROOT / "launch" / "TOPOLOGIES.md").read_text())
    one_chip.write(page, found("gemma3_4b", "v5e:1x1", "", 9.79))
    assert "9.79 of 16" in page.read_text()
