"""Imports go down only: a file may import lower floors and its own room, never a sibling room or an upper floor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "common": 0,
    "config": 0,
    "data": 1,
    "nn": 1,
    "models": 2,
    "training": 3,
    "evals": 3,
    "serving": 4,
    "serve": 5,
    "tasks": 5,
    "report": 5,
    "phases": 6,
    "ahead": 7,
}
TOP = dict.fromkeys(("main", "experiment", "encode", "export", "recommend"), 8)  # single files, one room together
FILES = sorted(path.relative_to(ROOT) for path in ROOT.glob("user_llm/**/*.py"))
CONFIGS = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*.py"))


def imported(source: str) -> set[str]:
    """Return the modules that a source imports anywhere, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str:
    """Return `nn` of user_llm.nn.losses.soft_cross_entropy, `top` of user_llm.main."""
    name = module.split(".")[1]
    return "top" if name in TOP else name


def faults(module: str, source: str) -> list[str]:
    """Return the imports that `module` may not have."""
    floors = FLOORS | {"top": 8}
    own = room(module)
    found = []
    for name in sorted(imported(source)):
        root = name.split(".")[0]  # empty if relative
        if root == "user_llm":
            allowed = room(name) == own or floors[room(name)] < floors[own]
        else:
            allowed = root not in ("", "configs", "tests")
        if not allowed:
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_only(path):
    module = ".".join(path.with_suffix("").parts)
    if path.name == "__init__.py":
        assert len(path.parts) == 2 or not imported((ROOT / path).read_text()), "packages are empty but the front door"
    else:
        assert not faults(module, (ROOT / path).read_text())


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_configs_import_next_to_nothing(path):
    for name in imported((ROOT / path).read_text()):
        root = name.split(".")[0]
        assert name.startswith("user_llm.config.") or root == "ml_collections" or root in sys.stdlib_module_names


def test_the_front_door_imports_nothing_and_opens_at_the_first_name():
    """What `import user_llm` loads, and how long that takes, is of no concern to a program that may never use a model."""
    code = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import user_llm
seconds = time.perf_counter() - start
assert seconds < 0.3, seconds
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert loaded == {"user_llm"}, loaded
assert dir(user_llm) == sorted(user_llm.__all__), dir(user_llm)
assert all(getattr(user_llm, name) for name in user_llm.__all__) and "jax" in sys.modules
try:
    user_llm.lode
except AttributeError as error:
    assert "no attribute 'lode'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_file_has_a_floor():
    assert {room(".".join(path.with_suffix("").parts)) for path in FILES if len(path.parts) > 2} == set(FLOORS)
    assert {path.stem for path in FILES if len(path.parts) == 2} == set(TOP) | {"__init__"}


@pytest.mark.parametrize(
    ("module", "line", "bad"),
    [
        ("user_llm.nn.losses", "from user_llm.data import schema", True),  # a sibling room
        ("user_llm.nn.losses", "from user_llm.models.decoder import Decoder", True),  # above
        ("user_llm.nn.losses", "from .attention import attention", True),
        ("user_llm.training.loop", "import user_llm.evals.ranking", True),
        ("user_llm.phases.run", "from user_llm import main", True),
        ("user_llm.main", "from configs import quickstart", True),
        ("user_llm.nn.losses", "def f():\n    from user_llm.phases import run", True),  # however deep
        ("user_llm.nn.losses", "from user_llm.nn.attention import attention\nfrom user_llm.common import trees", False),
        ("user_llm.main", "from user_llm.report.build import write_report\nfrom user_llm import export", False),
    ],
)
def test_a_wrong_import_is_found(module, line, bad):
    assert bool(faults(module, line)) is bad
