"""What a finished phase says of its model: whether the LLM is still the checkpoint's, its licence, its metrics with intervals."""

import numpy as np
import pytest
from etils import epath

from user_llm.config import experiments
from user_llm.config.reader import read_config
from user_llm.evals.measured import Measured
from user_llm.phases import leaving
from user_llm.phases.run import Run


@pytest.mark.parametrize(
    ("strategy", "llm", "touched"),
    [("full", "checkpoint", True), ("lora", "checkpoint", False), ("enc", "checkpoint", False), ("enc", "pretrain_lm", True)],
)
def test_an_llm_is_the_checkpoints_if_nothing_trained_it_or_came_from_elsewhere(strategy, llm, touched, tmp_path, mesh_of):
    config = experiments.experiment("movielens", "xattn", "small")
    config.user_llm.strategy = strategy
    run = Run(read_config(config), epath.Path(tmp_path), mesh_of())
    blocks = {"attn": {"q": llm, "lora": {"q": {"a": "fresh"}}}}
    sources = {"decoder": {"embed": llm, "stack": {"blocks": blocks, "cross": {"gate": "fresh"}}}, "item_head": "fresh"}
    assert leaving.touched("user_llm", run, sources) is touched


@pytest.mark.parametrize(
    ("page", "licence"),
    [("---\nlicense: apache-2.0\ntags:\n---\n", "apache-2.0"), ("license:   mit  \n", "mit"), ("No word.\n", ""), (None, "")],
)
def test_the_licence_is_what_the_page_of_the_llm_says(page, licence, tmp_path):
    if page is not None:
        (tmp_path / "README.md").write_text(page)
    assert leaving.licence(tmp_path) == licence


def test_rows_of_a_card_have_their_intervals():
    users = np.arange(400)
    half, never = (users % 2).astype(float), np.zeros(400)
    rows = leaving.card_rows("next_item", "m", Measured(users, users, {"recall@10": half, "mrr": never}))
    first, second = rows
    assert (first["metric"], first["value"], first["n"]) == ("recall@10", 0.5, 400)
    low, high = first["interval"]
    assert 0.44 < low < 0.5 < high < 0.56 and second["interval"] == [0.0, 0.0]
