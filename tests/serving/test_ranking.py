"""Rankings: which items may stand in them, and what their scores are."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_directories import settings_of

import user_llm
from user_llm.config.defaults import contextualize
from user_llm.config.phases import ContextualEval
from user_llm.models.beam_search import beam_search
from user_llm.serving.predictor import Predictor
from user_llm.serving.settings import identity
from user_llm.tasks import next_item


def test_what_may_be_recommended_is_said_by_ids(made, model):
    user = model.encode(made.rows(1))
    every = {item.id for item in model.recommend(user, 100)}
    had = {row["item"] for row in made.rows(1)}
    assert had & every
    assert not {item.id for item in model.recommend(user, 100, seen=False)} & had
    assert [item.id for item in model.recommend(user, 5, allow=["10", "20"])] == [
        item.id for item in model.recommend(user, 100) if item.id in ("10", "20")
    ]
    assert "10" not in {item.id for item in model.recommend(user, 100, deny=["10"])}
    assert model.recommend(user, candidates=[]) == [] == model.recommend(user, allow=np.array([], str))
    last = [item.id for item in model.recommend(user, 100)][-2:]
    assert {item.id for item in model.recommend(user, candidates=last)} == set(last)  # whatever their ranks are
    assert len(model.recommend(user, 3, seen=False)) == 3
    top = model.recommend(user, 1)[0]
    assert top.title == dict(zip(made.timelines.catalogue.keys, made.timelines.catalogue.titles, strict=True))[top.id]


@pytest.mark.slow
def test_a_model_without_item_head_scores_items_by_the_log_probability_of_their_titles(make_model):
    """What beam search finds is what `score` says of the same titles after the same prompt."""
    made = make_model("written")
    model = user_llm.load(made.directory)
    user = model.encode(made.rows(1))
    ranking = model.recommend(user, 4)
    scores = model.score("Next:\n", [f"{item.title}\n" for item in ranking], user)
    np.testing.assert_allclose([item.score for item in ranking], scores, atol=1e-4)


@pytest.mark.slow
def test_a_model_without_item_head_compiles_few_programs(make_model):
    """They do not depend on which items are allowed, and there are few numbers of beams; an allowed item keeps its score."""
    made = make_model("written")
    model = user_llm.load(made.directory)
    user = model.encode(made.rows(1))
    keys = made.timelines.catalogue.keys[1:]
    every = {item.id: item.score for item in model.recommend(user, len(keys))}  # exact, with as many beams as titles
    assert set(every) == set(keys)
    before = beam_search._cache_size()
    for k in range(1, len(keys), 3):
        model.recommend(user, k)
    for count in range(1, len(keys), 4):
        found = model.recommend(user, len(keys), allow=keys[-count:], deny=keys[-1:])
        assert [item.id for item in found] == [key for key in every if key in keys[-count:-1]]
        np.testing.assert_allclose([item.score for item in found], [every[item.id] for item in found], atol=1e-4)
    sizes = len({min(model.predictor.beams << power, len(keys)) for power in range(10)})
    assert beam_search._cache_size() - before < sizes  # the largest has been compiled before


def test_beams_are_no_more_than_what_is_asked_for_and_allowed(make_model, monkeypatch):
    """What users have seen adds no beams: one program answers whether or not it is left out."""
    made = make_model("written")
    model = made.written
    users = [model.encode(made.rows(number)) for number in (1, 2)]
    chosen = []

    def choose(self, task, prompts, user, trie, beams, guide):
        chosen.append((beams, np.isfinite(guide)))
        return np.zeros((len(prompts), beams), np.int32), np.full((len(prompts), beams), -np.inf, np.float32)

    monkeypatch.setattr(Predictor, "choose", choose)
    predictor = dataclasses.replace(model.predictor, beams=2)
    model = dataclasses.replace(model, predictor=predictor)
    model.recommend_many(users, 2)
    model.recommend_many(users, 2, seen=False)
    model.recommend(users[0], 1000, allow=["10", "20"])
    assert [beams for beams, _ in chosen] == [2, 2, 2]
    assert chosen[0][1].shape[0] == chosen[2][1].shape[0] == 1 and chosen[2][1].sum() == 2
    for row, user in zip(chosen[1][1], users, strict=True):
        assert not row[user.seen].any() and row.sum() == chosen[0][1].sum() - len(set(user.seen))


def test_the_head_and_the_writing_rank_together(made):
    """Ten titles are all of them, which the head ranks as it ranks items; where it alone guides, the three best are its own."""
    asking = made.asking.of(dataclasses.replace(made.asking.predictor, beams=3))
    sizes = ContextualEval(**contextualize("m", total_steps=1, eval_steps=1).eval)
    weights = dataclasses.replace(sizes, generate_users=5, guide=(0.0, 0.5, 1.0), rerank=10)
    sizes = next_item.settle(asking, "next_item", weights)
    found = {one.suffix: one.measured.metrics for one in next_item.measure(asking, "next_item", "test", None, sizes)}
    if not asking.predictor.ranks:
        assert sizes == weights and set(found) == {"/generate"}
        return
    assert set(found) == {"", "/generate", "/generate_guided", "/generate_reranked"}
    assert found["/generate_reranked"] == found[""]
    assert [one.suffix for one in next_item.measure(asking, "next_item", "validation", None, sizes)] == [""]
    head = asking.rank("next_item", "test", None)
    guided = asking.rank_written("next_item", "test", None, weight=1.0)
    np.testing.assert_array_equal(guided.everything, np.where(head.everything <= 3, head.everything, np.inf))
    of_weight = {w: asking.rank_written("next_item", "validation", 5, weight=w).metrics()["ndcg@10"] for w in weights.guide}
    assert [of_weight[weight] for weight in sizes.guide] == [max(of_weight.values())]


def test_the_softmax_within_the_trie_is_the_models_own(make_model):
    """Its identity says so; titles written by it have probabilities that sum to 1."""
    made = make_model("written")
    within = dataclasses.replace(made.written, predictor=dataclasses.replace(made.written.predictor, trie_softmax=True))
    user = within.encode(made.rows(1))
    scores = {item.id: item.score for item in within.recommend(user, 9)}
    assert np.exp(list(scores.values())).sum() == pytest.approx(1, abs=1e-5)
    # Of some items: the probabilities that they have among all, and none beside them.
    some = within.recommend(user, candidates=list(scores)[2:5])
    assert [item.id for item in some] == list(scores)[2:5]
    np.testing.assert_allclose([item.score for item in some], list(scores.values())[2:5], atol=1e-5)
    settings = settings_of(made.directory)
    assert identity(settings) == settings["identity"]
    settings["limits"]["trie_softmax"] = True
    assert identity(settings) != settings["identity"]
