"""What XLA for TPU makes of a program: the memory that it assigns, and the text of what then runs.

Both are read from what XLA writes down once memory is assigned (`xla_dump_to`). `memory_analysis` of the compiled program counts more
temporaries than that, also for programs that XLA finds to fit a chip whose memory they would exceed (BUILD_NOTES.md).
"""

import concurrent.futures
import re
import tempfile
import threading
import time
from pathlib import Path

import jax
from etils import epath

from user_llm.common.files import local_folder

REPORT, TEXT = "*.after_optimizations-memory-usage-report.txt", "*.after_optimizations.txt"
LAST = "*.after_optimizations_after_buffer_assignment.txt"  # is written once the others are whole
HBM = re.compile(r"Memory Space: default \(color=0\)\nTotal bytes: (\d+)")


def assign(lowered: jax.stages.Lowered, workdir: epath.Path, kernels: bool = True) -> tuple[int, str]:
    """Compile a program for TPU.

    Args:
      workdir: where XLA writes, to be removed by who made it: what goes on being made without `kernels` is written there too.
      kernels: whether to wait for the code of the chip's kernels, which takes most of the time. If not, it goes on being made in a
        thread that nothing can stop but the end of the process.

    Returns:
      bytes of a device's memory, arguments among them, and the HLO after all optimizations.

    Raises:
      jax.errors.JaxRuntimeError: it does not compile, as when it needs more than the memory.
      RuntimeError: XLA did not write down what memory it assigned, as another version of it may not.
    """
    folder = local_folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        compiled: concurrent.futures.Future = concurrent.futures.Future()

        def compile() -> None:
            try:
                compiled.set_result(lowered.compile({"xla_dump_to": name, "xla_dump_hlo_as_text": True}))
            except BaseException as error:
                compiled.set_exception(error)

        threading.Thread(target=compile, daemon=True).start()
        written = Path(name)
        while kernels or not list(written.glob(LAST)):
            if compiled.done():
                compiled.result()  # raises what compiling raised
                break
            time.sleep(0.05)
        reports, texts = list(written.glob(REPORT)), list(written.glob(TEXT))
        found = HBM.search(reports[0].read_text()) if len(reports) == len(texts) == 1 else None
        if found is None:
            raise RuntimeError(f"XLA wrote no {REPORT} and {TEXT} of one program, so that what memory it takes is not known.")
        return int(found[1]), texts[0].read_text()
