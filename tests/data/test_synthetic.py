"""The synthetic world's optimal predictor is exact, and knowing more of the history pays."""

import itertools
import re

import numpy as np
import pytest

from user_llm.data import synthetic
from user_llm.data.audits import audit
from user_llm.data.splits import leave_last_out, train_counts
from user_llm.data.synthetic import World, optimal_ranks, sample_histories
from user_llm.data.synthetic_words import FILMS, PLACES, PRODUCTS, Item


def tiny_world():
    """2 archetypes, 3 moods, 4 films, all probabilities drawn."""
    rng = np.random.default_rng(0)
    laws = {"emission": (3, 4), "taste": (2, 3), "rating": (2, 4, 5)}
    drawn = {name: rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]) for name, shape in laws.items()}
    return World([Item(title, ("Drama",), "Drama", title) for title in "ABCD"], **drawn, stay_mood=0.6, stay_archetype=0.8)


def enumerated(world, films, stars):
    """Return P(next film | history) by summing over all paths of hidden states, the one before the first film too."""
    archetypes, moods = world.taste.shape
    states = list(itertools.product(range(archetypes), range(moods)))

    def step(before, after):
        (a, m), (b, n) = before, after
        archetype = world.stay_archetype * (a == b) + (1 - world.stay_archetype) / archetypes
        return archetype * (world.stay_mood * (m == n) + (1 - world.stay_mood) * world.taste[b, n])

    total = np.zeros(len(world.items))
    for path in itertools.product(states, repeat=len(films) + 2):
        weight = world.taste[path[0]] / archetypes * np.prod([step(*pair) for pair in itertools.pairwise(path)])
        unseen = np.ones(len(world.items))
        for (archetype, mood), film, star in zip(path[1:-1], films, stars, strict=True):
            weight *= world.emission[mood, film] / (world.emission[mood] @ unseen)
            weight *= world.rating[archetype, film, star - 1]
            unseen[film] = 0
        picks = world.emission[path[-1][1]] * unseen
        total += weight * picks / picks.sum()
    return total / total.sum()


@pytest.mark.parametrize(("films", "stars"), [([], []), ([2], [1]), ([2, 0], [5, 3]), ([1, 3, 2], [4, 4, 1])])
def test_next_probabilities_equal_the_sum_over_hidden_paths(films, stars):
    world = tiny_world()
    np.testing.assert_allclose(world.next_probabilities(films, stars), enumerated(world, films, stars), rtol=1e-10)


def test_samples_follow_the_predictor():
    world = tiny_world()
    films, stars = world.sample(np.full(60_000, 3), seed=1)
    first = np.bincount(films[:, 0], minlength=4) / len(films)
    np.testing.assert_allclose(first, world.next_probabilities([], []), atol=0.01)
    histories, counts = np.unique(np.hstack([films, stars])[:, [0, 1, 3, 4]], axis=0, return_counts=True)
    history = histories[counts.argmax()]  # the commonest one
    alike = (np.hstack([films, stars])[:, [0, 1, 3, 4]] == history).all(1)
    found = np.bincount(films[alike, 2], minlength=4) / alike.sum()
    assert found[history[:2]].sum() == 0
    np.testing.assert_allclose(found, world.next_probabilities(history[:2], history[2:]), atol=2 / np.sqrt(alike.sum()))


def test_samples_never_repeat_and_end_where_they_should():
    lengths = np.array([3, 4, 1])
    films, stars = tiny_world().sample(lengths, seed=1)
    np.testing.assert_array_equal((films >= 0).sum(1), lengths)
    np.testing.assert_array_equal(films < 0, stars < 0)
    assert sorted(films[1]) == [0, 1, 2, 3]
    assert set(stars[films >= 0]) <= {1, 2, 3, 4, 5}


@pytest.fixture(scope="module")
def targets(small_world):
    """Validation and test targets together."""
    _, timelines = small_world
    split = leave_last_out(timelines)
    users, positions = (np.concatenate(arrays) for arrays in zip(*split.targets.values(), strict=True))
    return split, users, positions


def mean_recall(ranks):
    return np.mean(ranks <= 10)


def test_history_beats_popularity_and_long_history_the_last_ten(small_world, targets):
    world, timelines = small_world
    split, users, positions = targets
    optimal = optimal_ranks(world, timelines, users, positions)

    counts = train_counts(timelines, split)
    film = np.array([0, *map(int, timelines.catalogue.keys[1:])]) - 1
    popular, recent = np.empty(len(users)), np.empty(len(users))
    for row, (user, position) in enumerate(zip(users, positions, strict=True)):
        items = timelines.items(user, 0, position + 1)
        stars = timelines.columns["rating"][timelines.offsets[user] :][:position] // 2
        popularity = counts.astype(float)
        last_ten = world.next_probabilities(film[items[-11:-1]], stars[-10:])
        # What was seen is known to both, so that only taste makes the difference.
        popularity[items[:-1]], last_ten[film[items[:-1]]] = -1, 0
        popular[row] = 1 + np.sum(popularity > popularity[items[-1]])
        recent[row] = 1 + np.sum(last_ten > last_ten[film[items[-1]]])
    assert mean_recall(popular) < 0.2
    assert mean_recall(optimal) > 2.5 * mean_recall(popular)
    assert mean_recall(optimal) > mean_recall(recent) + 0.02
    assert mean_recall(recent) > mean_recall(popular) + 0.1


def test_ratings_tell_of_taste(small_world):
    world, _ = small_world
    names = list(FILMS.groups)
    liking = np.stack([world.taste[:, [names.index(g) for g in item.groups]].max(1) for item in world.items], axis=1)
    expected, liked = world.rating @ synthetic.RATINGS, liking > 0.25
    assert expected[liked].mean() > expected[~liked].mean() + 1


def test_the_written_world_is_a_sound_movielens(small_world):
    world, timelines = small_world
    facts = audit(timelines, leave_last_out(timelines))
    assert facts["users"] == 400
    assert facts["items"] <= 240
    assert (facts["shortest"], facts["longest"]) == (20, 60)
    assert facts["tie_share"] < 0.01
    assert facts["cold_test_share"] < 0.01
    for user, length in enumerate(timelines.lengths):
        assert len(set(timelines.items(user, 0, length))) == length
    for item, key in enumerate(timelines.catalogue.keys[1:], 1):
        film = int(key) - 1
        assert timelines.catalogue.titles[item] == world.items[film].title
        names = [timelines.catalogue.vocab["genres"][g] for g in timelines.catalogue.multi["genres"][item] if g]
        assert tuple(names) == world.items[film].groups


@pytest.mark.parametrize("domain", [FILMS, PRODUCTS, PLACES])
def test_titles_are_unique_even_without_their_years(domain):
    titles = [item.title for item in World.create(3_840, seed=0, domain=domain).items]
    assert len({re.sub(r"\d{4}", "", title) for title in titles}) == 3_840


def test_worlds_of_one_seed_differ_in_words_alone():
    films, places = (World.create(60, seed=1, domain=domain) for domain in (FILMS, PLACES))
    for name in ("emission", "taste", "rating"):
        np.testing.assert_array_equal(getattr(films, name), getattr(places, name))
    same = dict(zip(FILMS.groups, PLACES.groups, strict=True))
    assert [same[item.main] for item in films.items] == [item.main for item in places.items]
    assert not {item.title for item in films.items} & {item.title for item in places.items}


def test_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match="14 events a user are too many for 40 items"):
        sample_histories(World.create(40, seed=0), num_users=5, events_per_user=14, seed=0)
    with pytest.raises(ValueError, match="5000 items are more than the 3840 titles"):
        World.create(5_000, seed=0)
