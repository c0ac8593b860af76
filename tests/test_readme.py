"""What README.md shows of using a model runs as it stands there."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from etils import epath

from user_llm import main

sys.path.insert(0, str(Path(__file__).parent))

from tiny_quickstart import one_device, tiny_config

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_code_of_use_it_runs_on_a_quick_start(tmp_path, monkeypatch, capsys):
    config = tiny_config()
    config.phases = ("pretrain_encoder", "user_llm")
    config.user_llm.load = ((r".*", "fresh"),)
    run = tmp_path / "run"
    with one_device():
        main.run(config, epath.Path(run))
    shutil.copytree(run / "user_llm" / "model", tmp_path / "runs" / "quickstart" / "user_llm" / "model")
    shutil.rmtree(run)
    [code] = re.findall(r"## Use it\n.*?```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 6 and re.fullmatch(r"\d+ .+ \(\d{4}\) -?[\d.]+", lines[0])
