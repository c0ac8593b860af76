"""Rankings: which items may stand in them, and what their scores are."""

import numpy as np
import pytest

import user_llm
from user_llm.models.beam_search import beam_search


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
