"""What a quarter of an hour of one GPU can tell of this project, by one command.

    python launch/bring_along.py unpack --parts=PARTS --out=BROUGHT
    python launch/quarter_hour.py --brought=BROUGHT --out=OUT
    python launch/quarter_hour.py --out=OUT --rehearse              # the same in tiny sizes on CPU; brings nothing along

Parts, in order of worth, each with a limit of seconds of its own:

| part | what it does |
|---|---|
| `smoke` | cuDNN's attention beside the reference, values and gradients; one step of each phase on a synthetic world |
| `movielens` | configs/movielens_xattn.py:gpu on BROUGHT/data with BROUGHT/llm: encoder, `user_llm`, the LLM that ranks by itself by enc, lora and soft prompt, text prompts of 10 and 50 titles by lora, the LLM as it came |
| `speed` | train steps of Qwen3 0.6B's shape by `full` and `lora`, and of a wide encoder (launch/benchmark.py --preset=gpu), with a profile of each |
| `decode` | tokens per second at batch 1 and 32, and the share of the memory's bandwidth (launch/benchmark_decode.py --preset=gpu) |
| `profile` | which operations the profiled steps spent their time in |
| `quantized` | `user_llm_lora` again for a few steps, over the LLM in codes of 4 bits: events a second, recall, perplexity |

A part that outruns its limit is stopped, and what it has finished counts. OUT/results.json holds what each part found, written as the part
ends, OUT/movielens/ the report of the run, OUT/*.log what the parts printed. `--parts=speed,profile` runs some of them.
"""

import argparse
import collections
import gzip
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

PHASES = (
    "pretrain_encoder", "user_llm_enc", "user_llm", "text_prompt_10", "text_prompt_50", "user_llm_lora", "user_llm_soft_prompt",
    "llm_text_prompt_10",
)  # fmt: skip
# Of a rehearsal: a world of its own, as few steps as still run everything, and layers that compile once.
TINY_LLM = {
    "model_type": "llama", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
# One CPU, whatever the caller's flags make of it, and code that compiles fast rather than runs fast.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones stop at flags that they do not know
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
SMALL = {
    "encoder.num_layers": 1, "encoder.max_events": 16, "llm.num_layers": 1, "llm.vocab_size": 300, "user_llm.cross.every": 1,
    "pretrain_encoder.batch.window": 16, "pretrain_encoder.batch.row_length": 16, "pretrain_encoder.batch.rows": 2,
    "pretrain_encoder.eval.max_events": 16, "pretrain_lm.batch.rows": 2, "pretrain_lm.batch.row_length": 64,
    "user_llm.examples.max_events": 16, "user_llm.prompts.next_item.max_tokens": 48,
    "text_prompt_10.prompts.next_item.max_tokens": 96, "text_prompt_50.prompts.next_item.max_tokens": 96,
    **{f"{phase}.batch_size": 2 for phase in ("user_llm", "text_prompt_10", "text_prompt_50")},
}  # fmt: skip
TINY_RUN = SMALL | {
    "data.source": "synthetic", "data.synthetic.num_users": 60, "data.synthetic.num_items": 48, "data.synthetic.events_per_user": 14,
    "pretrain_encoder.loop.total_steps": 2, "pretrain_encoder.optimizer.warmup_steps": 1,
    **{
        f"{phase}.{key}": value
        for phase in ("user_llm", "text_prompt_10", "text_prompt_50")
        for key, value in {
            "loop.total_steps": 2, "optimizer.warmup_steps": 1, "loss.chunk": 64, "eval.generate_users": 4,
            "eval.beams": 2, "eval.batch_size": 32, "eval.validation_users": 8, "eval.samples": 1,
        }.items()
    },
}  # fmt: skip
# One step of each phase, the small LLM's own included, in half precision.
SMOKE = {
    **{f"{phase}.loop.{key}": value for phase in ("pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10")
       for key, value in {"total_steps": 1, "eval_steps": 1, "dtype": "bfloat16"}.items()},
    **{f"{phase}.optimizer.warmup_steps": 0 for phase in ("pretrain_encoder", "pretrain_lm", "user_llm", "text_prompt_10")},
    "data.synthetic.num_users": 60, "data.synthetic.num_items": 48, "data.synthetic.events_per_user": 14, "user_llm.eval.generate_users": 4,
}  # fmt: skip


def flags(changes: Mapping[str, object]) -> list[str]:
    """Return changes of a config as flags of the command line."""
    return [f"--config.{key}={value}" for key, value in changes.items()]


class Runner:
    """Runs commands with a limit of time; their output goes to a file in `out`."""

    def __init__(self, out: pathlib.Path, site: pathlib.Path | None, *, rehearse: bool = False):
        self.out, self.grace_s = out, 15.0
        paths = [str(path) for path in (site, ROOT) if path]
        # Methods share what their evaluation computes, which is compiled once. A cache that the caller names is taken instead.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
        python = {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]), "PYTHONUNBUFFERED": "1"}
        self.env = cache | os.environ | python | ({"XLA_FLAGS": QUICK_TO_COMPILE} if rehearse else {})

    def __call__(self, name: str, command: Sequence[str], until: float) -> bool:
        """Run a program of this python and say whether it ended well; at the time `until` it is asked to stop, and soon after made to."""
        with (self.out / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=self.env, cwd=ROOT, start_new_session=True
            )
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    return process.wait(max(until - time.monotonic(), 1.0)) == 0
                except subprocess.TimeoutExpired:
                    log.write(f"{' '.join(command)}: stopped at its limit by {number.name}\n")
                    os.killpg(process.pid, number)
                    until = time.monotonic() + self.grace_s
            process.wait()
            return False


def smoke(run: Runner, args: argparse.Namespace, until: float) -> dict:
    """Compare the attention kernel of this device with the reference, and take one step of each phase."""
    found = {"attention": run("smoke", ["launch/quarter_hour.py", f"--out={args.out}", "--attention"], until)}
    differences = args.out / "attention.json"
    found |= json.loads(differences.read_text()) if differences.exists() else {}
    config = ["--config=configs/movielens_xattn.py:synthetic", f"--workdir={args.out / 'smoke'}"]
    phases = ["--config.phases=('pretrain_encoder','pretrain_lm','user_llm','text_prompt_10')"]
    found["phases"] = run(
        "smoke", ["-m", "user_llm.main", *config, *phases, *flags(SMOKE | (SMALL if args.rehearse else {}))], until
    )
    shutil.rmtree(args.out / "smoke", ignore_errors=True)
    return found


def attention(out: pathlib.Path) -> None:
    """Write how far the attention that this device chooses is from the exact one, values and gradients, beside the reference in bfloat16.

    Distances are the largest of all positions, relative to the largest value.

    Raises:
      SystemExit: the kernel is more than twice as far as the reference.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from user_llm.nn.attention import attention as attend
    from user_llm.nn.kernels import choose
    from user_llm.nn.visibility import SelfMask, segment_mask

    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 256, 8, 64), (2, 2, 256, 64), (2, 2, 256, 64))
    )
    weights = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0]], [100, 100, 40, 16], axis=1) * np.ones((2, 1), int), jnp.int32)
    masks = {
        "causal": SelfMask(), "window": SelfMask(window=50), "packed": segment_mask(segments),
        "both_ways": segment_mask(segments, causal=False),
    }  # fmt: skip

    def values(mask: SelfMask, kernel: str, dtype: jnp.dtype) -> list:
        def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            result = attend(*qkv, mask=mask, kernel=kernel)
            return jnp.sum(result.astype(jnp.float32) * weights), result

        (_, result), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            *(a.astype(dtype) for a in (q, k, v))
        )
        return [np.asarray(a, np.float32) for a in (result, *gradients)]

    found: dict = {"device": jax.devices()[0].device_kind, "attention_error": {}}
    for name, mask in masks.items():
        exact = values(mask, "reference", jnp.float32)
        errors = {}
        for kernel in ("auto", "reference"):
            pairs = zip(exact, values(mask, kernel, jnp.bfloat16), strict=True)
            errors[kernel] = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
        chosen = choose("auto", mask, length=256, head_dim=64, dtype=jnp.bfloat16, biased=False)
        found["attention_error"][name] = {
            "kernel": chosen,
            "kernel_error": errors["auto"],
            "reference_error": errors["reference"],
        }
    (out / "attention.json").write_text(json.dumps(found))
    print(found)
    if far := [name for name, of in found["attention_error"].items() if of["kernel_error"] > 2 * of["reference_error"]]:
        raise SystemExit(f"The kernel differs from the reference: {', '.join(far)}.")


def movielens(run: Runner, args: argparse.Namespace, until: float) -> dict:
    """Train and measure all methods; the report holds what was finished."""
    workdir = args.out / "run"
    whole = run("movielens", on_movielens(run, args, until, workdir, {"phases": tuple(args.phases.split(","))}), until)
    if (workdir / "results.json").exists():
        report = ["-m", "user_llm.report", str(workdir), f"--out={args.out / 'movielens'}"]
        run("movielens", report, time.monotonic() + 120)
    return {"whole": whole, "methods": measured(workdir)}


def on_movielens(
    run: Runner, args: argparse.Namespace, until: float, workdir: pathlib.Path, changes: Mapping[str, object]
) -> list[str]:
    """Return the command that runs phases of configs/movielens_xattn.py:gpu on what was brought, or in tiny sizes."""
    data, llm = (args.brought / "data", args.brought / "llm") if args.brought else (None, None)
    given: dict[str, object] = {"data.dir": data}
    if args.rehearse:
        llm = args.out / "tiny_llm"
        if not llm.exists():
            run("movielens", ["launch/quarter_hour.py", f"--out={args.out}", "--tiny_llm"], until)
        given = {"pretrain_encoder.loop.eval_steps": 2} | TINY_RUN
    given = given | {"llm.checkpoint": llm} | changes
    return ["-m", "user_llm.main", "--config=configs/movielens_xattn.py:gpu", f"--workdir={workdir}", *flags(given)]


def measured(workdir: pathlib.Path) -> dict[str, dict]:
    """Return what a run's results.json says of each method; empty where there is none."""
    rows = json.loads((workdir / "results.json").read_text()) if (workdir / "results.json").exists() else []
    chosen = {"recall@10", "ndcg@10", "recall@10/unseen", "perplexity", "perplexity/with_user"}
    found: dict[str, dict] = collections.defaultdict(dict)
    for row in rows:
        if row["metric"] in chosen:
            found[row["method"]] |= {row["metric"]: row["value"], "n": row["n"]}
    return found


def quantized(run: Runner, args: argparse.Namespace, until: float) -> dict:
    """Train adapters over an LLM in codes of 4 bits, with the encoder of `movielens`, and say how fast beside the LLM as it came."""
    workdir, plain = args.out / "quantized", args.out / "run"
    changes: dict[str, object] = {
        "phases": ("pretrain_encoder", "user_llm_lora"), "llm.quantize": "nf4", "user_llm.loop.total_steps": 2 if args.rehearse else 120,
        "user_llm.eval.generate_users": 0, "user_llm.eval.control_users": 0, "user_llm.eval.samples": 0,
    }  # fmt: skip
    if has_encoder := (plain / "pretrain_encoder" / "results.json").exists():
        changes["reuse"] = plain
    whole = run("quantized", on_movielens(run, args, until, workdir, changes), until)
    rates = {name: events_per_s(of / "user_llm_lora" / "metrics.jsonl") for name, of in (("nf4", workdir), ("plain", plain))}
    return {"whole": whole, "same_encoder": has_encoder, "events_per_s": rates, "methods": measured(workdir)}


def events_per_s(metrics: pathlib.Path) -> float | None:
    """Return the most events a second of any stretch of training, which is one without compiling; None where nothing was logged."""
    lines = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else ()
    return max((line["events_per_s"] for line in lines if line["kind"] == "train"), default=None)


def speed(run: Runner, args: argparse.Namespace, until: float) -> dict:
    """Time train steps and profile three of each."""
    parts, path = ("lora", "full", "encoder"), args.out / "speed.json"
    path.unlink(missing_ok=True)  # of an earlier run
    preset, steps = ("tiny", 2) if args.rehearse else ("gpu", 20)
    options = [f"--parts={','.join(parts)}", "--sides=user_llm", "--rounds=1", f"--steps={steps}", f"--out={path}"]
    run("speed", ["launch/benchmark.py", f"--preset={preset}", *options, f"--profile={args.out / 'trace'}"], until)
    found = json.loads(path.read_text()) if path.exists() else {}
    return {part: found[part] for part in parts if part in found}


def decode(run: Runner, args: argparse.Namespace, until: float) -> dict:
    """Time decoding."""
    path = args.out / "decode.json"
    path.unlink(missing_ok=True)
    preset = "tiny" if args.rehearse else "gpu"
    run("decode", ["launch/benchmark_decode.py", f"--preset={preset}", "--rounds=1", f"--out={path}"], until)
    return json.loads(path.read_text()) if path.exists() else {}


def profile(run: Runner, args: argparse.Namespace, until: float) -> dict:
    """Say of each profiled part which operations took most of the device's time, and for how much of it the device was idle."""
    traces = sorted((args.out / "trace").rglob("*.trace.json.gz"))
    return {trace.relative_to(args.out / "trace").parts[0]: busiest(trace) for trace in traces}


def busiest(trace: pathlib.Path, most: int = 15) -> dict:
    """Return the share of a trace's device time by operation, the largest first, and the share in which nothing ran.

    Operations are told apart by their names without the numbers that XLA adds. Without a device of its own, as on CPU, the threads of XLA
    stand in for one.
    """
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    devices = {pid for pid, name in names.items() if "GPU" in name or "TPU" in name}

    def computes(event: dict) -> bool:
        thread = threads.get((event["pid"], event["tid"]), "")
        return event["pid"] in devices and "Stream" in thread if devices else "XLA" in thread or "Eigen" in thread

    spans = [e for e in events if e.get("ph") == "X" and e.get("dur") and computes(e)]
    if not spans:
        return {}
    time_of: collections.Counter[str] = collections.Counter()
    for event in spans:
        time_of[event["name"].rstrip("0123456789").rstrip("._")] += event["dur"]
    busy, end = 0.0, 0.0
    for start, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in spans):
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    whole = end - min(e["ts"] for e in spans)
    total = sum(time_of.values())
    return {
        "idle": 1 - busy / whole,
        "ms": whole / 1e3,
        "share": {name: took / total for name, took in time_of.most_common(most)},
    }


PARTS: dict[str, tuple[float, Callable[[Runner, argparse.Namespace, float], dict]]] = {
    "smoke": (90.0, smoke),
    "movielens": (450.0, movielens),
    "speed": (150.0, speed),
    "decode": (60.0, decode),
    "profile": (30.0, profile),
    "quantized": (80.0, quantized),
}


def write_tiny_llm(directory: pathlib.Path) -> None:
    """Write a checkpoint of a tiny random Llama whose tokenizer knows the synthetic world's words."""
    from flax import nnx

    from user_llm.common import trees
    from user_llm.data.tokenizer import train_bpe
    from user_llm.models.config_json import config_from_settings
    from user_llm.models.decoder import Decoder
    from user_llm.models.export import save_decoder

    train_bpe(["Next film: Films this user watched, in order:\n"] * 50, TINY_LLM["vocab_size"], directory)
    config = config_from_settings(TINY_LLM, "TINY_LLM")
    save_decoder(directory, trees.split(Decoder(config, rngs=nnx.Rngs(params=0)))[1], config)


def main() -> None:
    """Run the parts and write what each found as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda path: pathlib.Path(path).absolute(), required=True)
    parser.add_argument("--brought", type=lambda path: pathlib.Path(path).absolute(), help="what bring_along.py unpacked")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, for CPUs")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--phases", default=",".join(PHASES), help="that the part movielens runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all parts together")
    parser.add_argument("--attention", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny_llm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.attention or args.tiny_llm:
        attention(args.out) if args.attention else write_tiny_llm(args.out / "tiny_llm")
        return
    if not (args.rehearse or args.brought):
        parser.error("name what was brought along by --brought, or --rehearse")
    unknown = [part for part in args.parts.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    run = Runner(args.out, args.brought / "site" if args.brought else None, rehearse=args.rehearse)
    begun, results = time.monotonic(), {}
    for part in args.parts.split(","):
        limit, work = PARTS[part]
        limit *= 20 if args.rehearse else 1  # a rehearsal is not about time
        start = time.monotonic()
        try:
            results[part] = work(run, args, min(start + limit, begun + args.seconds))
        except Exception as error:  # what one part meets must not cost the others
            results[part] = {"error": f"{type(error).__name__}: {error}"}
        results[part]["seconds"] = round(time.monotonic() - start, 1)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        print(json.dumps({part: results[part]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
