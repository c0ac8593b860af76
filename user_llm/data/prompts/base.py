r"""What the prompts of all tasks share: lines of token ids, a user's history as text, and templates that join them to prompts.

    <instruction> \n <line of history> \n ... <line of history> \n <question> \n <target> \n

Every line ends in the end token, which is one newline. The instruction, the history and the question may each be absent. The
*answer position* is the last token before a target: from there an item is ranked or the target is written.

The prompt of User-LLM has no history as text, because the user tokens stand for the history. The text-prompt baseline has the last
10 or 50 titles as text and no user tokens. The paper's hybrid has both.

A *template* makes a prompt from the item ids of any history, and needs no dataset. *Examples* belong to a dataset: they say where
in it a task can be asked, and what the answer is.

Axis letters: T tokens of a row, E events of a history, P answer positions of a row, B rows of a batch, n any number.
"""

import copy
import dataclasses
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from user_llm.data.timelines import Catalogue
from user_llm.data.tokenizer import Tokenizer

Ids = Int[np.ndarray, "T"]
Items = Int[np.ndarray, "E"]  # the item ids of a history, oldest first
Whose = tuple[int, int]  # a history: of this user the events before this end


@dataclasses.dataclass(frozen=True)
class TextRow:
    """A prompt and its target as tokens: one row of training text.

    Attributes:
      ids: the token ids, without padding.
      answers: the answer positions, as indices into `ids`.
      items: the item id to rank at each answer position; 0 where the target is only text.
    """

    ids: Ids
    answers: Int[np.ndarray, " P"]
    items: Int[np.ndarray, " P"]


class Template(Protocol):
    """What makes the prompts of a task.

    Attributes:
      settings: the arguments that the template was made with, without `lines`.
      lines: titles and histories as lines of token ids.
      fields: the names of the values that a prompt holds besides the history, such as `title`.
      max_tokens: the most tokens of a prompt and its target together.
      shared_tokens: the number of tokens that all prompts start with. The answer position is not counted.
    """

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def lines(self) -> "Lines": ...

    @property
    def fields(self) -> tuple[str, ...]: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def shared_tokens(self) -> int: ...

    def prompt(self, items: Items, **fields: object) -> Ids:
        """Return the prompt for a user with this history, up to and including the answer position."""


class Examples(Protocol):
    """The questions of a task about the users of a dataset.

    A question is named by a user and an `end`, which is an index into the user's events. Its history is the events before `end`.

    Attributes:
      ranks: whether the target is an item. Such an item is ranked by the item head, besides being written.
      template: what makes the prompts.
    """

    ranks: bool

    @property
    def template(self) -> Template: ...

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the prompt at `end` with its target, for training; None if there is no target."""

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return a training row from the events `start` to `end`, both included, for a model without an encoder."""

    def prompt(self, user: int, end: int, whose: "Whose | None" = None) -> Ids:
        """Return the prompt at `end`, up to and including the answer position.

        Args:
          whose: the user and the end whose history stands in the prompt; the question's own for None.
        """

    def answer(self, user: int, end: int) -> str:
        """Return the target at `end` as text."""

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the users and the ends of the questions with a target in a part of the split (`validation` or `test`)."""


class Lines:
    """Titles and histories as lines of token ids.

    Args:
      max_title_tokens: the most tokens of a title in prompts and training targets; longer titles are cut. Titles in the trie that
        ranks items are never cut.
      history: how a history is written as text: `titles` is one line for each event, `summary` is one line for the whole history.
      text_items: how many of the latest events are written as text; 0 for none. A summary names these events and counts all events.

    Attributes:
      end_id: the end token of a line.
      start: the tokens that every prompt begins with: the BOS token, or nothing.
      titles: the tokens of every item's title, without the end token.
      title_lines: every item's title as a line.
    """

    def __init__(self, tokenizer: Tokenizer, catalogue: Catalogue, *, max_title_tokens: int, history: str, text_items: int):
        if history not in ("titles", "summary"):
            raise ValueError(f"Unknown kind of history {history!r}: choose titles or summary.")
        self.tokenizer, self.catalogue = tokenizer, catalogue
        self.max_title_tokens, self.kind, self.text_items = max_title_tokens, history, text_items
        # Lines are encoded one by one and then joined, so that a title has the same tokens wherever it stands.
        ends = tokenizer.encode("\n")
        if not ends:
            raise ValueError("The tokenizer has no token for the end of a line.")
        self.end_id = ends[-1]
        self.start = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
        self.titles = tokenizer.encode_all(catalogue.titles)
        self.title_lines = [self._title_line(title) for title in self.titles]

    def extended(self, catalogue: Catalogue) -> "Lines":
        """Return the lines of a catalogue that has further items behind those of this one."""
        more = copy.copy(self)
        titles = self.tokenizer.encode_all(catalogue.titles[len(self.titles) :])
        more.catalogue, more.titles = catalogue, [*self.titles, *titles]
        more.title_lines = [*self.title_lines, *map(self._title_line, titles)]
        return more

    def _title_line(self, title: Ids) -> Ids:
        return np.array([*title[: self.max_title_tokens], self.end_id], np.int32)

    def line(self, text: str, most: int | None = None) -> Ids:
        """Return the first `most` tokens of a text, and the end token; an empty array for an empty text."""
        ids = self.tokenizer.encode(text)[:most] if text else []
        return np.array([*ids, self.end_id] if ids else [], np.int32)

    def title(self, item: int) -> Ids:
        """Return an item's title as a line."""
        return self.title_lines[item]

    def titles_as_targets(self) -> dict[int, list[int]]:
        """Return the tokens of every item's whole title, with the end token, by item id."""
        return {item: [*self.titles[item].tolist(), self.end_id] for item in range(1, len(self.titles))}

    def first(self, end: int) -> int:
        """Return the index of the oldest event that the text of a history of `end` events needs."""
        return 0 if self.text_items and self.kind == "summary" else max(end - self.text_items, 0)

    def history(self, items: Items) -> list[Ids]:
        """Return a history as lines: the titles of its latest events, or a summary of the whole history."""
        if not self.text_items or not len(items):
            return []
        if self.kind == "summary":
            return [self.line(self.summary(items))]
        return [self.title(item) for item in items[-self.text_items :]]

    def summary(self, items: Items) -> str:
        """Return a summary of a history: the number of events, the most frequent categories and items, and the latest titles."""
        catalogue = self.catalogue
        parts = [f"{len(items)} events"]
        for name, bag in sorted(catalogue.multi.items()):
            ids, counts = np.unique(bag[items], return_counts=True)
            most = sorted(zip(-counts[ids > 0], ids[ids > 0], strict=True))[:5]
            if most:
                parts.append(f"{name}: " + ", ".join(f"{catalogue.vocab[name][i]} {-count}" for count, i in most))
        again = [(item, count) for item, count in Counter(items.tolist()).most_common(3) if count > 1]
        if again:
            parts.append("most often: " + ", ".join(f"{catalogue.titles[item]} {count} times" for item, count in again))
        parts.append("last: " + ", ".join(catalogue.titles[item] for item in items[::-1][: self.text_items]))
        return "; ".join(parts)


def fitting(lines: Sequence[Ids], budget: int) -> int:
    """Return the number of oldest lines to leave out, so that the other lines have at most `budget` tokens."""
    drop, total = 0, sum(map(len, lines))
    while total > budget:
        total -= len(lines[drop])
        drop += 1
    return drop


class Question:
    """A template whose target is a text, such as the name of a class or a review.

    Args:
      lines: titles and histories as lines of token ids.
      instruction: the first line of every prompt; may be empty.
      question: the last line of every prompt; may be empty. It may hold names in braces, such as {title}, which become the
        template's `fields`.
      max_tokens: the most tokens of a prompt and its target together.
      max_target_tokens: the most tokens of a target; longer targets are cut.

    Raises:
      ValueError: the instruction and the question are both empty, or braces hold anything but a name.
    """

    def __init__(self, lines: Lines, *, instruction: str, question: str, max_tokens: int, max_target_tokens: int):
        self.lines, self.max_tokens, self.max_target_tokens = lines, max_tokens, max_target_tokens
        self.question = question
        self.settings = dict(
            instruction=instruction, question=question, max_tokens=max_tokens, max_target_tokens=max_target_tokens
        )
        holes = [hole for _, *hole in string.Formatter().parse(question) if hole[0] is not None]
        # Braces such as {title.x} or {title:>999999999} are refused: the first reads an attribute, the second fills memory.
        for field, form, conversion in holes:
            if not str(field).isidentifier() or form or conversion:
                raise ValueError(f"The question {question!r} has braces around {field!r}: a name alone may stand there.")
        self.fields = tuple(str(field) for field, _, _ in holes)
        self.instruction = np.concatenate([lines.start, lines.line(instruction)]).astype(np.int32)
        self.shared_tokens = len(self.instruction) - (not question)
        if not (instruction or question):
            raise ValueError("A prompt needs an instruction or a question: both are empty.")

    @classmethod
    def of(cls, lines: Lines, settings: Any) -> "Question":
        """Return the template that a task's settings describe; they have the other arguments as attributes."""
        return cls(
            lines, instruction=settings.instruction, question=settings.question, max_tokens=settings.max_tokens,
            max_target_tokens=settings.max_target_tokens,
        )  # fmt: skip

    def ask(self, **fields: object) -> Ids:
        """Return the question as a line, with the values of its fields. A title that is too long is cut."""
        if "title" in fields:
            title = self.lines.tokenizer.encode(str(fields["title"]))[: self.lines.max_title_tokens]
            fields["title"] = self.lines.tokenizer.decode(title)
        return self.lines.line(self.question.format(**fields))

    def room(self, question: Ids) -> int:
        """Return the number of tokens that are left for the history beside the instruction, a question and its target.

        Raises:
          ValueError: even without a history the tokens are more than `max_tokens`.
        """
        budget = self.max_tokens - len(self.instruction) - len(question) - self.max_target_tokens - 1
        if budget < 0:
            raise ValueError(
                f"The question {self.lines.tokenizer.decode(question)!r} and {self.max_target_tokens} tokens of target do not fit "
                f"{self.max_tokens} tokens: raise max_tokens."
            )
        return budget

    def prompt(self, items: Items, **fields: object) -> Ids:
        """Return the prompt. The oldest lines of the history are left out, so that the target fits into `max_tokens`."""
        question, history = self.ask(**fields), self.lines.history(items)
        kept = history[fitting(history, self.room(question)) :]
        return np.concatenate([self.instruction, *kept, question]).astype(np.int32)

    def row(self, items: Items, target: str, **fields: object) -> TextRow | None:
        """Return the prompt with its target; None if the target is empty."""
        ids = self.lines.line(target, self.max_target_tokens)
        if not len(ids):
            return None
        prompt = self.prompt(items, **fields)
        return TextRow(np.concatenate([prompt, ids]), np.array([len(prompt) - 1], np.int32), np.zeros(1, np.int32))


def pad_rows(rows: Sequence[Ids], length: int, count: int | None = None) -> Int[np.ndarray, "B T"]:
    """Return rows right-padded with 0 to `length` tokens. Rows of zeros are added until there are `count` rows."""
    out = np.zeros((len(rows) if count is None else count, length), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
