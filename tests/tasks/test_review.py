"""What is measured of reviews, with a writer whose answers are known."""

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_dataset

from user_llm.config.defaults import contextualize
from user_llm.config.phases import ContextualEval
from user_llm.data.prompts.base import Lines, Question
from user_llm.data.splits import leave_last_out
from user_llm.data.tokenizer import train_bpe
from user_llm.tasks import review

STYLES = ["so good, wow!!!", "a competent instalment", "dull dull dull", "watched it with mum", "12/10 masterpiece"]


@pytest.fixture(scope="module")
def asking(make_timelines, tmp_path_factory):
    """Each user writes in a style of their own; a writer copies the style of the user whose history it reads."""
    timelines = make_dataset(make_timelines)
    users = np.repeat(np.arange(len(timelines.lengths)), timelines.lengths)
    texts = np.array([f"{STYLES[user]} {event % 3}" for event, user in enumerate(users)], np.dtypes.StringDType())
    timelines = dataclasses.replace(timelines, columns={**timelines.columns, "review": texts})
    tokenizer = train_bpe([*STYLES, *timelines.catalogue.titles[1:]], 300, tmp_path_factory.mktemp("bpe") / "tokenizer")
    lines = Lines(tokenizer, timelines.catalogue, max_title_tokens=20, history="titles", text_items=0)
    question = Question(lines, instruction="", question="On {title}, rated {rating}:", max_tokens=200, max_target_tokens=20)
    asked = review.ReviewExamples(question, timelines, leave_last_out(timelines), column="review")

    def write(name, most, users, ends):
        assert most == 20
        return [STYLES[user] for user in users]

    likelihood = lambda name, most, users, ends: -np.arange(len(users), dtype=float)  # noqa: E731
    return SimpleNamespace(examples={"review": asked}, write=write, likelihood=likelihood)


def test_a_writer_in_the_style_of_its_user_is_near_its_user(asking):
    sizes = ContextualEval(**contextualize("m", total_steps=1, eval_steps=1).eval)
    [found] = review.measure(asking, "review", "test", None, sizes)
    assert set(review.METRICS) <= set(found.measured.values) and set(found.together) == {"chrf/corpus", "bleu/corpus"}
    assert found.measured.values["nearer_to_author"].tolist() == [1] * 5
    assert found.measured.values["log_likelihood"].tolist() == [0, -1, -2, -3, -4]
    assert (found.measured.values["chrf"] > 0.5).all()

    astray = SimpleNamespace(**vars(asking) | {"write": lambda name, most, users, ends: ["zzz"] * len(users)})
    [nothing] = review.measure(astray, "review", "test", None, sizes)
    assert nothing.measured.values["nearer_to_author"].tolist() == [0.5] * 5 and not nothing.measured.values["rouge1"].any()
    [few] = review.measure(asking, "review", "test", 2, dataclasses.replace(sizes, review_users=3))
    assert len(few.measured) == 2


def test_bert_score_is_measured_on_the_test_part_alone(asking, monkeypatch):
    monkeypatch.setattr(review.texts, "bert_score", lambda targets, written, model: {model: np.ones(len(targets))})
    sizes = dataclasses.replace(ContextualEval(**contextualize("m", total_steps=1, eval_steps=1).eval), bert_score="scorer")
    measured = {part: review.measure(asking, "review", part, None, sizes)[0].measured.values for part in ("validation", "test")}
    assert "scorer" in measured["test"] and set(measured["test"]) - {"scorer"} == set(measured["validation"])


def test_the_texts_of_a_user_are_those_before_an_end(asking):
    assert asking.examples["review"].texts(1, 2) == [f"{STYLES[1]} 0", f"{STYLES[1]} 1"]
    assert asking.examples["review"].texts(1, 0) == []


def test_the_texts_that_are_compared_are_the_latest(asking, monkeypatch):
    monkeypatch.setattr(review, "LATEST", 2)
    assert asking.examples["review"].texts(1, 5) == [f"{STYLES[1]} 0", f"{STYLES[1]} 1"]


def test_a_user_alone_is_not_compared_with_nobody(asking):
    sizes = ContextualEval(**contextualize("m", total_steps=1, eval_steps=1).eval)
    asked = copy.copy(asking.examples["review"])
    asked.split = dataclasses.replace(asked.split, targets={"test": (np.array([2]), np.array([10]))})
    alone = SimpleNamespace(**vars(asking) | {"examples": {"review": asked}})
    [found] = review.measure(alone, "review", "test", None, sizes)
    assert set(review.METRICS) - set(found.measured.values) == {"nearer_to_author"}
