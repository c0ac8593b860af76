"""A model out of its directory: what it answers is what evaluation inside a run measures, for users it has never seen."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import variants

from user_llm.serving.user import User
from user_llm.tasks.favorite import best_classes


@pytest.mark.parametrize("made", variants("cross", "titles"), indirect=True)
def test_a_ranking_is_the_one_that_evaluation_has(made, model):
    """Of every test user, from raw events in any order, one at a time and all together."""
    users, ends = made.asking.data.split.targets["test"]
    every = made.timelines.catalogue.keys[1:]
    rows = [row for user, end in zip(users, ends, strict=True) for row in made.rows(user, end)]
    together = model.encode_many(rows[::-1])
    for indices, batch in made.asking.batches(users, ends):
        if model.predictor.ranks:
            expected = np.asarray(made.asking.score("next_item", batch))
        for place, index in enumerate(indices):
            user, end = int(users[index]), int(ends[index])
            for known in (model.encode(made.rows(user, end)[::-1]), together[made.timelines.user_keys[user]]):
                ranking = model.recommend(known, candidates=every)
                scores = {item.id: item.score for item in ranking}
                assert [item.score for item in ranking] == sorted(scores.values(), reverse=True)
                if model.predictor.ranks:
                    assert len(ranking) == len(every)
                    np.testing.assert_allclose([scores[key] for key in every], expected[place, 1:10], atol=1e-5)
                else:
                    titles = made.asking.choose("next_item", batch, model.ranker.titles, 10)[place]
                    assert [item.id for item in ranking] == [every[n - 1] for n in titles if n]


def test_a_favorite_is_the_one_that_evaluation_has(made, model):
    users, ends = made.asking.examples["favorite"].targets("test")
    best = best_classes(made.asking, "favorite", users, ends)
    known = [model.encode(made.rows(int(user), int(end))) for user, end in zip(users, ends, strict=True)]
    names = made.timelines.catalogue.vocab["genres"]
    assert model.generate_many([None] * len(known), known, task="favorite") == [names[n] for n in best]


def test_a_user_without_events_is_answered_as_by_the_bare_llm(made, model):
    nobody = model.encode([])
    assert (nobody.count, nobody.last_time, len(nobody.tokens)) == (0, None, 0)
    assert model.generate("Next:", nobody, max_tokens=6) == model.generate("Next:", max_tokens=6)
    np.testing.assert_array_equal(model.score("Next:", ["Film", "x"], nobody), model.score("Next:", ["Film", "x"]))
    assert len(model.recommend(nobody, 3)) == 3


def test_stored_bytes_answer_as_the_user_does(made, model):
    user = model.encode(made.rows(2))
    again = User.from_bytes(user.to_bytes())
    scores = [{item.id: item.score for item in model.recommend(one, 100)} for one in (user, again)]
    assert scores[0].keys() == scores[1].keys() or not model.predictor.ranks
    if model.predictor.ranks:
        spread = max(scores[0].values()) - min(scores[0].values())
        assert max(abs(scores[0][key] - scores[1][key]) for key in scores[0]) < 0.05 * spread
    np.testing.assert_array_equal(model.update(again, made.rows(2)).tokens, user.tokens)


def test_what_does_not_fit_is_one_sentence(made, model):
    user = model.encode(made.rows(1))
    other = dataclasses.replace(user, model="another")
    for call, message in (
        (lambda: model.recommend(other), "encoded by the model another"),
        (lambda: model.update(other, []), "encoded by the model another"),
        (lambda: model.generate("x", other), "encoded by the model another"),
        (lambda: model.recommend(made.rows(1)), "list is no user"),
        (lambda: model.recommend(user, 0), "k=0 must be at least 1"),
        (lambda: model.recommend(user, 2.0), "k=2.0 must be a whole number"),
        (lambda: model.recommend(user, "3"), "k='3' must be a whole number"),
        (lambda: model.recommend(user, True), "k=True must be a whole number"),
        (lambda: model.explain(user, 2.0), "k=2.0 must be a whole number"),
        (lambda: model.generate("x", max_tokens=2.5), "max_tokens=2.5 must be a whole number"),
        (lambda: model.generate("x", max_tokens=-1), "max_tokens=-1 must be at least 0"),
        (lambda: model.recommend(user, deny=["7777"]), "No item has the id '7777'"),
        (lambda: model.recommend(user, allow="10"), "'10' is one id: pass a list"),
        (lambda: model.recommend(user, allow=["10"], candidates=["10"]), "candidates or allow"),
        (lambda: model.explain(user, 0), "k=0 must be at least 1"),
        (lambda: model.update(user, made.rows(2)), "events are of another user"),
        (lambda: model.generate("x", stop="END"), "pass a list of texts"),
        (lambda: model.generate("x", stop=[""]), "pass a list of texts"),
        (lambda: model.score("x", "abc"), "'abc' is one text: pass a list"),
        (lambda: model.encode(made.rows(0) + made.rows(1)), "events of 2 users"),
        (lambda: model.update(user, made.rows(0) + made.rows(1)), "events of 2 users"),
        (lambda: model.encode([{"item": "10"}]), "timestamp"),
        (lambda: model.encode([{**made.rows(1)[0], "timestamp": "soon"}]), "row 1"),
        (lambda: model.generate(), "Give one of a prompt, a task and a chat"),
        (lambda: model.generate("x", task="favorite"), "Give one of a prompt, a task and a chat"),
        (lambda: model.generate(task="review"), "not trained for the task 'review', but for next_item, favorite"),
        (lambda: model.generate("x", temperature=-1), "temperature -1"),
        (lambda: model.generate(chat=[{"role": "user", "content": "Hi"}]), "no chat template"),
        (lambda: model.generate_many(["x"], [user, user]), "1 prompts for 2 users"),
        (lambda: model.score("x", [""]), "empty candidate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
