"""Answers for people to read: with the latest events, and those that the user tokens look at."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_dataset, make_models

from user_llm.phases.kinds import TASKS
from user_llm.phases.samples import SHOWN, attended_titles, draw_samples


@pytest.fixture(scope="module")
def make_model(tmp_path_factory, make_timelines, drawn):
    return make_models(make_dataset(make_timelines), drawn, tmp_path_factory.mktemp("models"))


def test_samples_show_history_question_answer_and_what_was_looked_at(make_model):
    asking = make_model("cross").asking
    timelines, titles = asking.data.timelines, asking.data.timelines.catalogue.titles
    samples = draw_samples(asking, TASKS, "m", 2)
    assert [(sample["task"], sample["method"]) for sample in samples] == [("next_item", "m")] * 2 + [("favorite", "m")] * 2
    users, ends = asking.data.split.targets["test"]
    for sample, user, end in zip(samples[:2], users, ends, strict=False):
        latest = [titles[item] for item in timelines.items(int(user), 0, int(end))][::-1][:SHOWN]
        assert sample["user"] == user and sample["history"] == latest
        assert sample["wanted"] == titles[timelines.items(int(user), int(end), int(end) + 1)[0]]
        assert len(sample["answer"].split("; ")) == 5 and "Next:" in sample["prompt"]
        weights = [weight for _, _, weight in sample["attended"]]
        assert weights == sorted(weights, reverse=True) and 0 < sum(weights) <= 1 + 1e-5
        for title, ago, _ in sample["attended"]:
            assert title == titles[timelines.items(int(user), int(end) - ago, int(end) - ago + 1)[0]]


def test_without_a_resampler_nothing_was_looked_at(make_model):
    asking = make_model("titles").asking
    users, ends = asking.data.split.targets["test"]
    assert attended_titles(asking, users, ends) == [[] for _ in users]
