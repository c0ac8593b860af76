"""The `:synthetic` variants, shrunk: from a generated world in each layout to the results of every task."""

import json
import sys
from pathlib import Path

import pytest
from etils import epath

from user_llm import main
from user_llm.common.metrics import read_metrics
from user_llm.config import experiments
from user_llm.phases.kinds import TASKS

sys.path.insert(0, str(Path(__file__).parent))

from served import check_served
from tiny_quickstart import one_device, tiny_config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["google_local_xattn", "events_xattn", "amazon_softprompt"])  # each dataset and each injection
def test_synthetic_variants_run_and_measure_every_task(tmp_path, name):
    dataset, kind = name.rsplit("_", 1)
    config = tiny_config(experiments.experiment(dataset, kind, "synthetic"))
    config.phases = ("pretrain_encoder", "user_llm")  # the other phases are the quick start's (`test_main.py`)
    config.user_llm.load = ((r".*", "fresh"),)
    asked = {task for task in TASKS if config.user_llm.prompts[task].weight}
    assert ("review" in asked) == (dataset != "events")
    config.user_llm.eval.review_users = 8
    config.user_llm.loop.total_steps = 8  # each task has its turns
    with one_device():
        rows = main.run(config, epath.Path(tmp_path / "run"))
    assert all(0 <= row["value"] <= 1 or row["metric"].startswith("log_likelihood") for row in rows)
    method = config.user_llm.method
    found = {(row["task"], row["metric"]) for row in rows if row["method"] == method}
    assert {
        (task, f"{name}/{control}") for task, name in found if "/" not in name for control in ("random_user", "no_user")
    } <= found
    metric = {"next_item": "recall@10", "favorite": "accuracy", "favorite_future": "accuracy", "review": "rouge1"}
    assert {(task, metric[task]) for task in asked} <= found
    losses = {
        key
        for line in read_metrics(tmp_path / "run" / "user_llm" / "metrics.jsonl")
        for key in line
        if key.endswith("text_loss")
    }
    assert losses == {f"{task}/text_loss" for task in asked}
    if "favorite" in asked:
        by_method = {row["method"]: row["value"] for row in rows if row["task"] == "favorite"}
        assert by_method["counting"] == 1 and by_method["majority"] < 1
    check_served(tmp_path / "run", config, tmp_path / "elsewhere")
    samples = json.loads((tmp_path / "run" / "user_llm" / "samples.json").read_text())
    assert {sample["task"] for sample in samples} == asked and all(sample["wanted"] for sample in samples)
    assert all(sample["answer"] for sample in samples if sample["task"] != "review")  # nothing is a review, too
