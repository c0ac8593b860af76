"""What is read of XLA's memory and text, with a stand-in for its compiler; and that it is the same with and without kernels."""

import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from etils import epath

from user_llm.ahead import assigned
from user_llm.ahead.check import check

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import topologies

REPORT = """Memory Space: default (color=0)
Total bytes: 1234 (1.2KiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list

Memory Space: vmem (color=1)
Total bytes: 99 (99B)
"""


class Lowered:
    """Writes files as XLA does, then waits for `kernels`, and raises `error`."""

    def __init__(self, files, error=None):
        self.files, self.error, self.kernels = files, error, threading.Event()

    def compile(self, options):
        assert options["xla_dump_hlo_as_text"]
        for name, text in self.files.items():
            (Path(options["xla_dump_to"]) / f"module_0003.jit_step.{name}").write_text(text)
        if self.error:
            raise self.error
        assert self.kernels.wait(timeout=60)


FILES = {
    "before_optimizations.txt": "given",
    "after_optimizations.txt": "HloModule",
    "after_optimizations-buffer-assignment.txt": "allocation 0",
    "after_optimizations-memory-usage-report.txt": REPORT,
    "after_optimizations_after_buffer_assignment.txt": "HloModule",
}


def test_memory_is_known_before_the_kernels_are(tmp_path):
    lowered = Lowered(FILES)
    assert assigned.assign(lowered, epath.Path(tmp_path), kernels=False) == (1234, "HloModule")
    assert not lowered.kernels.is_set()
    lowered.kernels.set()


def test_all_is_waited_for_unless_said_otherwise(tmp_path):
    lowered = Lowered(FILES)
    threading.Timer(0.5, lowered.kernels.set).start()
    assert assigned.assign(lowered, epath.Path(tmp_path)) == (1234, "HloModule")
    assert lowered.kernels.is_set()


def test_what_compiling_raises_is_raised(tmp_path):
    for kernels in (True, False):
        with pytest.raises(ZeroDivisionError, match="no such memory"):
            assigned.assign(
                Lowered({"before_optimizations.txt": ""}, ZeroDivisionError("no such memory")), epath.Path(tmp_path), kernels
            )


@pytest.mark.parametrize("missing", ["after_optimizations.txt", "after_optimizations-memory-usage-report.txt", "Total bytes"])
def test_another_compiler_that_does_not_say_is_no_answer(missing, tmp_path):
    files = {name: text.replace(missing, "All") for name, text in FILES.items() if name != missing}
    lowered = Lowered(files)
    lowered.kernels.set()
    with pytest.raises(RuntimeError, match="XLA wrote no"):
        assigned.assign(lowered, epath.Path(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[tpu]"')
def test_the_figures_are_those_of_the_whole_program(tmp_path):
    """Of a small config, in processes of their own, as `launch/topologies.py` compiles; a mistake is said as it would be here."""
    row = topologies.Row("movielens_encoder:synthetic", "pretrain_encoder", "all", "batch.rows", 16)
    compile = topologies.compiler(tmp_path)
    [program] = compile(row, "v5e:2x4", {"mesh.fsdp": 8, "mesh.data": 1}, "train")
    config = topologies.changed(row, {"mesh.fsdp": 8, "mesh.data": 1})
    [whole] = check(config, "v5e:2x4", epath.Path(tmp_path), phases=("pretrain_encoder",), parts=("train",))
    assert program == whole
    assert program.arguments < program.total < 16e9
    with pytest.raises(ValueError, match="fsdp=7, tensor=1 does not fit 8 devices"):
        compile(row, "v5e:2x4", {"mesh.fsdp": 7, "mesh.data": 1}, "train")
