"""Synthetic worlds whose optimal predictor is known: people who watch films, buy products or visit places.

A user is a hidden Markov model. An *archetype* says which groups of items (genres) the user likes and seldom changes; a *mood*,
one group, lasts a few items and is then drawn anew from the archetype's groups. Each item is drawn from those of the mood, by
popularity, never twice; its rating tells of the archetype. With finitely many archetypes and moods the posterior given a history
is exact, and so is the best reachable recall, which tests hold a model against. The last few items reveal the mood; the archetype,
and which items are already seen, take a long history.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from user_llm.data.synthetic_words import FILMS, Domain, Item, name_items
from user_llm.data.timelines import Timelines

RATINGS = np.arange(1, 6)  # whole stars


@dataclasses.dataclass(frozen=True)
class World:
    """The laws of a world: G groups (moods), C archetypes, I items.

    Attributes:
      emission: how readily each mood picks each item, rows sum to 1.
      taste: how readily each archetype falls into each mood, rows sum to 1.
      rating: probability of 1 to 5 stars for each archetype and item.
      stay_mood, stay_archetype: probability of keeping them from one item to the next.
    """

    items: list[Item]
    emission: Float[np.ndarray, "G I"]
    taste: Float[np.ndarray, "C G"]
    rating: Float[np.ndarray, "C I 5"]
    stay_mood: float
    stay_archetype: float

    @classmethod
    def create(
        cls, num_items: int, seed: int, *, domain: Domain = FILMS, archetypes: int = 24, stay_mood: float = 0.8,
        stay_archetype: float = 0.995,
    ) -> "World":  # fmt: skip
        """Draw a world; one seed draws the same in every domain but for the names.

        Raises:
          ValueError: more items than there are titles.
        """
        rng = np.random.default_rng((seed, 0))
        names = list(domain.groups)
        items = name_items(domain, num_items, rng)
        popularity = rng.permutation(1.0 / (1 + np.arange(num_items)) ** 0.6)
        member = np.array([[1.0 if g == item.main else 0.15 if g in item.groups else 0.002 for item in items] for g in names])
        emission = member * popularity
        taste = rng.dirichlet(np.full(len(names), 0.25), size=archetypes) + 0.005
        taste /= taste.sum(1, keepdims=True)
        liking = taste[:, [names.index(item.main) for item in items]]  # C I
        mean = 2.5 + 2.0 * np.minimum(liking * 4, 1.0)
        rating = np.exp(-((RATINGS - mean[..., None]) ** 2))
        return cls(
            items, emission / emission.sum(1, keepdims=True), taste, rating / rating.sum(-1, keepdims=True),
            stay_mood, stay_archetype,
        )  # fmt: skip

    def sample(self, lengths: Int[np.ndarray, " U"], seed: int) -> tuple[Int[np.ndarray, "U T"], Int[np.ndarray, "U T"]]:
        """Return item indices (from 0) and stars of each user's history, -1 beyond its length."""
        rng = np.random.default_rng((seed, 1))
        users, rows = len(lengths), np.arange(len(lengths))
        archetype = rng.integers(len(self.taste), size=users)
        mood = _draw(self.taste[archetype], rng)
        seen = np.zeros((users, len(self.items)), bool)
        films = np.full((users, lengths.max()), -1)
        stars = np.full((users, lengths.max()), -1)
        for t in range(lengths.max()):
            changed = rng.random(users) >= self.stay_archetype
            archetype = np.where(changed, rng.integers(len(self.taste), size=users), archetype)
            mood = np.where(rng.random(users) >= self.stay_mood, _draw(self.taste[archetype], rng), mood)
            film = _draw(self.emission[mood] * ~seen, rng)
            seen[rows, film] = True
            films[:, t], stars[:, t] = film, 1 + _draw(self.rating[archetype, film], rng)
        beyond = np.arange(lengths.max()) >= lengths[:, None]
        films[beyond], stars[beyond] = -1, -1
        return films, stars

    def next_probabilities(self, films: Int[np.ndarray, " T"], stars: Int[np.ndarray, " T"]) -> Float[np.ndarray, " I"]:
        """Return the exact probability of each item to be next, given a history: the optimal predictor (forward algorithm)."""
        archetypes = len(self.taste)
        belief = self.taste / archetypes  # over (archetype, mood), before the first item
        unseen = np.ones(len(self.items))
        for film, star in zip(films, stars, strict=True):
            belief = self._transition(belief)
            picks = self.emission[:, film] / (self.emission @ unseen)
            belief = belief * picks * self.rating[:, film, star - 1, None]
            belief /= belief.sum()
            unseen[film] = 0.0
        mood = self._transition(belief).sum(0)
        return (mood / (self.emission @ unseen)) @ self.emission * unseen

    def _transition(self, belief: Float[np.ndarray, "C G"]) -> Float[np.ndarray, "C G"]:
        moved = (1 - self.stay_archetype) * belief.mean(0, keepdims=True)
        belief = self.stay_archetype * belief + moved
        return self.stay_mood * belief + (1 - self.stay_mood) * belief.sum(1, keepdims=True) * self.taste


@dataclasses.dataclass(frozen=True)
class Histories:
    """What U users do; rows are -1 (times: anything) beyond their lengths."""

    items: Int[np.ndarray, "U T"]
    stars: Int[np.ndarray, "U T"]
    times: Int[np.ndarray, "U T"]
    lengths: Int[np.ndarray, " U"]

    def events(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield user, position, item (all from 0), stars and seconds since 1970, user by user in order."""
        for user, length in enumerate(self.lengths):
            columns = (column[user, :length].tolist() for column in (self.items, self.stars, self.times))
            for t, event in enumerate(zip(*columns, strict=True)):
                yield user, t, *event


def sample_histories(world: World, num_users: int, events_per_user: int, seed: int) -> Histories:
    """Sample users; the lengths of their histories vary from half to 1.5 times the mean.

    Raises:
      ValueError: more events a user than a third of the items.
    """
    if events_per_user * 3 > len(world.items):
        raise ValueError(
            f"{events_per_user} events a user are too many for {len(world.items)} items: at most a third can be seen by all."
        )
    rng = np.random.default_rng((seed, 2))
    lengths = rng.integers(events_per_user // 2, events_per_user * 3 // 2 + 1, size=num_users)
    items, stars = world.sample(lengths, seed)
    # Sessions: minutes between most events, days between some; whole seconds, so that few events tie.
    gaps = np.where(rng.random(items.shape) < 0.7, rng.integers(1, 600, items.shape), rng.integers(3_600, 864_000, items.shape))
    times = 1_000_000_000 + rng.integers(0, 50_000_000, size=num_users)[:, None] + np.cumsum(gaps, axis=1)
    return Histories(items, stars, times, lengths)


def optimal_ranks(
    world: World, timelines: Timelines, users: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Rank each target by the optimal predictor of the world that the timelines were written from."""
    index = {item.title: i for i, item in enumerate(world.items)}
    of_world = np.array([-1, *(index[title] for title in timelines.catalogue.titles[1:])])
    levels = (timelines.schema["rating"].size - 1) // len(RATINGS)  # a star, where ratings are half stars
    ranks = np.empty(len(users))
    for row, (user, position) in enumerate(zip(users, positions, strict=True)):
        events = slice(timelines.offsets[user], timelines.offsets[user] + position + 1)
        history = of_world[timelines.item[events]]
        stars = timelines.columns["rating"][events] // levels
        probability = world.next_probabilities(history[:-1], stars[:-1])
        ranks[row] = 1 + np.sum(probability > probability[history[-1]])
    return ranks


def _draw(weights: Float[np.ndarray, "U X"], rng: np.random.Generator) -> Int[np.ndarray, " U"]:
    """Draw one index per row in proportion to its weights."""
    cumulative = np.cumsum(weights, axis=1)
    return (rng.random(len(weights))[:, None] * cumulative[:, -1:] >= cumulative).sum(1)
