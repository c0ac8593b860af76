"""Transitions in a model directory: it serves the rankings that were measured, keeps their weight, and grows with added items."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_directories import FACTS, refused, seal, settings_of
from tiny_models import EVERYWHERE, Made

import user_llm
from user_llm.common import mesh as meshes
from user_llm.config.defaults import contextualize
from user_llm.config.phases import ContextualEval
from user_llm.data.splits import train_counts
from user_llm.evals.transitions import best_weight
from user_llm.models.export import TRANSITIONS_FILE
from user_llm.models.transitions import Transitions
from user_llm.serving import artifact
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.user import User
from user_llm.tasks import next_item
from user_llm.tasks.asking import Asking
from user_llm.tasks.controls import no_user

TASK = "next_item"
SIZES = ContextualEval(**contextualize("m", total_steps=1, eval_steps=1).eval)


@pytest.fixture(scope="module")
def made(make_model) -> Made:
    return make_model("cross")


@pytest.fixture(scope="module")
def asking(made) -> Asking:
    """The model with transitions, which are heard above its drawn parameters."""
    return made.asking.with_transitions(TASK, (3.0,), None)


def save(made: Made, asking: Asking, directory: Path) -> Personalizer:
    """Write the model of `asking`, and return it as it is read back."""
    how = artifact.Making(None, True, made.directory, EVERYWHERE, "float32", asking.data.train_counts, FACTS)
    artifact.save(directory, dataclasses.replace(made.written, identity="", predictor=asking.predictor), how)
    return user_llm.load(directory)


@pytest.fixture(scope="module")
def model(made, asking, tmp_path_factory) -> Personalizer:
    return save(made, asking, tmp_path_factory.mktemp("transitions") / "model")


def served_ranks(made: Made, model: Personalizer, seen: bool) -> np.ndarray:
    """Return the places of the test targets in the rankings of users that the model reads as raw events."""
    timelines, split = made.timelines, made.asking.data.split
    counts, out = train_counts(timelines, split), []
    for user, end in zip(*split.targets["test"], strict=True):
        target = int(timelines.items(user, end, end + 1)[0])
        ranking = [item.id for item in model.recommend(model.encode(made.rows(user, end)), 100, seen=seen)]
        key = timelines.catalogue.keys[target]
        out.append(1.0 + ranking.index(key) if key in ranking and counts[target] else np.inf)
    return np.array(out)


def test_the_model_serves_what_was_measured(made, asking, model):
    alone, both = next_item.measure(asking, TASK, "test", None, SIZES)
    assert (alone.suffix, both.suffix) == ("", "+transitions")
    np.testing.assert_allclose(both.measured.values["mrr"], 1 / served_ranks(made, model, True))
    np.testing.assert_allclose(both.measured.values["mrr/unseen"], 1 / served_ranks(made, model, False))
    [head] = next_item.measure(made.asking, TASK, "test", None, SIZES)
    assert head.measured.metrics == alone.measured.metrics
    assert (alone.measured.values["mrr"] != both.measured.values["mrr"]).any()
    users, ends = made.asking.data.split.targets["test"]
    for shown, user, end in zip(next_item.show(asking, TASK, users, ends), users, ends, strict=True):
        assert shown == "; ".join(item.title for item in model.recommend(model.encode(made.rows(user, end)), 5))


def test_a_stored_user_and_a_batch_of_users_are_ranked_alike(made, model):
    users = model.encode_many([row for user in range(5) for row in made.rows(user)])
    nobody = model.encode([])
    for user, ranking in zip([*users.values(), nobody], model.recommend_many([*users.values(), nobody], 9), strict=True):
        stored = User.from_bytes(user.to_bytes())
        assert stored.items.tolist() == user.items.tolist()
        np.testing.assert_allclose(
            [item.score for item in model.recommend(user, 9)], [item.score for item in ranking], atol=1e-5
        )


def test_what_may_be_recommended_is_said_by_ids(made, model):
    user = model.encode(made.rows(1))
    every = [item.id for item in model.recommend(user, 100)]
    had = {row["item"] for row in made.rows(1)}
    assert [item.id for item in model.recommend(user, 100, seen=False)] == [one for one in every if one not in had]
    assert [item.id for item in model.recommend(user, 100, deny=every[:2])] == every[2:]
    assert [item.id for item in model.recommend(user, candidates=every[-2:])] == every[-2:]


def test_the_validation_targets_are_scored_once_for_all_weights(made, monkeypatch):
    score, calls = Asking.score, []
    monkeypatch.setattr(Asking, "score", lambda self, *about: calls.append(1) or score(self, *about))
    made.asking.rank(TASK, "validation", None)
    once = len(calls)
    weights = (0.0, 0.5, 3.0)
    chosen = made.asking.with_transitions(TASK, weights, None).predictor.transitions
    assert once > 0 and len(calls) == 2 * once
    each = [made.asking.rank_sums(TASK, "validation", None, chosen, [weight])[0] for weight in weights]
    assert chosen.weight == best_weight(weights, each)


def test_where_nothing_is_to_be_added_nothing_is_kept(made, make_model):
    """Without weights, without an item head, and where the weight is 0: then no row says that transitions were added."""
    assert made.asking.with_transitions(TASK, (), None) is made.asking
    assert made.asking.with_transitions(TASK, (0.0,), None) is made.asking
    assert [found.suffix for found in next_item.measure(made.asking, TASK, "test", None, SIZES)] == [""]
    titles = make_model("written").asking
    assert titles.with_transitions(TASK, (1.0,), None) is titles


def test_another_weight_is_another_model_and_a_file_that_is_gone_is_missed(made, asking, model, tmp_path):
    other = save(made, made.asking.with_transitions(TASK, (1.0,), None), tmp_path / "model")
    assert len({other.identity, model.identity, user_llm.load(made.directory).identity}) == 3
    with pytest.raises(ValueError, match="encode their events again"):
        other.recommend(model.encode(made.rows(1)))
    settings = settings_of(tmp_path / "model")
    del settings["files"][TRANSITIONS_FILE]
    (tmp_path / "model" / TRANSITIONS_FILE).unlink()
    seal(tmp_path / "model", settings)
    refused(tmp_path / "model", f"{TRANSITIONS_FILE} is missing")


def test_added_items_are_recommended_and_saved(made, model, tmp_path):
    user = model.encode(made.rows(1))
    before = model.recommend(user, 9)
    grown = model.add_items([{"id": "new", "title": "A new film", "genres": ["Drama", "War"]}])
    again = grown.recommend(user, 9, deny=["new"])
    assert [item.id for item in again] == [item.id for item in before]
    np.testing.assert_allclose([item.score for item in again], [item.score for item in before], atol=1e-5)
    more = grown.update(user, [{"item": "new", "rating": 5, "timestamp": 10**6}])
    grown.save(tmp_path / "grown")
    loaded = user_llm.load(tmp_path / "grown")
    for one in (user, more):
        ranking = grown.recommend(one, 10)
        assert "new" in {item.id for item in ranking}
        assert loaded.recommend(one, 10) == ranking


def test_controls_take_the_last_items_of_the_history_that_is_given(made, asking):
    """Without a history the transitions rank by popularity."""
    users, ends = asking.data.split.targets["test"]
    alone = dataclasses.replace(asking, whose=no_user(users))
    for _, batch in asking.batches(users, ends):
        popular = alone.predictor.transitions.sums(
            meshes.fetch(alone.score(TASK, batch)), np.zeros((len(batch.users), 2), np.int32), [3.0]
        )
        np.testing.assert_array_equal(alone.ranked(TASK, batch), popular[0])


@pytest.mark.slow
def test_eight_devices_rank_as_one_does(asking, mesh_of):
    predictor, mesh = asking.predictor, mesh_of(4, 1, 2)
    params = jax.device_put(meshes.fetch(predictor.params), meshes.shardings(EVERYWHERE, predictor.params, mesh))
    spread = asking.of(dataclasses.replace(predictor, mesh=mesh, params=params))
    weights = (0.0, 1.0)
    for part in ("validation", "test"):
        with jax.set_mesh(mesh):
            found = spread.rank_sums(TASK, part, None, predictor.transitions, weights)
        for one, other in zip(found, asking.rank_sums(TASK, part, None, predictor.transitions, weights), strict=True):
            np.testing.assert_array_equal(one.everything, other.everything)
            np.testing.assert_array_equal(one.unseen, other.unseen)


def test_a_user_keeps_the_last_two_items(made, model):
    assert model.keep == max(model.predictor.max_events, 2)
    reads_less = dataclasses.replace(model.predictor, max_events=1)
    assert dataclasses.replace(model, predictor=reads_less).keep == 2
    assert dataclasses.replace(model, predictor=dataclasses.replace(reads_less, transitions=None)).keep == 1
    assert isinstance(model.predictor.transitions, Transitions)
