"""The trained model as a library: raw events go in; recommendations, texts, scores and explanations come out.

    model = user_llm.load("runs/x/user_llm/model")
    user = model.encode(events)              # once for each user; a user can be stored, and updated with later events
    model.recommend(user, k=10)

A `Personalizer` needs neither the training run nor its dataset. Its parts do the work: `reading.py` makes users of raw events,
`ranking.py` ranks items, `writing.py` writes texts, `explaining.py` says what the user tokens look at. All of them compute through
`predictor.py`, and so does evaluation inside a training run.
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from user_llm.data.new_items import extended
from user_llm.data.prompts.base import Lines
from user_llm.data.tokenizer import Tokenizer
from user_llm.data.vocabulary import Read, Vocabulary
from user_llm.models.transitions import LAST
from user_llm.serving.explaining import Seen, attended
from user_llm.serving.growth import NO_MARKS, Growth
from user_llm.serving.predictor import Predictor, on_mesh
from user_llm.serving.ranking import Item, Ranker
from user_llm.serving.reading import Reader
from user_llm.serving.settings import kind_of, template
from user_llm.serving.user import User, check_user
from user_llm.serving.writing import Writer


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
      growth: what `add_items` and `save` need; None for a model that was not loaded from a directory.
    """

    identity: str
    predictor: Predictor
    vocabulary: Vocabulary
    lines: Lines
    names: Mapping[str, Mapping[int, str]]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    growth: Growth | None = None

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
        return max(self.predictor.max_events, lines.text_items, LAST if self.predictor.transitions else 0)

    @functools.cached_property
    def reader(self) -> Reader:
        """The part of the model that makes users of raw events."""
        return Reader(self.identity, self.predictor, self.vocabulary, self.keep, self.mark)

    @functools.cached_property
    def ranker(self) -> Ranker:
        """The part of the model that ranks items."""
        return Ranker(self.predictor, self.lines)

    @functools.cached_property
    def writer(self) -> Writer:
        """The part of the model that writes text."""
        return Writer(self.predictor, self.lines, self.names)

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
        return next(iter(found.values()), self.reader.nobody())

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
        read = self.reader.read(events)
        return self.encode_read(read, range(len(read.timelines)))

    @on_mesh
    def encode_read(self, read: Read, numbers: Sequence[int]) -> dict[str, User]:
        """Encode some of the users whose events `Vocabulary.read` or `Vocabulary.gather` has read.

        Args:
          numbers: the places of the wanted users in `read.timelines.user_keys`.

        Returns:
          The users by their ids, in the order of `numbers`.
        """
        found = self.reader.users(read, numbers, self.keep)
        return dict(zip(found, self.reader.encoded(list(found.values())), strict=True))

    def update(self, user: User, events: Any) -> User:
        """Return a user with further events added, as if `encode` had been given all events at once.

            user = model.update(user, [{"movieId": 31, "rating": 5.0, "timestamp": 1_700_172_800}])

        The given user is not changed. Events that the user has already are not added again, so that an update may be repeated. A user
        keeps the latest events; these are known by their item and time (in ticks of the training data). Of older events, and of
        events with an unknown item, the user keeps only the time of the latest one. A further event that may be one of them is taken
        for one, and is not counted: an event that comes before the kept events, is not later than that time, and has an item that
        the user has had; and an event with an unknown item that is not later than that time. `User.unknown` never falls: an event that comes
        again, once its item was added, is counted among the events as well.

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
        for name in events:
            if name not in old:
                raise ValueError(f"There are events of {name!r}, but no such user: encode these events first.")
            self.check(old[name])
        changed = {name: self.reader.updated(old[name], rows) for name, rows in events.items()}
        return dict(old) | dict(zip(changed, self.reader.encoded(list(changed.values())), strict=True))

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
          candidates: ids of items to rank, in place of `allow`: all that `seen` and `deny` leave of them are returned, whatever `k` is.

        Returns:
          One ranking for each user, in the order of `those`.

        Raises:
          ValueError: a user is of another model, an id is not that of an item, `k` is below 1, both `allow` and `candidates` are
            given, or the model was not trained for the task `next_item`.
        """
        for user in those:
            self.check(user)
        return self.ranker.rankings(those, k, seen=seen, allow=allow, deny=deny, candidates=candidates)

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
        self._check([user])
        pieces = self.writer.pieces([prompt], [user], **settings)
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
            {"role": "user", "content": "Hello"}. The LLM's own chat template formats it, and a soft prompt
            stands in front of the text of the first message whose role is "user".
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
        self._check(users_of)
        return self.writer.texts(prompts, users_of, **settings)

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
        self._check([user])
        return self.writer.score(prompt, texts, user)

    @on_mesh
    def explain(self, user: User, k: int | None = None) -> list[Seen]:
        """Return the events that the encoder read, ordered by how much attention the user tokens pay to them.

            model.explain(user, 2)   # [Seen(id="31", title="Heat (1995)", events_ago=1, weight=0.6), ...]

        A weight is the attention to an event in the last layer of the resampler, averaged over user tokens and heads. It says where
        the resampler looked; it does not say how an event changed an answer.

        Args:
          k: the number of events; None for all.

        Raises:
          ValueError: the user is of another model, `k` is below 1, or the model has no resampler. Without a resampler each event is a
            user token of its own, and nothing attends to it.
        """
        self.check(user)
        return attended(self.predictor, self.vocabulary.catalogue, user, k)

    @on_mesh
    def add_items(self, items: Any) -> "Personalizer":
        """Return the same model with further items, which can be encoded and recommended at once. Nothing is trained.

            model = model.add_items([{"id": "m901", "title": "Heat (1995)", "genres": ["Crime"]}])

        An item is placed among those of the training by the words of its title and its categories. No step of
        the transitions leads to it. A model that has transitions scores it there like the rarest item of the training, and by its words.

        The given model is not changed, and its users can be used with the result. A user's earlier events with such an item do not count
        until they are given to `encode` or `update` again. `save` keeps the added items.

        Args:
          items: a list of dicts with the keys `id`, `title` and the names of the model's bags of categories (such as `genres`), all but
            the id optional; a pandas, polars or Arrow table with these columns; or the path of a Parquet file with them, such as a
            `catalogue.parquet`. An item that the model knows may be given again as it is.

        Raises:
          ValueError: a value cannot be read, a title is blank, the model knows an item of the same id with another title or other
            categories, the model's encoder is not one of this package, or the model was not loaded from a directory.
        """
        catalogue = extended(self.vocabulary.catalogue, items, self.vocabulary.schema)
        if catalogue is self.vocabulary.catalogue:
            return self
        growth, predictor = self._growth().grown(self.predictor, catalogue)
        lines, vocabulary = self.lines.extended(catalogue), self.vocabulary.extended(catalogue)
        templates = {
            task: template(lines, task, {"kind": kind_of(of), **of.settings}) for task, of in predictor.templates.items()
        }
        graph = predictor.transitions and predictor.transitions.extended(catalogue)
        predictor = dataclasses.replace(predictor, templates=templates, transitions=graph)
        return dataclasses.replace(self, predictor=predictor, vocabulary=vocabulary, lines=lines, growth=growth)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the model, with the items that were added, to a directory that `user_llm.load` loads. A model directory there is replaced.

        Raises:
          ValueError: the model was not loaded from a directory, that directory is gone, altered or another model's by now, or something
            else than a model is where it would be written.
        """
        self._growth().save(Path(directory), self.predictor, self.vocabulary.catalogue)

    @property
    def marks(self) -> dict[str, int]:
        """The marks of the items that were added; see `growth.py`."""
        return self.growth.marks if self.growth else NO_MARKS

    @property
    def mark(self) -> str:
        """The mark of all items that were added; empty if there are none."""
        return next(reversed(self.marks))

    def check(self, user: Any) -> None:
        """Check that this model has encoded a user.

        Raises:
          ValueError: the user is of another model, or of one with other added items, or is no `User` at all.
        """
        check_user(user, self.identity, self.marks)

    def _growth(self) -> Growth:
        if self.growth is None:
            raise ValueError("This model was not loaded from a directory: load it by user_llm.load first.")
        return self.growth

    def _check(self, those: Sequence[User | None]) -> None:
        for user in those:
            if user is not None:
                self.check(user)
