"""Whose history a control reads, and what is measured with it."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_dataset, make_models, variants

from user_llm.config.defaults import contextualize
from user_llm.config.phases import ContextualEval
from user_llm.evals.measured import Measured
from user_llm.tasks import next_item
from user_llm.tasks.asking import random_users, title_trie
from user_llm.tasks.controls import measure_controls, no_user
from user_llm.tasks.task import Found

SIZES = ContextualEval(**contextualize("m", total_steps=1, eval_steps=1).eval)


@dataclasses.dataclass(frozen=True)
class Asked:
    examples: dict
    whose: dict | None = None


@pytest.mark.parametrize("count", [2, 3, 50])
def test_nobody_keeps_their_own_history_and_every_history_is_read_once(count):
    users, ends = 10 + 3 * np.arange(count), 100 + np.arange(count)
    whose = random_users(users, ends, seed=1)
    assert list(whose) != users.tolist() or count < 50  # drawn
    assert sorted(whose) == users.tolist() and sorted(whose.values()) == list(zip(users.tolist(), ends.tolist(), strict=True))
    assert all(user != other for user, (other, _) in whose.items())
    assert whose == random_users(users, ends, seed=1)
    if count == 50:
        assert whose != random_users(users, ends, seed=2)


def test_one_user_alone_has_no_other():
    assert random_users(np.array([4, 4]), np.array([2, 3]), seed=0) == {}
    assert no_user(np.array([4, 4])) == {4: (4, 0)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_control_draws_others_than_those_that_reviews_are_compared_with(seed):
    """Of 50 users at most a few have the same other user by chance."""
    users, ends = np.arange(50), np.full(50, 3)
    given = []

    task = SimpleNamespace(measure=lambda asking, *_: given.append(asking.whose) or [])
    asking = Asked({"t": SimpleNamespace(targets=lambda part: (users, ends))})
    measure_controls(task, asking, "t", [], SIZES, seed)
    compared = random_users(users, ends, seed=0)
    assert sum(given[0][user] == compared[user] for user in compared) < 10


@pytest.fixture(scope="module")
def make(make_timelines, drawn, tmp_path_factory):
    return make_models(make_dataset(make_timelines), drawn, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("variant", variants("cross", "titles"))
def test_a_control_answers_from_the_other_history_alone(make, variant):
    """The scores for a user who is given another's history are those of the other user, or those of a user without events."""
    asking = make(variant).asking
    users, ends = np.array([0, 1, 2, 3]), np.array([2, 7, 10, 4])
    own = _scores(asking, users, ends)
    circle = {0: (2, 10), 2: (1, 7), 1: (3, 4), 3: (0, 2)}
    swapped = _scores(dataclasses.replace(asking, whose=circle), users, ends)
    np.testing.assert_allclose(swapped, own[[2, 3, 1, 0]], atol=1e-5)
    assert np.abs(own[0] - own[2]).max() > 1e-3
    nobody = _scores(dataclasses.replace(asking, whose=no_user(users)), users, ends)
    np.testing.assert_allclose(nobody, _scores(asking, users, np.zeros(4, int)), atol=1e-5)
    np.testing.assert_allclose(nobody, nobody[[0]].repeat(4, axis=0), atol=1e-5)


def _scores(asking, users, ends):
    out = np.zeros((len(users), 128))
    with jax.set_mesh(asking.predictor.mesh):
        for indices, batch in asking.batches(users, ends):
            out[indices] = np.asarray(asking.score("next_item", batch))[: batch.count]
    return out[:, 1 : asking.data.timelines.schema.num_items + 1]


def test_each_metric_is_measured_again_on_the_first_users_with_each_control():
    users, ends = np.array([3, 5, 7]), np.array([1, 4, 6])

    def measure(asking, name, part, limit, sizes):
        """The metric is the end of the history that is read; the second way of answering has fewer users."""
        assert part == "test"
        ends_read = ends[:limit] if asking.whose is None else [asking.whose[user][1] for user in users[:limit]]
        read = np.array(ends_read, float)
        whole = Measured(users[:limit], ends[:limit], {"end": read, "end/unseen": read})
        return [Found(whole), Found(whole.first(sizes.generate_users), "/generate")]

    task = SimpleNamespace(measure=measure)
    asking = Asked({"t": SimpleNamespace(targets=lambda part: (users, ends))})
    sizes = dataclasses.replace(SIZES, control_users=2, generate_users=1)
    own = measure(asking, "t", "test", None, sizes)
    whole, written = measure_controls(task, asking, "t", own, sizes, seed=0)
    assert {name: values.tolist() for name, values in whole.measured.values.items()} == {
        "end": [1, 4], "end/random_user": [4, 1], "end/no_user": [0, 0],
    }  # fmt: skip
    assert whole.measured.users.tolist() == [3, 5] and whole.suffix == ""
    assert {name: values.tolist() for name, values in written.measured.values.items()} == {
        "end": [1], "end/random_user": [4], "end/no_user": [0],
    }  # fmt: skip
    assert written.suffix == "/generate"
    assert measure_controls(task, asking, "t", own, dataclasses.replace(sizes, control_users=0), seed=0) == []
    [alone, _] = measure_controls(task, asking, "t", own, dataclasses.replace(sizes, control_users=1), seed=0)
    assert set(alone.measured.values) == {"end", "end/no_user"}


def test_controls_take_the_weight_that_was_settled_with_everybodys_own_history(make):
    """The users of the validation part are others than those of the test part, as in a split by time."""
    asking = make("cross").asking
    targets = {"validation": (np.array([0, 3]), np.array([1, 3])), "test": (np.array([1, 2, 4]), np.array([7, 10, 6]))}
    split = dataclasses.replace(asking.data.split, targets=targets)
    asked = next_item.NextItemExamples(asking.examples["next_item"].template, asking.data.timelines, split)
    data = dataclasses.replace(asking.data, split=split)
    asking = dataclasses.replace(asking, data=data, examples={"next_item": asked})
    sizes = dataclasses.replace(SIZES, generate_users=3, guide=(0.2, 0.8), rerank=0)
    before = title_trie.cache_info().misses
    with jax.set_mesh(asking.predictor.mesh):
        settled = next_item.TASK.settle(asking, "next_item", sizes)
        assert set(settled.guide) < set(sizes.guide) and dataclasses.replace(settled, guide=sizes.guide) == sizes
        own = next_item.TASK.measure(asking, "next_item", "test", None, settled)
        found = measure_controls(next_item.TASK, asking, "next_item", own, settled, seed=0)
    assert title_trie.cache_info().misses - before <= 1  # the titles are put into a trie once
    assert [one.suffix for one in found] == ["", "/generate", "/generate_guided"]
    assert all({"recall@10/random_user", "recall@10/no_user"} <= set(one.measured.values) for one in found)
