"""The trained model as a library: raw events go in; recommendations, texts, scores and explanations come out.

    model = user_llm.load("runs/x/user_llm/model")
    user = model.encode(events)              # once for each user; a user can be stored, and updated with later events
    model.recommend(user, k=10)

A `Personalizer` needs neither the training run nor its dataset. It answers through `predictor.py`, and evaluation inside a
training run answers through the same code.
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

F = TypeVar("F", bound=Callable[..., Any])


class Item(NamedTuple):
    """An item of a ranking.

    Attributes:
      id: the item's id in the training data.
      title: the item's title.
      score: a higher score is a better item. Only scores of one ranking can be compared. They are logits of the item head; a model
        without a trained item head gives the log-probability of writing the title.
    """

    id: str
    title: str
    score: float


class Seen(NamedTuple):
    """An event of a user, with the attention that it gets.

    Attributes:
      id: the item's id in the training data.
      title: the item's title.
      events_ago: how many events ago the event was; the latest event has 1.
      weight: the attention that the user tokens pay to the event, from 0 to 1. The weights of a user's events sum to at most 1.
    """

    id: str
    title: str
    events_ago: int
    weight: float


def on_mesh(method: F) -> F:
    """Return a method that runs on the devices of its model's mesh."""

    @functools.wraps(method)
    def run(self: "Personalizer", *args: Any, **settings: Any) -> Any:
        with jax.set_mesh(self.predictor.mesh):
            return method(self, *args, **settings)

    return run  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, eq=False)
class Personalizer:
    """A trained User-LLM that takes raw events; `user_llm.load` returns one.

    Attributes:
      identity: hash of everything that changes an answer (weights, rules, prompts). A `User` can be used only with the model
        whose identity it carries.
      predictor: the parameters, and the compiled programs that use them.
      vocabulary: the rules by which raw events become ids, and the catalogue of items.
      lines: the pieces that prompts are made of: the titles as tokens, and the user's history as text.
      names: the possible answers of each task that chooses among names, such as `favorite`: {task: {number: name}}.
      facts: what the model directory says about the training, for people to read.
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
        """The names of the tasks that the model was trained for, such as `next_item`."""
        return tuple(self.predictor.templates)

    @property
    def keep(self) -> int | None:
        """How many of the latest events a `User` keeps. None means all events, because prompts hold a summary of all of them."""
        lines = self.lines
        if lines.text_items and lines.kind == "summary":
            return None
        return max(self.predictor.max_events, lines.text_items)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each item in the catalogue, by the item's id in the training data."""
        return {key: number for number, key in enumerate(self.vocabulary.catalogue.keys) if number}

    @functools.cached_property
    def writer(self) -> Writer:
        """The part of the model that writes text."""
        return Writer(self.predictor, self.lines, self.names)

    @functools.cached_property
    def titles(self) -> Trie:
        """All titles in one trie: a model without a trained item head ranks items by beam search over this trie."""
        return Trie.build(self.lines.titles_as_targets())

    def encode(self, events: Any) -> User:
        """Encode one user's events; the user need not have been in the training data.

            user = model.encode([{"movieId": 12, "rating": 4.0, "timestamp": 1_700_000_000}])

        Args:
          events: a list of dicts; a pandas, polars or Arrow table; or the path of a file, a folder or a glob. Events have the column
            names and the units of the training data (`model.vocabulary.fields`). They may come in any order. The column of user
            ids may be absent.

        Returns:
          The user, with user tokens computed. An event whose item the model does not know is left out; such events are counted in
          `User.unknown`, and a warning is logged. Without any events the result is a user with no user tokens.

        Raises:
          ValueError: a column is missing, an event cannot be read, or the events are of several users.
        """
        found = self.encode_many(events)
        if len(found) > 1:
            raise ValueError(
                f"These are events of {len(found)} users: pass them to encode_many, or pass the events of one user."
            )
        fields = self.vocabulary.fields
        nobody = users.unknown_user(self.identity, self.vocabulary.schema.width, hash_key(""), fields.ticks_per_second)
        return next(iter(found.values()), nobody)

    def encode_many(self, events: Any) -> dict[str, User]:
        """Encode all users of a table or file.

            users = model.encode_many("events.parquet")   # {"u1": User, "u2": User}

        Args:
          events: as in `encode`, with the column of user ids. Without this column all events are of one user, whose id is "".

        Returns:
          The users by their ids, in the order in which the ids first occur.

        Raises:
          ValueError: a column is missing, or an event cannot be read.
        """
        read = self._read(events)
        return self.encode_read(read, range(len(read.timelines)))

    @on_mesh
    def encode_read(self, read: Read, numbers: Iterable[int]) -> dict[str, User]:
        """Encode some of the users whose events `Vocabulary.read` or `Vocabulary.gather` has read.

        Args:
          numbers: the places of the wanted users in `read.timelines.user_keys`.

        Returns:
          The users by their ids, in the order of `numbers`.
        """
        found = self._users(read, numbers, self.keep)
        return dict(zip(found, self._encoded(list(found.values())), strict=True))

    def update(self, user: User, events: Any) -> User:
        """Return a user with further events added, as if `encode` had been given all events at once.

            user = model.update(user, [{"movieId": 31, "rating": 5.0, "timestamp": 1_700_172_800}])

        The given user is not changed. An event that the user keeps already (the same item at the same time) is not added again. A
        user keeps only the latest events; an event older than those is added to `User.count` and `User.seen` alone, because the
        encoder does not read it.

        Args:
          events: as in `encode`.

        Raises:
          ValueError: the user is of another model, a column is missing, an event cannot be read, or the events are of several users.
        """
        return self.update_many({"": user}, {"": events})[""]

    @on_mesh
    def update_many(self, old: Mapping[str, User], events: Mapping[str, Any]) -> dict[str, User]:
        """Return users with further events added; see `update`.

        Args:
          old: the users, by any names that the caller gives them.
          events: the further events of each user, by the same names. A user without further events may be absent here.

        Returns:
          All users of `old` by their names, those with further events encoded again.

        Raises:
          ValueError: as in `update`, or a name in `events` is not in `old`.
        """
        fields, merged = self.vocabulary.fields, dict(old)
        for name, rows in events.items():
            if name not in old:
                raise ValueError(f"There are events of {name!r}, but no such user: encode these events first.")
            self._check(old[name])
            read = self._read(rows)
            found = list(self._users(read, range(len(read.timelines)), None).values())
            if len(found) > 1:
                raise ValueError(f"These are events of {len(found)} users: update one user by events of that user alone.")
            for more in found:
                user = self._same(old[name], more)
                merged[name] = users.joined(
                    user, more, self.vocabulary.schema, keep=self.keep, ties=fields.ties, seed=fields.seed
                )
        changed = {name: merged[name] for name in events}
        return merged | dict(zip(changed, self._encoded(list(changed.values())), strict=True))

    def recommend(self, user: User, k: int = 10, **choice: Any) -> list[Item]:
        """Return the `k` items that a user is likeliest to want next, best first.

            model.recommend(user, k=3, seen=False, deny=["12"])

        Args:
          k: the number of items.
          choice: `seen`, `allow`, `deny` and `candidates`, as in `recommend_many`, which also says when fewer items are returned.

        Raises:
          ValueError: as in `recommend_many`.
        """
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

        A ranking has fewer than `k` items where fewer are left after `seen`, `allow` and `deny`.

        Args:
          those: the users.
          k: the number of items for each user.
          seen: whether items that the user has had may be recommended.
          allow: ids of the items that may be recommended; None allows all items.
          deny: ids of items that must not be recommended.
          candidates: ids of items to rank, in place of `allow`: all of them are returned, whatever `k` is.

        Returns:
          One ranking for each user, in the order of `those`.

        Raises:
          ValueError: a user is of another model, an id is not that of an item, `k` is below 1, both `allow` and `candidates` are
            given, or the model was not trained for the task `next_item`.
        """
        if RANKING not in self.tasks:
            raise ValueError(f"This model cannot recommend: it was trained for {', '.join(self.tasks)}, and not for next_item.")
        if candidates is not None and allow is not None:
            raise ValueError("Give candidates or allow, and not both.")
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        allowed = self._allowed(allow if candidates is None else candidates, deny)
        k = k if candidates is None else int(allowed.sum())
        ranked: list[list[Item]] = [[] for _ in those]
        if not allowed.any():
            return ranked
        for indices, chosen, user in self._batches(those):
            prompts = [self.predictor.templates[RANKING].prompt(one.items) for one in chosen]
            found = k if seen else k + max(len(one.seen) for one in chosen)
            for index, one, scores in zip(indices, chosen, self._scores(prompts, user, allowed, found), strict=False):
                scores = np.where(allowed, scores, -np.inf)
                if not seen:
                    scores[one.seen] = -np.inf
                ranked[index] = self._best(scores, k)
        return ranked

    def _scores(
        self, prompts: list[Ids], user: decoder_users.User | None, allowed: Bool[np.ndarray, " V"], k: int
    ) -> Float[np.ndarray, "B V"]:
        """Return the scores of all items of the catalogue, PAD included, for each prompt.

        A trained item head scores every item. Without one, beam search among the titles of the allowed items scores the `k` whose
        titles it writes, and all other items have -inf.
        """
        known = len(self.vocabulary.catalogue.titles)
        if self.predictor.ranks:
            return meshes.fetch(self.predictor.score(RANKING, prompts, user))[:, :known]
        trie, count = self.titles, int(allowed.sum())
        if count < known - 1:
            titles = self.lines.titles_as_targets()
            trie = Trie.build({number: titles[number] for number in np.flatnonzero(allowed).tolist()})
        beams = min(max(k, self.predictor.beams), count)
        items, scores = self.predictor.choose(RANKING, prompts, user, trie, beams)
        found = np.full((len(prompts), known), -np.inf, np.float32)
        np.put_along_axis(found, items, scores, axis=1)
        return found

    def _allowed(self, allow: Collection[str] | None, deny: Collection[str]) -> Bool[np.ndarray, " V"]:
        """Return a mask over the catalogue: True where an item may be recommended. PAD (number 0) is False."""
        allowed = np.full(len(self.vocabulary.catalogue.keys), allow is None)
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
            raise ValueError(f"No item has the id {spelled[found.index(None)]!r}: ids are those of the training data.")
        return [number for number in found if number]

    def _best(self, scores: Float[np.ndarray, " V"], k: int) -> list[Item]:
        catalogue = self.vocabulary.catalogue
        order = np.argsort(-scores, kind="stable")[:k]
        return [Item(catalogue.keys[n], catalogue.titles[n], float(scores[n])) for n in order if scores[n] > -np.inf]

    def generate(self, prompt: str | None = None, user: User | None = None, *, stream: bool = False, **settings: Any) -> Any:
        r"""Write one text.

            model.generate("The next film this user watches:\n", user, max_tokens=20)
            model.generate(user=user, task="favorite")
            model.generate(user=user, chat=[{"role": "user", "content": "What should I watch?"}])

        Args:
          prompt: the text to continue. Leave it out where `task` or `chat` is given.
          user: the user whom the text is for; None for the LLM without a user.
          stream: whether to return an iterator over pieces of the text, which come as they are written.
          settings: further arguments of `generate_many`, such as `max_tokens`.

        Returns:
          The text without the prompt, or with `stream` an iterator over its pieces.

        Raises:
          ValueError: as in `generate_many`.
        """
        pieces = self._written([prompt], [user], settings)
        if stream:
            return (texts[0] for texts in pieces if texts[0])
        return "".join(texts[0] for texts in pieces)

    def generate_many(
        self, prompts: Sequence[str | None], those: Sequence[User | None] | None = None, **settings: Any
    ) -> list[str]:
        r"""Write a text after each prompt, for the user of that prompt.

            model.generate_many(["The next film:\n"] * 2, [one, other], max_tokens=20)
            model.generate_many([None] * 2, [one, other], task="review", fields={"title": "Heat (1995)", "rating": 5})

        Args:
          prompts: the texts to continue; None for each where `task` or `chat` is given.
          those: a user for each prompt, or None for the LLM without a user. If it is not given, no prompt has a user.
          task: a task of `model.tasks`, which is asked in place of a prompt.
          fields: the values that the question of `task` names, such as {"title": "Heat (1995)"}.
          chat: one conversation, which is asked for every user in place of a prompt: messages such as
            {"role": "user", "content": "Hello"}. The LLM's own chat template formats it.
          max_tokens: the most tokens that are written after a prompt. If it is not given, a task with a question (such as `review`)
            has a limit of its own, and everything else has 128.
          temperature: 0 always takes the likeliest token; a positive number draws tokens at that temperature.
          top_k, top_p, min_p: filters of the tokens that may be drawn; see `user_llm.models.sampling.Sampling`.
          seed: seed of the random draws; row n uses `seed` + n.
          stop: a list of texts. Writing ends where one of them occurs, and that text is not returned. The LLM's own stop tokens end
            writing too.

        A task whose answer is one of several names, such as `favorite`, returns the likeliest name; it ignores the arguments from
        `max_tokens` on.

        Returns:
          One text for each prompt, without the prompt.

        Raises:
          ValueError: a setting is out of range, the numbers of prompts and users differ, a user is of another model, the model was
            not trained for the task, a field of the task is missing, the LLM has no chat template, or not exactly one of prompt,
            task and chat is given.
        """
        users_of = [None] * len(prompts) if those is None else list(those)
        if len(prompts) != len(users_of):
            raise ValueError(f"{len(prompts)} prompts for {len(users_of)} users: give a user, or None, for each.")
        size, seed = self.predictor.batch_size, settings.pop("seed", 0)
        texts: list[str] = []
        for first in range(0, len(prompts), size):
            chosen, of_chosen = prompts[first : first + size], users_of[first : first + size]
            pieces = self._written(chosen, of_chosen, settings | {"seed": seed + first})
            texts += ["".join(parts) for parts in zip(*pieces, strict=True)]
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
        r"""Return the log-probability of each text as the continuation of a prompt.

            model.score("The next film this user watches:\n", ["Heat (1995)\n", "Alien (1979)\n"], user)   # [-9.1, -12.4]

        A log-probability is the natural logarithm, summed over the tokens of the text. It is not divided by the number of tokens, so
        longer texts tend to score lower.

        Args:
          prompt: the text before each of `texts`.
          texts: a list of texts. End each with "\n" to score that it ends there.
          user: the user for whom the texts are scored; None for the LLM without a user.

        Raises:
          ValueError: the prompt has no tokens, a text is empty, no text is given, or the user is of another model.
        """
        if user is not None:
            self._check(user)
        if isinstance(texts, str):
            raise ValueError(f"{texts!r} is one text: pass a list of texts.")
        row = self.writer.row(prompt, user, None, {}, None)
        ids = [self.tokenizer.encode(text) for text in texts]
        leading = self.writer.leading([row])
        decoder, inputs, sizes, kv = self.predictor.decoding(
            *self.writer.padded([row]), batch.present(self.predictor, [user]), leading
        )
        return scoring.score(*decoder, inputs, [ids], lengths=meshes.fetch(sizes).tolist(), user=kv)[0]

    @on_mesh
    def explain(self, user: User, k: int | None = None) -> list[Seen]:
        """Return the events that the encoder read, ordered by how much attention the user tokens pay to them.

            model.explain(user, 2)   # [Seen(id="31", title="Heat (1995)", events_ago=1, weight=0.6), ...]

        A weight is the attention to an event in the last layer of the resampler, averaged over user tokens and heads. It says where
        the resampler looked; it does not say how an event changed an answer.

        Args:
          k: the number of events; None for all.

        Raises:
          ValueError: the user is of another model, `k` is below 1, or the model has no resampler. Without a resampler each event is a user token of
            its own, and nothing attends to it.
        """
        self._check(user)
        if k is not None and k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        if self.predictor.config.resampler is None:
            raise ValueError("This model has no resampler: each event is a user token of its own, and nothing attends to it.")
        (_, rows, padded), *_ = length_batches(np.array([batch.read_events(self.predictor, user)]), 1, self.predictor.bucket)
        events, lengths = batch.histories(self.predictor, [user], padded)
        weights = self.predictor.attended(events, lengths)[0][: lengths[0]]
        catalogue, read = self.vocabulary.catalogue, user.items[len(user.items) - int(lengths[0]) :]
        order = np.argsort(-weights, kind="stable")[:k]
        return [Seen(catalogue.keys[read[n]], catalogue.titles[read[n]], len(read) - int(n), float(weights[n])) for n in order]

    def _read(self, events: Any) -> Read:
        """Return the events as timelines, and log how many events were left out."""
        read = self.vocabulary.read(events)
        if left_out := int(np.sum(read.unknown)):
            logging.warning("%d events are left out: the model does not know their items.", left_out)
        return read

    def _users(self, read: Read, numbers: Iterable[int], keep: int | None) -> dict[str, User]:
        """Return users by their ids, with events but without user tokens."""
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
        """Return the same users with their user tokens computed."""
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
        """Yield `those` in batches of users with similar numbers of tokens.

        Yields:
          The places of a batch's users in `those`; the users, with the last one repeated until the batch is full; and what the
          decoder reads of them.
        """
        for user in those:
            self._check(user)
        lengths = np.array([len(user.tokens) for user in those], np.int64)
        for indices, rows, _ in length_batches(lengths, batch.rows(self.predictor, len(those))):
            chosen = [those[row] for row in rows]
            yield indices, chosen, batch.present(self.predictor, chosen)

    @staticmethod
    def _same(user: User, more: User) -> User:
        """Return the user to whom further events belong, as the column of user ids names them, if it is there.

        Raises:
          ValueError: the events are of another user.
        """
        nobody = hash_key("")
        if nobody in (user.key, more.key):
            return dataclasses.replace(user, key=more.key) if user.count == 0 else user
        if user.key != more.key:
            raise ValueError(
                "These events are of another user, by their column of user ids: update each user by their own events."
            )
        return user

    def _check(self, user: User) -> None:
        if not isinstance(user, User):
            raise ValueError(f"{type(user).__name__} is no user: pass a User, such as encode returns.")
        if user.model != self.identity:
            raise ValueError(
                f"This user was encoded by the model {user.model}, and this one is {self.identity}: encode their events again."
            )
