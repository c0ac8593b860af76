"""What a request costs by every method, history length and way of serving: tokens, FLOPs, latency, stored bytes.

    python launch/benchmark_cost.py --data=DIR --out=cost.json
    python launch/benchmark_cost.py --size=gemma3_270m --data=DIR --tokenizer=DIR --no-latency

`--size` is a variant of configs/movielens_xattn.py: `small`, or an open LLM by its published shape (random weights; nothing but its tokenizer
is downloaded, and with `--tokenizer` not even that). Prompts are as long as those of `--data`, a MovieLens directory, with the run's
tokenizer; without it a synthetic world is written. Prints the table as markdown and writes it as JSON. FLOPs are by formula and as XLA
counts them (user_llm/evals/cost.py says what is counted); ratios say how many times more the full text prompt, read anew, takes for
the same user. Latencies are float32, one user a batch, each the least of several turns, and only their ratios are given.
"""

import argparse
import json
import pathlib
import shlex
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import jax  # noqa: E402
from etils import epath  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from configs import movielens_xattn  # noqa: E402
from user_llm.common.mesh import make_mesh  # noqa: E402
from user_llm.config.check import check  # noqa: E402
from user_llm.data.dataset import open_dataset  # noqa: E402
from user_llm.data.prompts.base import Lines  # noqa: E402
from user_llm.data.prompts.next_item import NextItem  # noqa: E402
from user_llm.data.timelines import Timelines  # noqa: E402
from user_llm.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from user_llm.evals import cost, cost_compiled  # noqa: E402
from user_llm.models.config_json import config_from_settings  # noqa: E402
from user_llm.models.prefill import bucket  # noqa: E402
from user_llm.models.user_llm import UserLLMConfig  # noqa: E402
from user_llm.phases import contextualize, llm  # noqa: E402
from user_llm.phases.run import Run  # noqa: E402
from user_llm.report.costs import cost_table  # noqa: E402


def prompt_sizes(config: ConfigDict, timelines: Timelines, tokenizer: Tokenizer) -> cost.PromptSizes:
    """Measure prompts on whole timelines, none of them cut."""

    def prompts(phase: str, text_items: int) -> NextItem:
        asked = config[phase].prompts
        lines = Lines(
            tokenizer, timelines.catalogue, max_title_tokens=asked.max_title_tokens, history="titles", text_items=text_items
        )
        return NextItem(lines, instruction=asked.next_item.instruction, max_tokens=sys.maxsize)

    bare, text = prompts("user_llm", 0), prompts("text_prompt_50", int(timelines.lengths.max()))
    start = len(text.instruction)
    histories = (timelines.items(user, 0, length) for user, length in enumerate(timelines.lengths.tolist()))
    shown = sum(len(text.prompt(items)) - start for items in histories)
    return cost.PromptSizes(len(bare.instruction), start, shown / len(timelines.item))


def set_up(args: argparse.Namespace, workdir: epath.Path) -> tuple[UserLLMConfig, cost.PromptSizes, dict]:
    """Return the model, the lengths of its prompts, and what they were measured on."""
    config = movielens_xattn.get_config(args.size)
    config.user_llm.strategy = "full"  # adapters are merged for serving
    config.data.update({"dir": args.data} if args.data else {"source": "synthetic"})
    read = check(config)
    run, data = Run(read, workdir, make_mesh(**vars(read.mesh))), open_dataset(read, workdir)
    if read.llm.checkpoint:
        tokenizer = load_tokenizer(args.tokenizer or read.llm.checkpoint)
        base = config_from_settings(read.llm.published, args.size)
    else:
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else llm.tokenizer(run, data)
        base = llm.decoder_config(run, tokenizer.vocab_size)
    model = contextualize.model_config("user_llm", run, data, base)
    facts = {
        "size": args.size, "dataset": data.name, "vocabulary": tokenizer.vocab_size, "padded": args.padded,
        "backend": jax.default_backend(),
    }  # fmt: skip
    return model, prompt_sizes(config, data.timelines, tokenizer), facts


def measure(args: argparse.Namespace, model: UserLLMConfig, rows: list[cost.Row]) -> tuple[dict, dict, dict]:
    """Return by request XLA's count, and if wanted the seconds of a request and of writing one more token.

    Programs that need more temporary memory than `--memory_gb` are counted but not timed.
    """
    counts, requests, steps = {}, {}, {}
    params = cost_compiled.create(model) if args.latency else None
    for row in rows:
        if row.request in counts:
            continue
        print(f"compiling {row.request}", file=sys.stderr)
        program = cost_compiled.compile_request(model, row.request, to_run=args.latency)
        counts[row.request] = program.flops
        if args.latency and program.temporary_bytes <= args.memory_gb * 2**30:
            requests[row.request] = program.timer(params)
    if args.latency:
        different = dict.fromkeys(row.step for row in rows)
        steps = {step: cost_compiled.step_timer(model, params, step, steps=args.steps) for step in different}
    return counts, cost_compiled.least(requests, args.rounds), cost_compiled.least(steps, args.rounds)


def ratios(rows: list[cost.Row], taken: dict, name: str) -> list[float | None]:
    """Return for each row how many times longer the full text prompt takes; None where one of both was not timed."""
    full = {row.events: getattr(row, name) for row in rows if (row.method, row.serving) == (cost.REFERENCE, "recomputed")}
    pairs = [(taken.get(full[row.events]), taken.get(getattr(row, name))) for row in rows]
    return [most / own if most and own else None for most, own in pairs]


def main() -> None:
    """Count, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--data", default="", help="a MovieLens directory; without it a synthetic world")
    parser.add_argument("--tokenizer", default="", help="a tokenizer's directory, in place of the run's own")
    parser.add_argument("--events", type=int, nargs="+", default=[50, 100, 200, 1000])
    parser.add_argument("--padded", action="store_true", help="pad what is read as models/generate.py does")
    parser.add_argument("--hlo", action=argparse.BooleanOptionalAction, default=True, help="compile, and take XLA's count too")
    parser.add_argument("--latency", action=argparse.BooleanOptionalAction, default=True, help="run what was compiled")
    parser.add_argument(
        "--memory_gb",
        type=float,
        default=2.0,
        help="programs for which XLA plans more temporary memory are not timed; the process may take twice that",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="tokens written in one timing")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("cost.json"))
    args = parser.parse_args()
    args.latency &= args.hlo
    with tempfile.TemporaryDirectory() as workdir:
        model, sizes, facts = set_up(args, epath.Path(workdir))
    rows = cost.table(model, sizes, args.events, pad=bucket if args.padded else int)
    counts, seconds, step_seconds = measure(args, model, rows) if args.hlo else ({}, {}, {})
    found = [
        {
            "method": row.method.name, "events": row.events, "serving": row.serving, "prompt_tokens": row.prompt_tokens,
            "flops_formula": sum(row.flops.values()), "flops_terms": row.flops, "flops_hlo": counts.get(row.request),
            "flops_ratio": row.flops_ratio, "decode_flops": sum(cost.flops(model, row.step).values()),
            "prefill_ratio": prefill, "decode_ratio": decode, "state_bytes": row.state_bytes,
        }
        for row, prefill, decode in zip(
            rows, ratios(rows, seconds, "request"), ratios(rows, step_seconds, "step"), strict=True
        )
    ]  # fmt: skip
    facts |= {
        "instruction_tokens": sizes.instruction, "text_instruction_tokens": sizes.text_instruction,
        "tokens_per_title": sizes.title, "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    args.out.write_text(json.dumps({"facts": facts, "rows": found}, indent=1))
    print(json.dumps(facts), cost_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
