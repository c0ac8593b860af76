"""A synthetic world of film watchers whose optimal predictor is known, written in MovieLens' own layout.

A user is a hidden Markov model. An *archetype* says which genres the user likes and seldom changes; a *mood*, one genre, lasts a
few films and is then drawn anew from the archetype's genres. Each film is drawn from those of the mood, by popularity, never
twice; its rating tells of the archetype. With finitely many archetypes and moods the posterior given a history is exact, and so
is the best reachable recall, which tests hold a model against. The last few films reveal the mood; the archetype, and which
films are already seen, take a long history.
"""

import csv
import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from user_llm.data.timelines import Timelines

LEXICON = {
    "Action": "Strike Pursuit Fury Bullet Chase Vengeance Showdown Ambush Siege Thunder",
    "Animation": "Dragonfly Teapot Moonbeam Puppet Balloon Lantern Squirrel Rainbow Acorn Marble",
    "Comedy": "Wedding Neighbor Vacation Disguise Landlord Rehearsal Mixup Reunion Pajamas Umbrella",
    "Crime": "Alibi Heist Informant Verdict Ledger Syndicate Ransom Suspect Precinct Getaway",
    "Documentary": "Glacier Archive Census Orchard Railway Harvest Migration Reef Workshop Election",
    "Drama": "Father Winter Promise Daughter Silence Confession Inheritance Letter Widow Homecoming",
    "Fantasy": "Dragon Sorcerer Crown Amulet Kingdom Prophecy Unicorn Scepter Oracle Enchantress",
    "Horror": "Cellar Scarecrow Whisper Coffin Ritual Mirror Plague Shadow Asylum Graveyard",
    "Romance": "Serenade Valentine Balcony Embrace Sweetheart Perfume Waltz Moonlight Rose Engagement",
    "Sci-Fi": "Galaxy Android Orbit Nebula Starship Quantum Colony Satellite Clone Singularity",
    "War": "Trench Battalion Convoy Armistice Sniper Regiment Airfield Bunker Frontier Submarine",
    "Western": "Saddle Canyon Outlaw Prairie Sheriff Stagecoach Ranch Desperado Saloon Mustang",
}
ADJECTIVES = [
    "Silent",
    "Broken",
    "Golden",
    "Hidden",
    "Last",
    "Crimson",
    "Distant",
    "Wild",
    "Frozen",
    "Burning",
    "Secret",
    "Lonely",
    "Midnight",
    "Forgotten",
    "Electric",
    "Gentle",
    "Hollow",
    "Iron",
    "Restless",
    "Savage",
    "Velvet",
    "Wandering",
    "Bitter",
    "Bright",
    "Crooked",
    "Endless",
    "Fallen",
    "Perfect",
    "Quiet",
    "Stolen",
    "Tender",
    "Twisted",
]
RATINGS = np.arange(1, 6)  # whole stars


@dataclasses.dataclass(frozen=True)
class World:
    """The laws of a world: G genres (moods), C archetypes, I films.

    Attributes:
      titles, genres: of each film.
      emission: how readily each mood picks each film, rows sum to 1.
      taste: how readily each archetype falls into each mood, rows sum to 1.
      rating: probability of 1 to 5 stars for each archetype and film.
      stay_mood, stay_archetype: probability of keeping them from one film to the next.
    """

    titles: list[str]
    genres: list[list[str]]
    emission: Float[np.ndarray, "G I"]
    taste: Float[np.ndarray, "C G"]
    rating: Float[np.ndarray, "C I 5"]
    stay_mood: float
    stay_archetype: float

    @classmethod
    def create(cls, items: int, seed: int, *, archetypes: int = 24, stay_mood: float = 0.8, stay_archetype: float = 0.995):
        """Draw a world of `items` films.

        Raises:
          ValueError: more films than there are titles.
        """
        rng = np.random.default_rng((seed, 0))
        names = list(LEXICON)
        titles, genres, primary = _films(items, rng)
        popularity = rng.permutation(1.0 / (1 + np.arange(items)) ** 0.6)
        member = np.array(
            [[1.0 if g == primary[i] else 0.15 if g in genres[i] else 0.002 for i in range(items)] for g in names]
        )
        emission = member * popularity
        taste = rng.dirichlet(np.full(len(names), 0.25), size=archetypes) + 0.005
        taste /= taste.sum(1, keepdims=True)
        liking = taste[:, [names.index(g) for g in primary]]  # C I
        mean = 2.5 + 2.0 * np.minimum(liking * 4, 1.0)
        rating = np.exp(-((RATINGS - mean[..., None]) ** 2))
        return cls(
            titles, genres, emission / emission.sum(1, keepdims=True), taste, rating / rating.sum(-1, keepdims=True),
            stay_mood, stay_archetype,
        )  # fmt: skip

    def sample(self, lengths: Int[np.ndarray, "U"], seed: int) -> tuple[Int[np.ndarray, "U T"], Int[np.ndarray, "U T"]]:
        """Return film indices (from 0) and stars of each user's history, -1 beyond its length."""
        rng = np.random.default_rng((seed, 1))
        users, rows = len(lengths), np.arange(len(lengths))
        archetype = rng.integers(len(self.taste), size=users)
        mood = _draw(self.taste[archetype], rng)
        seen = np.zeros((users, len(self.titles)), bool)
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

    def next_probabilities(self, films: Int[np.ndarray, "T"], stars: Int[np.ndarray, "T"]) -> Float[np.ndarray, "I"]:
        """Return the exact probability of each film to be next, given a history: the optimal predictor (forward algorithm)."""
        archetypes = len(self.taste)
        belief = self.taste / archetypes  # over (archetype, mood), before the first film
        unseen = np.ones(len(self.titles))
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


def write_movielens(directory: epath.PathLike, *, num_users: int, num_items: int, events_per_user: int, seed: int) -> World:
    """Sample users and write ratings.csv and movies.csv as in ml-latest; history lengths vary from half to 1.5 times the mean.

    Raises:
      ValueError: more events a user than a third of the films.
    """
    if events_per_user * 3 > num_items:
        raise ValueError(
            f"{events_per_user} events a user are too many for {num_items} films: at most a third can be seen by all."
        )
    world = World.create(num_items, seed)
    rng = np.random.default_rng((seed, 2))
    lengths = rng.integers(events_per_user // 2, events_per_user * 3 // 2 + 1, size=num_users)
    films, stars = world.sample(lengths, seed)
    # Sessions: minutes between most films, days between some; whole seconds, so that few events tie.
    gaps = np.where(rng.random(films.shape) < 0.7, rng.integers(1, 600, films.shape), rng.integers(3_600, 864_000, films.shape))
    times = 1_000_000_000 + rng.integers(0, 50_000_000, size=num_users)[:, None] + np.cumsum(gaps, axis=1)
    directory = epath.Path(directory)
    unfinished = directory.parent / f"{directory.name}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    with (unfinished / "movies.csv").open("w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["movieId", "title", "genres"])
        rows.writerows(
            [i, title, "|".join(genres)] for i, (title, genres) in enumerate(zip(world.titles, world.genres, strict=True), 1)
        )
    with (unfinished / "ratings.csv").open("w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["userId", "movieId", "rating", "timestamp"])
        for user in range(num_users):
            for t in range(lengths[user]):
                rows.writerow([user + 1, films[user, t] + 1, f"{stars[user, t]}.0", times[user, t]])
    unfinished.rename(directory)
    return world


def optimal_ranks(
    world: World, timelines: Timelines, users: Int[np.ndarray, "n"], positions: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
    """Rank each target by the optimal predictor of the world that the timelines were written from."""
    films = np.array([0, *map(int, timelines.catalogue.keys[1:])]) - 1  # item id -> film index
    ranks = np.empty(len(users))
    for row, (user, position) in enumerate(zip(users, positions, strict=True)):
        events = slice(timelines.offsets[user], timelines.offsets[user] + position + 1)
        history = films[timelines.item[events]]
        stars = timelines.columns["rating"][events] // 2
        probability = world.next_probabilities(history[:-1], stars[:-1])
        ranks[row] = 1 + np.sum(probability > probability[history[-1]])
    return ranks


def _films(items: int, rng: np.random.Generator) -> tuple[list[str], list[list[str]], list[str]]:
    """Name `items` films after their first genre; some have a second."""
    names = list(LEXICON)
    most = len(ADJECTIVES) * len(next(iter(LEXICON.values())).split()) * len(names)
    if items > most:
        raise ValueError(f"{items} films are more than the {most} titles that there are words for.")
    titles, genres, primary = [], [], []
    words = {g: [(a, n) for a in ADJECTIVES for n in LEXICON[g].split()] for g in names}
    order = {g: rng.permutation(len(words[g])) for g in names}
    for i in range(items):
        genre = names[i % len(names)]
        adjective, noun = words[genre][order[genre][i // len(names)]]
        second = names[rng.integers(len(names))] if rng.random() < 0.4 else genre
        titles.append(f"The {adjective} {noun} ({rng.integers(1950, 2020)})")
        genres.append(sorted({genre, second}))
        primary.append(genre)
    return titles, genres, primary


def _draw(weights: Float[np.ndarray, "U X"], rng: np.random.Generator) -> Int[np.ndarray, "U"]:
    """Draw one index per row in proportion to its weights."""
    cumulative = np.cumsum(weights, axis=1)
    return (rng.random(len(weights))[:, None] * cumulative[:, -1:] >= cumulative).sum(1)
