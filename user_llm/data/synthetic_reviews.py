"""What people of a synthetic world write about its items, so that generation has something to learn.

    Superb kettle, excellent price
    As so often, Kitchen. The price is superb and the finish is excellent. I recommend it to everyone.

| words | follow from |
|---|---|
| adjectives, last sentence | the rating; which of four adjectives, mostly the user's habit |
| aspects | mostly the two that the user cares about |
| noun, group | the item |
| first sentence | how often the user chose this group before |

So the prompt (item and rating) says half of a review, and the user's history the other half. All of this is independent of the
world's hidden states given items and ratings: reading reviews does not help to predict the next item, and the world's optimal
predictor stays optimal.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from user_llm.data.synthetic import Histories, World
from user_llm.data.synthetic_words import Domain

ADJECTIVES = {
    1: ("terrible", "awful", "horrible", "dreadful"),
    2: ("poor", "disappointing", "mediocre", "weak"),
    3: ("decent", "okay", "average", "acceptable"),
    4: ("good", "nice", "solid", "pleasant"),
    5: ("excellent", "superb", "fantastic", "perfect"),
}
LAST = {
    1: "Avoid it.",
    2: "I expected more.",
    3: "It will do.",
    4: "I am glad that I chose it.",
    5: "I recommend it to everyone.",
}
FIRST = ("My first try at {}.", "{} for a change.", "As so often, {}.")
OFTEN = 0.25  # of earlier events in the item's main group
OWN = 0.7  # probability of the user's own aspect or habit, against any


@dataclasses.dataclass(frozen=True)
class Review:
    """A line and a few sentences."""

    summary: str
    text: str


def write_reviews(world: World, domain: Domain, histories: Histories, seed: int) -> list[list[Review]]:
    """Write the reviews of each user's events, in order."""
    rng = np.random.default_rng((seed, 3))
    shape = histories.items.shape
    first = _own(len(domain.aspects), shape, rng)
    second = _own(len(domain.aspects), shape, rng)
    second = np.where(second == first, (second + 1) % len(domain.aspects), second)
    habit = _own(len(ADJECTIVES[1]), (2, *shape), rng)
    other = np.clip(histories.stars + rng.integers(-1, 2, shape), 1, 5)  # what the user thinks of the second aspect
    return [
        [
            _review(
                world.items[histories.items[user, t]],
                [world.items[i].main for i in histories.items[user, :t]],
                (domain.aspects[first[user, t]], domain.aspects[second[user, t]]),
                (ADJECTIVES[histories.stars[user, t]][habit[0, user, t]], ADJECTIVES[other[user, t]][habit[1, user, t]]),
                LAST[histories.stars[user, t]],
            )
            for t in range(length)
        ]
        for user, length in enumerate(histories.lengths)
    ]


def _own(choices: int, shape: tuple[int, ...], rng: np.random.Generator) -> Int[np.ndarray, "..."]:
    """Draw a choice for each event, mostly the same one for all events of a user (the last axis)."""
    own = rng.integers(choices, size=(*shape[:-1], 1))
    return np.where(rng.random(shape) < OWN, own, rng.integers(choices, size=shape))


def _review(item, earlier: list[str], aspects: tuple[str, str], adjectives: tuple[str, str], last: str) -> Review:
    chosen = earlier.count(item.main)
    first = FIRST[0 if not chosen else 1 + (chosen >= OFTEN * len(earlier))].format(item.main)
    text = f"{first} The {aspects[0]} is {adjectives[0]} and the {aspects[1]} is {adjectives[1]}. {last}"
    return Review(f"{adjectives[0].capitalize()} {item.noun.lower()}, {adjectives[1]} {aspects[1]}", text)
