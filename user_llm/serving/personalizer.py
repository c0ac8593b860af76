"""A trained model that knows itself: events in, and recommendations, texts, scores and explanations out.

    model = user_llm.load("runs/x/user_llm/model")
    user = model.encode(events)              # once; stored, and updated event by event
    model.recommend(user, k=10)

It needs no run and no dataset. Everything goes the way of `predictor.py`, which evaluation inside a run goes too.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Float

from user_llm.common import mesh as meshes
from user_llm.data.pipeline import length_batches
from user_llm.data.prompts.base import Ids, Lines
from user_llm.data.timelines import hash_key
from user_llm.data.tokenizer import Tokenizer
from user_llm.data.vocabulary import Read, Vocabulary
from user_llm.models import score as scoring
from user_llm.models import user as decoder_users
from user_llm.models.trie import Trie
from user_llm.serving import batch
from user_llm.serving import user as users
from user_llm.serving.predictor import Predictor
from user_llm.serving.user import User
from user_llm.serving.writing import Writer

RANKING = "next_item"
CHUNK = 8  # tokens of a piece of a stream

F = TypeVar("F", bound=Callable[..., Any])


class Item(NamedTuple):
    """An item of a ranking: the publisher's id, the title, and the score, by which items of one ranking are compared."""

    id: str
    title: str
    score: float


class Seen(NamedTuple):
    """An event of a user: the item's id and title, how many events ago it was, and by how much the user tokens look at it."""

    id: str
    title: str
    events_ago: int
    weight: float


def on_mesh(method: F) -> F:
    """Run a method on its model's mesh."""

    @functools.wraps(method)
    def run(self: "Personalizer", *args: Any, **settings: Any) -> Any:
        with jax.set_mesh(self.predictor.mesh):
            return method(self, *args, **settings)

    return run  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, eq=False)
class Personalizer:
    """A User-LLM with all that it takes to use it.

    Attributes:
      identity: hash of all that computes; a `User` is of one model.
      vocabulary: by which raw events become ids, and the items.
      lines, tokenizer: of prompts.
      names: of tasks whose answer is one of several names, such as `favorite`, these names by their numbers.
      leading: the tokens of a free text in front of a soft prompt.
      facts: what the model directory says of the training, for people to read.
    """

    identity: str
    predictor: Predictor
    vocabulary: Vocabulary
    lines: Lines
    names: Mapping[str, Mapping[int, str]]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """The LLM's tokenizer."""
        return self.lines.tokenizer

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model has been trained to answer."""
        return tuple(self.predictor.templates)

    @property
    def keep(self) -> int | None:
        """How many of a user's last events are kept; None for all, of which a summary is made."""
        lines = self.lines
        if lines.text_items and lines.kind == "summary":
            return None
        return max(self.predictor.max_events, lines.text_items)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each item, by its id."""
        return {key: number for number, key in enumerate(self.vocabulary.catalogue.keys) if number}

    @functools.cached_property
    def writer(self) -> Writer:
        """What of the model writes."""
        return Writer(self.predictor, self.lines, self.names)

    @functools.cached_property
    def titles(self) -> Trie:
        """All titles, for items that are found by writing them."""
        return Trie.build(self.lines.titles_as_targets())

    def encode(self, events: Any) -> User:
        """Return a user, of whom nothing need be known but events.

        Args:
          events: a list of dicts, a pandas, polars or Arrow table, or a file, with the columns that `vocabulary.fields` names, in any
            order. Events of items that the model does not know are left out, counted in `User.unknown`, and warned of.

        Raises:
          ValueError: an event that cannot be read, or events of several users.
        """
        found = self.encode_many(events)
        if len(found) > 1:
            raise ValueError(f"These are events of {len(found)} users: pass them to encode_many, or those of one user.")
        fields = self.vocabulary.fields
        nobody = users.unknown_user(self.identity, self.vocabulary.schema.width, hash_key(""), fields.ticks_per_second)
        return next(iter(found.values()), nobody)

    def encode_many(self, events: Any) -> dict[str, User]:
        """Return the users of a table or file by their ids; `encode` says of what it may consist.

        Raises:
          ValueError: an event that cannot be read.
        """
        read = self._read(events)
        return self.encode_read(read, range(len(read.timelines)))

    @on_mesh
    def encode_read(self, read: Read, numbers: Iterable[int]) -> dict[str, User]:
        """Return some of the users whose events the vocabulary has read, by their ids."""
        found = self._users(read, numbers, self.keep)
        return dict(zip(found, self._encoded(list(found.values())), strict=True))

    def update(self, user: User, events: Any) -> User:
        """Return a user with further events, as `encode` of all events returns it.

        Events that came already (the same item at the same time) change nothing, so that an update may be repeated. An event that
        is older than the oldest one that a user keeps is counted, and no more: the encoder would not have read it.

        Raises:
          ValueError: a user of another model, an event that cannot be read, or events of several users.
        """
        return self.update_many({"": user}, {"": events})[""]

    @on_mesh
    def update_many(self, old: Mapping[str, User], events: Mapping[str, Any]) -> dict[str, User]:
        """Return users with further events, those of each by the user's name.

        Raises:
          ValueError: as in `update`, or events of a name that is not among the users.
        """
        fields, merged = self.vocabulary.fields, dict(old)
        for name, rows in events.items():
            if name not in old:
                raise ValueError(f"Events of {name!r}, who is not among the users: encode them.")
            self._check(old[name])
            read = self._read(rows)
            found = list(self._users(read, range(len(read.timelines)), None).values())
            if len(found) > 1:
                raise ValueError(f"These are events of {len(found)} users: update one user by events of that user alone.")
            for more in found:
                merged[name] = users.joined(
                    old[name], more, self.vocabulary.schema, keep=self.keep, ties=fields.ties, seed=fields.seed
                )
        changed = {name: merged[name] for name in events}
        return merged | dict(zip(changed, self._encoded(list(changed.values())), strict=True))

    def recommend(self, user: User, k: int = 10, **choice: Any) -> list[Item]:
        """Return the `k` items that a user is likeliest to want next, best first; `choice` as in `recommend_many`."""
        return self.recommend_many([user], k, **choice)[0]

    @on_mesh
    def recommend_many(
        self,
        those: Sequence[User],
        k: int = 10,
        *,
        seen: bool = True,
        allow: Collection[str] | None = None,
        deny: Collection[str] = (),
        candidates: Collection[str] | None = None,
    ) -> list[list[Item]]:
        """Return each user's `k` likeliest next items, best first.

        Args:
          seen: whether items of the history may be among them.
          allow: ids of the only items that may be; None for all.
          deny: ids of items that may not.
          candidates: ids to be ranked: all of them are returned, whatever `k` is.

        Raises:
          ValueError: a user of another model, an id that no item has, or a model that was not trained to name the next item.
        """
        if RANKING not in self.tasks:
            raise ValueError(f"This model was not trained to name the next item, but {', '.join(self.tasks)}.")
        if candidates is not None:
            allow, k = candidates, len(set(candidates))
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        allowed = self._allowed(allow, deny)
        ranked: list[list[Item]] = [[] for _ in those]
        for indices, chosen, user in self._batches(those):
            prompts = [self.predictor.templates[RANKING].prompt(one.items) for one in chosen]
            for index, one, scores in zip(indices, chosen, self._scores(prompts, user, k), strict=False):
                scores = np.where(allowed, scores, -np.inf)
                if not seen:
                    scores[one.seen] = -np.inf
                ranked[index] = self._best(scores, k)
        return ranked

    def _scores(self, prompts: list[Ids], user: decoder_users.User | None, k: int) -> Float[np.ndarray, "B V"]:
        """Return a score of every item, -inf for none: of the item head or, where none is trained, of the titles that are written."""
        known = len(self.vocabulary.catalogue.titles)
        if self.predictor.ranks:
            return meshes.fetch(self.predictor.score(RANKING, prompts, user))[:, :known]
        items, scores = self.predictor.choose(RANKING, prompts, user, self.titles, max(k, self.predictor.beams))
        found = np.full((len(prompts), known), -np.inf, np.float32)
        np.put_along_axis(found, items, scores, axis=1)
        return found

    def _allowed(self, allow: Collection[str] | None, deny: Collection[str]) -> Bool[np.ndarray, " V"]:
        """Return which items may be recommended; PAD may not."""
        allowed = np.full(len(self.vocabulary.catalogue.keys), allow is None)
        allowed[self._numbered(allow or ())] = True
        allowed[self._numbered(deny)] = False
        allowed[0] = False
        return allowed

    def _numbered(self, ids: Collection[str]) -> list[int]:
        if isinstance(ids, str):
            raise ValueError(f"{ids!r} is one id: pass a list of ids.")
        found = [self.numbers.get(str(one)) for one in ids]
        if None in found:
            raise ValueError(f"No item has the id {list(ids)[found.index(None)]!r}: ids are those of the training data.")
        return [number for number in found if number]

    def _best(self, scores: Float[np.ndarray, " V"], k: int) -> list[Item]:
        catalogue = self.vocabulary.catalogue
        order = np.argsort(-scores, kind="stable")[:k]
        return [Item(catalogue.keys[n], catalogue.titles[n], float(scores[n])) for n in order if scores[n] > -np.inf]

    def generate(self, prompt: str | None = None, user: User | None = None, *, stream: bool = False, **settings: Any) -> Any:
        """Write a text; `settings` as in `generate_many`.

        Args:
          prompt: a text to go on from, as it is; without one, name a `task` or a `chat`.
          user: who the text is for; None for the bare LLM.
          stream: return an iterator of pieces, as they are written, in place of the text.
        """
        pieces = self._written([prompt], [user], settings)
        if stream:
            return (texts[0] for texts in pieces if texts[0])
        return "".join(texts[0] for texts in pieces)

    def generate_many(
        self, prompts: Sequence[str | None], those: Sequence[User | None] | None = None, **settings: Any
    ) -> list[str]:
        """Write a text behind each prompt, for its user.

        Args:
          those: a user, or None, for each prompt.
          task: one that the model was trained for, in place of a prompt; `fields` are what its question names, such as `title`.
          chat: messages such as {"role": "user", "content": "Hello"}, in place of a prompt, by the LLM's own template.
          max_tokens: the most tokens that are written.
          temperature, top_k, top_p, min_p: as in `Sampling`; greedy at 0.
          seed: of what is drawn.
          stop: texts at which writing stops, besides the LLM's own stop tokens; they are not part of the text.

        Raises:
          ValueError: settings that do not fit, a user of another model, or a task that the model was not trained for.
        """
        texts = [""] * len(prompts)
        for pieces in self._written(prompts, list(those or [None] * len(prompts)), settings):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def _written(
        self, prompts: Sequence[str | None], those: Sequence[User | None], settings: dict[str, Any]
    ) -> Iterator[list[str]]:
        for user in those:
            if user is not None:
                self._check(user)
        return self.writer.pieces(prompts, those, **settings)

    @on_mesh
    def score(self, prompt: str, texts: Sequence[str], user: User | None = None) -> Float[np.ndarray, " n"]:
        """Return the log-probability of each text behind a prompt: the sum over its tokens, whatever their number.

        Args:
          user: who is asked; None for the bare LLM.

        Raises:
          ValueError: an empty text, or a user of another model.
        """
        if user is not None:
            self._check(user)
        row = self.writer.row(prompt, user, None, {}, None)
        ids = [self.tokenizer.encode(text) for text in texts]
        leading = len(self.lines.start)
        decoder, inputs, sizes, kv = self.predictor.decoding(
            *self.writer.padded([row]), batch.present(self.predictor, [user]), leading
        )
        return scoring.score(*decoder, inputs, [ids], lengths=meshes.fetch(sizes).tolist(), user=kv)[0]

    @on_mesh
    def explain(self, user: User, k: int | None = None) -> list[Seen]:
        """Return the events that the encoder read, those first that the user tokens look at most.

        The weights are the resampler's attention to each event, the mean over user tokens, heads and layers; they tell where
        it looked, and not what an event changed.

        Raises:
          ValueError: a user of another model, or a model without a resampler, whose user tokens are the events.
        """
        self._check(user)
        if self.predictor.config.resampler is None:
            raise ValueError("This model has no resampler: its user tokens are the events themselves, one for each.")
        (_, rows, padded), *_ = length_batches(np.array([batch.read_events(self.predictor, user)]), 1, self.predictor.bucket)
        events, lengths = batch.histories(self.predictor, [user], padded)
        weights = self.predictor.attended(events, lengths)[0][: lengths[0]]
        catalogue, read = self.vocabulary.catalogue, user.items[len(user.items) - int(lengths[0]) :]
        order = np.argsort(-weights, kind="stable")[:k]
        return [Seen(catalogue.keys[read[n]], catalogue.titles[read[n]], len(read) - int(n), float(weights[n])) for n in order]

    def _read(self, events: Any) -> Read:
        """Return what the vocabulary reads of events, and warn of those that it left out."""
        read = self.vocabulary.read(events)
        if left_out := int(np.sum(read.unknown)):
            logging.warning("%d events are left out: the model does not know their items.", left_out)
        return read

    def _users(self, read: Read, numbers: Iterable[int], keep: int | None) -> dict[str, User]:
        """Return users of whom nothing is encoded yet, by their ids."""
        timelines = read.timelines
        per_second, model = self.vocabulary.fields.ticks_per_second, self.identity
        return {
            (key := timelines.user_keys[number]): users.from_timeline(
                timelines, number, keep=keep, model=model, key=hash_key(key), unknown=int(read.unknown[number]),
                ticks_per_second=per_second,
            )
            for number in numbers
        }  # fmt: skip

    def _encoded(self, those: list[User]) -> list[User]:
        """Return users with their user tokens."""
        out = list(those)
        if not self.predictor.max_events:
            return out
        lengths = np.array([batch.read_events(self.predictor, user) for user in those], np.int64)
        size = batch.rows(self.predictor, len(those))
        for indices, rows, padded in length_batches(lengths, size, self.predictor.bucket):
            arrays = batch.histories(self.predictor, [those[row] for row in rows], padded)
            found, counts = meshes.fetch(tuple(self.predictor.encode(*arrays) or ()))
            for place, index in enumerate(indices):
                out[index] = dataclasses.replace(those[index], tokens=np.array(found[place, : counts[place]]))
        return out

    def _batches(self, those: Sequence[User]) -> Iterator[tuple[np.ndarray, list[User], decoder_users.User | None]]:
        """Yield the places of some users in `those`, a batch of them, the last one again and again, and what the decoder reads of it."""
        for user in those:
            self._check(user)
        lengths = np.array([len(user.tokens) for user in those], np.int64)
        for indices, rows, _ in length_batches(lengths, batch.rows(self.predictor, len(those))):
            chosen = [those[row] for row in rows]
            yield indices, chosen, batch.present(self.predictor, chosen)

    def _check(self, user: User) -> None:
        if not isinstance(user, User):
            raise ValueError(f"{type(user).__name__} is no user: encode their events first.")
        if user.model != self.identity:
            raise ValueError(
                f"This user was encoded by the model {user.model}, and this one is {self.identity}: encode their events again."
            )
