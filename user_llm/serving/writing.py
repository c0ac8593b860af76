"""Text generation for users: after a free prompt, for a task that the model was trained for, or in a conversation."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from user_llm.common import mesh as meshes
from user_llm.common.errors import check_count
from user_llm.data.prompts.base import Ids, Lines, Question, Template, pad_rows
from user_llm.data.tokenizer import Tokenizer
from user_llm.models import score as scoring
from user_llm.models.generate import stream
from user_llm.models.prefill import bucket
from user_llm.models.sampling import Sampling
from user_llm.models.trie import Trie
from user_llm.serving import batch
from user_llm.serving.predictor import Predictor
from user_llm.serving.user import User

CHUNK = 8  # tokens of each row between two pieces of a stream
MAX_TOKENS = 128  # the most tokens of a text where the caller names no limit


@dataclasses.dataclass(frozen=True)
class Writer:
    """The part of a `Personalizer` that writes text.

    Attributes:
      names: the possible answers of each task that chooses among names, such as `favorite`: {task: {number: name}}.
    """

    predictor: Predictor
    lines: Lines
    names: Mapping[str, Mapping[int, str]]

    @property
    def tokenizer(self) -> Tokenizer:
        """The LLM's tokenizer."""
        return self.lines.tokenizer

    def pieces(
        self,
        prompts: Sequence[str | None],
        those: Sequence[User | None],
        *,
        task: str = "",
        fields: Mapping[str, Any] | None = None,
        chat: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[list[str]]:
        """Yield lists that hold the next piece of each prompt's text; a piece may be empty.

        The arguments and errors are those of `Personalizer.generate_many`.
        """
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop={stop!r}: pass a list of texts that are not empty.")
        check_count("max_tokens", max_tokens, least=0)
        sampling = Sampling(temperature, top_k, top_p, min_p)
        template = self.template(task, fields) if task else None
        rows = [self.row(prompt, user, template, fields or {}, chat) for prompt, user in zip(prompts, those, strict=True)]
        if task in self.names:
            return iter([self._named(task, rows, those)])
        # A batch has one of few numbers of rows; those that fill it up are left out of what is yielded.
        spare = batch.rows(self.predictor, len(rows)) - len(rows)
        count, rows, those = len(rows), [*rows, *[rows[-1]] * spare], [*those, *[those[-1]] * spare]
        if isinstance(template, Question):
            max_tokens, stops = max_tokens or template.max_target_tokens, [self.lines.end_id]
        else:
            max_tokens, stops = max_tokens or MAX_TOKENS, [self.lines.end_id] if task else list(self.tokenizer.stop_ids)
        leading = self.predictor.leading(task) if task else self.leading(rows, chat)
        pieces = self._stream(rows, those, leading, max_tokens, sampling, seed, stops, tuple(stop))
        return (texts[:count] for texts in pieces)

    def texts(
        self, prompts: Sequence[str | None], those: Sequence[User | None], *, seed: int = 0, **settings: Any
    ) -> list[str]:
        """Return a text for each prompt. They are written in batches of the model's batch size; row n draws with `seed` + n."""
        size = self.predictor.batch_size
        found: list[str] = []
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            pieces = self.pieces(prompts[part], those[part], seed=seed + first, **settings)
            found += ["".join(parts) for parts in zip(*pieces, strict=True)]
        return found

    def score(self, prompt: str, texts: Sequence[str], user: User | None) -> Float[np.ndarray, " n"]:
        """Return the log-probability of each text after the prompt. The arguments and errors are those of `Personalizer.score`."""
        if isinstance(texts, str):
            raise ValueError(f"{texts!r} is one text: pass a list of texts.")
        row = self.row(prompt, user, None, {}, None)
        ids = [self.tokenizer.encode(text) for text in texts]
        decoder, inputs, sizes, kv = self.predictor.decoding(
            *self.padded([row]), batch.present(self.predictor, [user]), self.leading([row])
        )
        return scoring.score(*decoder, inputs, [ids], lengths=meshes.fetch(sizes).tolist(), user=kv)[0]

    def leading(self, rows: Sequence[Ids], chat: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Return how many tokens of free texts, or of a conversation, stand before a soft prompt.

        In a conversation a soft prompt stands in front of the text of the user's first message; see `Tokenizer.chat_around`. In free
        texts it stands behind the start token. Where a text does not begin with that token, it stands at the beginning of all of them.
        """
        if chat is not None and self.predictor.config.soft_prompt and (before := self.tokenizer.chat_around(chat)[0]):
            return len(before)
        start = self.lines.start
        begins = all(np.array_equal(row[: len(start)], start) for row in rows)
        return len(start) if self.predictor.after_instruction and begins else 0

    def template(self, task: str, fields: Mapping[str, Any] | None) -> Template:
        """Return what asks a task.

        Raises:
          ValueError: the model was not trained for the task, or a value that the task's question names is missing.
        """
        if task not in self.predictor.templates:
            raise ValueError(
                f"This model was not trained for the task {task!r}, but for {', '.join(self.predictor.templates)}."
            )
        template = self.predictor.templates[task]
        if missing := set(template.fields) - set(fields or {}):
            raise ValueError(f"The question of {task} names {', '.join(sorted(missing))}: give them as fields={{...}}.")
        return template

    def row(
        self,
        prompt: str | None,
        user: User | None,
        template: Template | None,
        fields: Mapping[str, Any],
        chat: Sequence[Mapping[str, Any]] | None,
    ) -> Ids:
        """Return the token ids of a prompt, of a task's prompt or of a conversation.

        Raises:
          ValueError: not exactly one of the three is given, the prompt has no tokens, or it has one that the LLM lacks.
        """
        if (prompt is not None) + (template is not None) + (chat is not None) != 1:
            raise ValueError("Give one of a prompt, a task and a chat.")
        if template is not None:
            return template.prompt(np.zeros(0, np.int32) if user is None else user.items, **fields)
        if chat is not None:
            parts = self.tokenizer.chat_around(chat) if self.predictor.config.soft_prompt else (self.tokenizer.chat(chat),)
            row = np.array([token for part in parts for token in part], np.int32)
        else:
            row = np.array([*self.lines.start, *self.tokenizer.encode(prompt or "")], np.int32)
        if not len(row):
            raise ValueError("The prompt has no tokens: write at least one character.")
        if row.max() >= (rows := self.predictor.config.decoder.vocab_size):  # a template can write any special token
            raise ValueError(f"The prompt has the token {row.max()}, and the LLM's table {rows} rows: write it without.")
        return row

    def padded(self, rows: Sequence[Ids]) -> tuple[Array, Array]:
        """Return rows of tokens right-padded to a common width, and the length of each row.

        The width is one of few, so that few programs are compiled.
        """
        lengths = np.array([len(row) for row in rows], np.int32)
        return meshes.put_rows((pad_rows(rows, bucket(int(lengths.max()))), lengths), self.predictor.mesh)

    def _named(self, task: str, rows: Sequence[Ids], those: Sequence[User | None]) -> list[str]:
        """Return, for each row, the name that is the likeliest answer to the task."""
        names = self.names[task]
        trie = Trie.build({number: self.lines.line(name).tolist() for number, name in names.items()})
        with jax.set_mesh(self.predictor.mesh):
            found = self.predictor.choose(
                task, rows, batch.present(self.predictor, those), trie, min(len(names), self.predictor.beams)
            )[0]
        return [names[int(row[0])] for row in found]

    def _stream(
        self,
        rows: Sequence[Ids],
        those: Sequence[User | None],
        leading: int,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_ids: Sequence[int],
        stop: tuple[str, ...],
    ) -> Iterator[list[str]]:
        """Yield lists that hold the next piece of each row's text.

        A piece ends at the end of a character. It never ends with the beginning of a stop text.

        Args:
          leading: the number of each row's tokens that stand before a soft prompt.
          stop_ids: tokens that end a row.
          stop: texts that end a row.
        """
        texts = [Written(self.tokenizer, frozenset(stop_ids), stop) for _ in rows]
        with jax.set_mesh(self.predictor.mesh):
            decoder, inputs, sizes, kv = self.predictor.decoding(
                *self.padded(rows), batch.present(self.predictor, those), leading
            )
            pieces = stream(
                *decoder, inputs, lengths=meshes.fetch(sizes).tolist(), max_tokens=max_tokens, sampling=sampling,
                seeds=[seed + n for n in range(len(rows))], stop_ids=stop_ids, user=kv, chunk=CHUNK,
            )  # fmt: skip
        while True:
            with jax.set_mesh(self.predictor.mesh):
                piece = next(pieces, None)
            written = [[] for _ in rows] if piece is None else piece.rows()
            yield [text.more(row, ended=piece is None) for text, row in zip(texts, written, strict=True)]
            if piece is None or not any(text.open for text in texts):
                return


@dataclasses.dataclass
class Written:
    """A text while it is being written.

    Attributes:
      stop_ids: tokens that end the text; they are not part of it.
      stop: texts that end the text; they are not part of it.
      tokens: all tokens written so far.
      said: the part of the text that has been returned to the caller.
      open: False once a stop text has been written.
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    said: str = ""
    open: bool = True

    def more(self, tokens: Sequence[int], *, ended: bool) -> str:
        """Return what further tokens add to the text.

        An incomplete character is held back until its other tokens come. So is the beginning of what may become a stop text.

        Args:
          ended: whether these tokens are the last ones; nothing is held back then.
        """
        if not self.open:
            return ""
        self.tokens += [token for token in tokens if token not in self.stop_ids]
        text = self.tokenizer.decode(self.tokens)
        stops = [place for place in map(text.find, self.stop) if place >= 0]
        if stops:
            text, self.open = text[: min(stops)], False
        elif not ended:
            text = text[: len(text) - self._waiting(text)].rstrip("\ufffd")
        added = text[len(self.said) :]
        self.said += added
        return added

    def _waiting(self, text: str) -> int:
        """Return the number of characters at the end of the text that may be the beginning of a stop text."""
        sizes = range(1, max(map(len, self.stop), default=0))
        return max((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self.stop)), default=0)
