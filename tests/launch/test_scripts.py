"""The launch scripts: the exact commands that they would issue, and that they issue them, to stand-ins for gcloud and others."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("launch/*.sh"))
TPU = ["--name=run", "--zone=us-west4-a", "--type=v5litepod-8", "--workdir=gs://bucket/run"]
ARGUMENTS = ["--", "--config=configs/movielens_xattn.py", "--config.phases=('pretrain_encoder',)"]
REMOTE = (
    "cd user_llm && USER_LLM_DISTRIBUTED=1 .venv/bin/python -m user_llm.main --workdir=gs://bucket/run "
    r"--config=configs/movielens_xattn.py --config.phases=\(\'pretrain_encoder\'\,\)"
)
INSTALL = (
    "sudo apt-get install -qy python3.11-venv && mkdir -p user_llm && tar -xzf user_llm.tar.gz -C user_llm && cd user_llm && "
    'python3.11 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
)


def _run(script, *arguments, **environment):
    command = ["bash", f"launch/{script}.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def _dry(script, *arguments, **environment):
    """What a dry run prints, as a shell would read it."""
    done = _run(script, "--dry_run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def _tpu_commands(*, create=(), nodes=("run",), where=("--zone=us-west4-a",), archive="user_llm.tar.gz", kind="v5litepod-8"):
    """The commands from asking for TPUs to the report; `create` None if they are there."""
    tpus = ["gcloud", "compute", "tpus"]
    runtime = {"v5litepod-8": "v2-alpha-tpuv5-lite", "v6e-256": "v2-alpha-tpuv6e", "v5p-128": "v2-alpha-tpuv5"}[kind]
    named = [f"--node-id={nodes[0]}"] if len(nodes) == 1 else [f"--node-count={len(nodes)}", "--node-prefix=run"]
    asked = [f"--accelerator-type={kind}", f"--runtime-version={runtime}"]
    ssh = lambda node, text: [*tpus, "tpu-vm", "ssh", node, *where, "--worker=all", f"--command={text}"]  # noqa: E731
    return [
        *([] if create is None else [[*tpus, "queued-resources", "create", "run", *named, *where, *asked, *create]]),
        ["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        *([*tpus, "tpu-vm", "scp", archive, f"{node}:user_llm.tar.gz", *where, "--worker=all"] for node in nodes),
        *(ssh(node, INSTALL) for node in nodes),
        *(ssh(node, REMOTE) for node in nodes),
        ["mkdir", "-p", "runs/run"],
        [
            "gcloud",
            "storage",
            "cp",
            *(f"gs://bucket/run/{name}" for name in ("report.*", "*.png", "results.json")),
            "runs/run/",
        ],
    ]


DELETE = ["gcloud", "compute", "tpus", "queued-resources", "delete", "run", "--zone=us-west4-a", "--force", "--quiet"]


def test_a_tpu_vm_on_demand():
    assert _dry("tpu_vm", *TPU, *ARGUMENTS) == _tpu_commands()


def test_spot_tpus_that_are_given_back():
    assert _dry("tpu_vm", *TPU, "--spot", "--delete", *ARGUMENTS) == [*_tpu_commands(create=["--spot"]), DELETE]


def test_two_reserved_slices_of_a_pod_in_a_project():
    flags = [*TPU[:2], "--type=v6e-256", TPU[3], "--reserved", "--slices=2", "--project=lab"]
    where = ("--zone=us-west4-a", "--project=lab")
    expected = _tpu_commands(create=["--reserved"], nodes=("run-0", "run-1"), where=where, kind="v6e-256")
    assert _dry("tpu_vm", *flags, *ARGUMENTS) == expected


STAND_IN = """#!/usr/bin/env bash
printf '%s\\0' {name} "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
case "$*" in
  *queued-resources\\ describe*) state=$(sed -n 1p "$STATES"); sed -i 1d "$STATES"; [ "$state" != ABSENT ] && echo "$state" ;;
  *user_llm.main*) code=$(sed -n 1p "$CODES"); sed -i 1d "$CODES"; exit "$code" ;;
esac
"""


@pytest.fixture
def issued(tmp_path):
    """Return `issued(script, arguments, states, codes)`: the exit code and the commands that stand-ins on the PATH were given.

    `states` answer how the TPUs are, one question after the other; `codes` are those that training ends with.
    """

    def run(script, *arguments, states=(), codes=()):
        tools, calls = tmp_path / "bin", tmp_path / "calls"
        tools.mkdir(exist_ok=True)
        calls.write_bytes(b"")
        for name in ("gcloud", "git", "xpk", "docker", "srun"):
            (tools / name).write_text(STAND_IN.format(name=name))
            (tools / name).chmod(0o755)
        for name, lines in (("states", states), ("codes", codes)):
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        paths = {"CALLS": str(calls), "STATES": str(tmp_path / "states"), "CODES": str(tmp_path / "codes")}
        done = _run(script, *arguments, PATH=f"{tools}:{os.environ['PATH']}", POLL_S="0", **paths)
        found = [line.split("\0")[:-1] for line in calls.read_text().splitlines()]
        return done, [call for call in found if "describe" not in call]

    yield run
    if (ROOT / "runs" / "run").exists():
        (ROOT / "runs" / "run").rmdir()


def _issued_commands(**how):
    """Those that `_tpu_commands` names, as stand-ins see them: the archive has a folder of its own, and mkdir is real."""
    return [c for c in _tpu_commands(**how) if c[0] != "mkdir"]


def _without_archive(commands):
    """Leave out where the archive is."""
    return [[part if not part.endswith("/user_llm.tar.gz") else "ARCHIVE" for part in command] for command in commands]


def test_what_is_printed_is_what_is_issued(issued):
    done, calls = issued("tpu_vm", *TPU, *ARGUMENTS, states=["ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE"], codes=[0])
    assert done.returncode == 0, done.stderr
    expected = _issued_commands(archive="ARCHIVE")
    expected[1][3] = "ARCHIVE"
    assert _without_archive(calls) == expected


def test_tpus_that_are_there_are_used_again(issued):
    done, calls = issued("tpu_vm", *TPU, *ARGUMENTS, states=["ACTIVE", "ACTIVE"], codes=[0])
    assert done.returncode == 0 and not any("create" in call for call in calls)


def test_after_a_preemption_the_same_run_goes_on_on_other_tpus(issued):
    states = ["ABSENT", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"]
    done, calls = issued("tpu_vm", *TPU, "--spot", *ARGUMENTS, states=states, codes=[1, 0])
    assert done.returncode == 0, done.stderr
    kinds = [next(word for word in ("create", "delete", "archive", "scp", "ssh", "storage") if word in call) for call in calls]
    once = ["create", "archive", "scp", "ssh", "ssh"]
    assert kinds == [*once, "delete", *once, "storage"]
    assert "run was taken away: asking again (1 of 20)." in done.stderr


def test_a_run_that_fails_is_not_tried_again_and_the_tpus_are_given_back(issued):
    done, calls = issued("tpu_vm", *TPU, "--delete", *ARGUMENTS, states=["ACTIVE", "ACTIVE", "ACTIVE"], codes=[1])
    assert done.returncode == 1 and "Error: the run failed" in done.stderr
    assert calls[-1] == DELETE and sum("user_llm.main" in " ".join(call) for call in calls) == 1


def test_it_ends_when_tpus_are_taken_away_too_often(issued):
    states = ["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE", "SUSPENDED"]
    done, _ = issued("tpu_vm", *TPU, "--tries=2", *ARGUMENTS, states=states, codes=[1, 1])
    assert done.returncode == 1 and "Error: the TPUs were taken away 2 times." in done.stderr


GKE = ["--cluster=c", "--zone=z", "--type=v6e-256", "--image=r/u:1", "--name=w", "--workdir=gs://bucket/run"]


def test_a_workload_of_xpk(issued):
    where = ["--cluster=c", "--zone=z"]
    remote = REMOTE.partition("USER_LLM_DISTRIBUTED=1 .venv/bin/")[2]
    expected = [
        ["docker", "build", "--build-arg=EXTRA=tpu", "--tag=r/u:1", "--file=launch/Dockerfile", "."],
        ["docker", "push", "r/u:1"],
        ["xpk", "cluster", "create", *where, "--tpu-type=v6e-256", "--num-slices=2", "--spot"],
        ["xpk", "workload", "create", *where, "--workload=w", "--tpu-type=v6e-256", "--num-slices=2", "--docker-image=r/u:1",
         "--max-restarts=20", "--env=USER_LLM_DISTRIBUTED=1", f"--command={remote}"],
        ["xpk", "workload", "list", *where, "--wait-for-job-completion=w"],
        ["mkdir", "-p", "runs/w"],
        ["gcloud", "storage", "cp", "gs://bucket/run/report.*", "gs://bucket/run/*.png", "gs://bucket/run/results.json", "runs/w/"],
        ["xpk", "cluster", "delete", *where, "--force"],
    ]  # fmt: skip
    flags = [*GKE, "--slices=2", "--create", "--spot", "--delete", *ARGUMENTS]
    assert _dry("gke_xpk", *flags) == expected
    done, calls = issued("gke_xpk", *GKE, "--slices=2", "--create", "--spot", "--delete", *ARGUMENTS, codes=[0])
    assert done.returncode == 0 and calls == [command for command in expected if command[0] != "mkdir"]
    (ROOT / "runs" / "w").rmdir()


def test_gpus_of_this_host_of_several_and_by_slurm():
    train = ["python", "-m", "user_llm.main", *ARGUMENTS[1:]]
    assert _dry("gpu", *ARGUMENTS) == [train]
    several = _dry("gpu", "--coordinator=h:1", "--hosts=2", "--index=1", *ARGUMENTS)
    assert several == [["env", "COORDINATOR_ADDRESS=h:1", "NUM_PROCESSES=2", "PROCESS_ID=1", *train]]
    tasks = ["srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4"]
    assert _dry("gpu", "--slurm=2", *ARGUMENTS, GPUS_PER_NODE="4") == [
        [*tasks, "env", "USER_LLM_DISTRIBUTED=1", "JAX_LOCAL_DEVICE_IDS=0,1,2,3", *train]
    ]


def test_the_smoke_run_is_one_process_or_several():
    train = [
        "python",
        "-m",
        "user_llm.main",
        "--config=configs/movielens_xattn.py:synthetic",
        "--workdir=runs/cpu_smoke",
        "--x",
    ]
    flag = "XLA_FLAGS=--xla_force_host_platform_device_count="
    assert _dry("cpu_smoke", "--", "--x") == [["env", "JAX_PLATFORMS=cpu", f"{flag}8", *train]]
    together = lambda i: ["COORDINATOR_ADDRESS=127.0.0.1:29500", "NUM_PROCESSES=2", f"PROCESS_ID={i}"]  # noqa: E731
    expected = [["env", "JAX_PLATFORMS=cpu", f"{flag}2", *together(i), *train] for i in (0, 1)]
    assert _dry("cpu_smoke", "--devices=4", "--processes=2", "--", "--x") == expected


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("tpu_vm", ["--zone=z"], "--name, --zone and --type are needed."),
        ("tpu_vm", [*TPU[:3], "--workdir=runs/x", *ARGUMENTS], "--workdir must be on gs://"),
        ("tpu_vm", TPU, "name a config behind --"),
        ("tpu_vm", [*TPU, "--spot", "--reserved", *ARGUMENTS], "choose one of --spot and --reserved."),
        ("tpu_vm", [*TPU, "--slices=two", *ARGUMENTS], "whole numbers from 1 on"),
        ("tpu_vm", [*TPU[:2], "--type=v2-8", TPU[3], *ARGUMENTS], "no runtime is known for --type=v2-8"),
        ("tpu_vm", [*TPU, "--config=x"], "unknown flag --config=x; arguments of user_llm.main come after --"),
        ("gke_xpk", GKE[1:], "--cluster is needed."),
        ("gke_xpk", [*GKE[:5], "--workdir=/tmp", *ARGUMENTS], "--workdir must be on gs://"),
        ("gpu", ["--hosts=2", *ARGUMENTS], "several hosts need --coordinator=HOST:PORT"),
        ("gpu", ["--slurm=2", "--index=1", *ARGUMENTS], "SLURM knows the hosts"),
        ("cpu_smoke", ["--devices=4", "--processes=3"], "4 devices cannot be shared evenly by 3 processes."),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_sentence(script, flags, message):
    done = _run(script, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ") and message in done.stderr and not done.stdout


def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", *map(str, SCRIPTS), ".ci/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
