"""Which open LLM fits ONE chip, and in how many bytes its weights must be kept: compiles LoRA steps ahead of time, writes launch/TOPOLOGIES.md.

    pip install -e ".[tpu]"
    python launch/one_chip.py                         # what is missing, then both tables
    python launch/one_chip.py --only="llama3_1_8b v5e"

A step has one history of 200 events and one prompt of 1,024 tokens, and every layer is computed again in the backward pass. The first table is
of TPU chips; the second takes the bytes of the same programs for those of a GPU, whose compiler and kernels are others. No TPU is needed, as in
`topologies.py`, which keeps what was compiled in the same way.
"""

import argparse
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import topologies
from topologies import HERE, Found, Row

from user_llm.ahead.chips import CHIPS

LENGTH = 1024
FORMS = ("", "int8", "nf4")  # of llm.quantize; int4 takes as much as nf4
NAMES = {"": "bfloat16", "int8": "int8", "nf4": "nf4 or int4"}
TPUS = {"v5e:1x1": "v5e", "v6e:1x1": "v6e"}
# The chip whose memory holds every step, and what of a GPU's GB a program may take: the rest is the driver's and fragments.
LARGEST, USABLE = "v5p:1x1x1", 0.92
GPUS = (16, 24, 48, 80)
LLMS = ("qwen3_0_6b", "llama3_2_1b", "gemma3_4b", "llama3_1_8b", "qwen3_8b")
# What was asked of TPUs: LLM, topology, form.
ASKED = (
    ("gemma3_4b", "v5e:1x1", ""), ("gemma3_4b", "v5e:1x1", "nf4"),
    ("llama3_1_8b", "v5e:1x1", "nf4"), ("qwen3_8b", "v5e:1x1", "nf4"),
    ("llama3_1_8b", "v6e:1x1", "int8"), ("qwen3_8b", "v6e:1x1", "int8"),
)  # fmt: skip


def settings(form: str) -> dict:
    """Return what differs from the config of an LLM."""
    return {
        "llm.quantize": form, "llm.remat": "full", "user_llm.batch_size": 1, "user_llm.examples.targets_per_history": 1,
        "user_llm.prompts.next_item.max_tokens": LENGTH,
    }  # fmt: skip


def step(found: Found, llm: str, topology: str, form: str) -> dict | None:
    """Return the figures of a step; None if they are not known and nothing compiles."""
    row = Row(f"movielens_xattn:{llm}", "user_llm", "lora", "batch_size", 1)
    programs = found.programs(row, topology, settings(form))
    return programs and programs[0]


def command(llm: str, topology: str, form: str) -> str:
    """Return the command that compiles the same, besides what evaluation computes."""
    flags = " ".join(f"--config.{key}={value}" for key, value in settings(form).items() if value != "")
    return (
        f"`python -m user_llm.main --config=configs/movielens_xattn.py:{llm} --config.phases=user_llm --compile_only --nokernels "
        f"--topology={topology} {flags}`"
    )


def tpu_lines(found: Found) -> Iterator[tuple]:
    """Yield the rows of the table of TPU chips that are known."""
    for llm, topology, form in ASKED:
        if program := step(found, llm, topology, form):
            memory = CHIPS[TPUS[topology]].memory / 1e9
            fits = "yes" if program["fits"] else "no"
            least = f"{program['least_s'] * 1e3:.0f}"
            yield (
                f"`{llm}`",
                TPUS[topology],
                NAMES[form],
                fits,
                f"{program['total'] / 1e9:.2f} of {memory:.0f}",
                least,
                command(llm, topology, form),
            )


def gpu_lines(found: Found) -> Iterator[tuple]:
    """Yield the rows of the table of GPUs: of each LLM and form the GB, and whether each memory holds them."""
    for llm in LLMS:
        for form in FORMS:
            if program := step(found, llm, LARGEST, form):
                needed = program["total"] / 1e9
                yield f"`{llm}`", NAMES[form], f"{needed:.2f}", *("yes" if needed <= USABLE * size else "no" for size in GPUS)


def write(page: pathlib.Path, found: Found) -> None:
    """Write both tables of what is known."""
    tpus = ("LLM", "chip", "frozen layers", "fits", "GB of chip", "least ms", "command")
    gpus = ("LLM", "frozen layers", "GB", *(f"{size} GB" for size in GPUS))
    topologies.write_section(page, "one TPU", topologies.own_table(tpus, tpu_lines(found)))
    topologies.write_section(page, "one GPU", topologies.own_table(gpus, gpu_lines(found)))


def main() -> None:
    """Compile what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile those whose LLM, topology and form match this regex")
    parser.add_argument("--found", type=pathlib.Path, default=HERE / "one_chip.jsonl", help="what was compiled")
    parser.add_argument("--page", type=pathlib.Path, default=HERE / "TOPOLOGIES.md", help="where the tables go")
    args = parser.parse_args()
    wanted = [*ASKED, *((llm, LARGEST, form) for llm in LLMS for form in FORMS)]
    with tempfile.TemporaryDirectory() as workdir:
        compiling = Found(args.found, topologies.compiler(pathlib.Path(workdir)))
        for llm, topology, form in wanted:
            if re.search(args.only, f"{llm} {topology} {form}"):
                step(compiling, llm, topology, form)
    write(args.page, Found(args.found))


if __name__ == "__main__":
    main()
