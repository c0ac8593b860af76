"""Rankings of the catalogue's items for users: by the item head, or by beam search over titles where the model has no such head."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from user_llm.common.errors import check_count
from user_llm.data.prompts.base import Lines
from user_llm.data.timelines import Catalogue
from user_llm.models import user as decoder_users
from user_llm.models.transitions import LAST
from user_llm.models.trie import Trie
from user_llm.serving import batch
from user_llm.serving.predictor import Predictor
from user_llm.serving.user import User

RANKING = "next_item"


class Item(NamedTuple):
    """An item of a ranking.

    Attributes:
      id: the item's id in the catalogue.
      title: the item's title.
      score: a higher score is a better item. Only scores of one ranking can be compared. They are logits of the item head,
        plus what the transitions add if the model has any; a model without a trained item head gives the log-probability of writing the
        title.
    """

    id: str
    title: str
    score: float


@dataclasses.dataclass(frozen=True, eq=False)
class Ranker:
    """The part of a `Personalizer` that ranks items."""

    predictor: Predictor
    lines: Lines

    @property
    def catalogue(self) -> Catalogue:
        """The items that are ranked."""
        return self.lines.catalogue

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each item in the catalogue, by its id."""
        return {key: number for number, key in enumerate(self.catalogue.keys) if number}

    @functools.cached_property
    def titles(self) -> Trie:
        """All titles in one trie: a model without a trained item head ranks items by beam search over this trie."""
        return Trie.build(self.lines.titles_as_targets())

    def rankings(
        self,
        those: Sequence[User],
        k: int,
        *,
        seen: bool,
        allow: Collection[str] | None,
        deny: Collection[str],
        candidates: Collection[str] | None,
    ) -> list[list[Item]]:
        """Return each user's `k` likeliest next items, best first. The arguments and errors are those of `recommend_many`."""
        templates = self.predictor.templates
        if RANKING not in templates:
            raise ValueError(f"This model cannot recommend: it was trained for {', '.join(templates)}, and not for next_item.")
        if candidates is not None and allow is not None:
            raise ValueError("Give candidates or allow, and not both.")
        check_count("k", k)
        allowed = self._allowed(allow if candidates is None else candidates, deny)
        k = k if candidates is None else int(allowed.sum())
        ranked: list[list[Item]] = [[] for _ in those]
        if not allowed.any():
            return ranked
        for indices, chosen, user in batch.batches(self.predictor, those):
            may = np.tile(allowed, (1 if seen else len(chosen), 1))  # one row holds for all users
            if not seen:
                for row, one in zip(may, chosen, strict=True):
                    row[one.seen] = False
            most = min(k, int(may.sum(axis=1).max()))
            scores = np.where(may, self._scores(chosen, user, may, most), -np.inf)
            for index, row in zip(indices, scores, strict=False):
                ranked[index] = self._best(row, k)
        return ranked

    def _scores(
        self, chosen: Sequence[User], user: decoder_users.User | None, may: Bool[np.ndarray, "#B V"], k: int
    ) -> Float[np.ndarray, "B V"]:
        """Return the scores of all V items of the catalogue, PAD included, for each of B users.

        A trained item head, with the transitions if there are any, scores every item. Without a head, beam search among the titles of the
        items that a user may be recommended scores at least the `k` whose titles it writes first, and all other items have -inf.

        Args:
          user: what the decoder reads of these users.
          may: the items that a user may be recommended: a row for each user, or one row for all of them.
        """
        prompts = [self.predictor.templates[RANKING].prompt(one.items) for one in chosen]
        known = len(self.catalogue.titles)  # rows from there on hold no item yet: they have scores that mean nothing
        if self.predictor.ranks:
            last = np.array([[*one.items[: -LAST - 1 : -1], *[0] * LAST][:LAST] for one in chosen], np.int32)
            return self.predictor.ranked(RANKING, prompts, user, last)[:, :known]
        # Each number of beams compiles a program. The numbers are therefore `beams` times powers of two.
        beams = min(next(size for power in range(64) if (size := self.predictor.beams << power) >= k), known - 1)
        # A guide of weight 0 keeps the search from all other items and changes no title's score.
        guide = np.where(may, 0.0, -np.inf).astype(np.float32)
        items, scores = self.predictor.choose(RANKING, prompts, user, self.titles, beams, guide)
        found = np.full((len(prompts), known), -np.inf, np.float32)
        np.put_along_axis(found, items, scores, axis=1)
        return found

    def _allowed(self, allow: Collection[str] | None, deny: Collection[str]) -> Bool[np.ndarray, " V"]:
        """Return a mask over the catalogue: True where an item may be recommended. PAD (number 0) is False."""
        allowed = np.full(len(self.catalogue.keys), allow is None)
        allowed[self._numbered(() if allow is None else allow)] = True
        allowed[self._numbered(deny)] = False
        allowed[0] = False
        return allowed

    def _numbered(self, ids: Collection[str]) -> list[int]:
        if isinstance(ids, str):
            raise ValueError(f"{ids!r} is one id: pass a list of ids.")
        spelled = [str(one) for one in ids]
        found = [self.numbers.get(one) for one in spelled]
        if None in found:
            raise ValueError(f"No item has the id {spelled[found.index(None)]!r}: ids are those of the model's catalogue.")
        return [number for number in found if number]

    def _best(self, scores: Float[np.ndarray, " V"], k: int) -> list[Item]:
        order = np.argsort(-scores, kind="stable")[:k]
        return [Item(self.catalogue.keys[n], self.catalogue.titles[n], float(scores[n])) for n in order if scores[n] > -np.inf]
