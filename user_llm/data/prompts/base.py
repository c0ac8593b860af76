r"""What the prompts of all tasks share: lines of token ids, a user's history as text, and the templates that put them together.

    <instruction> \n <line of history> \n ... <line of history> \n <question> \n <target> \n

Every line ends in the end token, one newline; instruction, history and question may each be absent. The token before a target is
the *answer position*: from there an item is ranked or the target is written. With no events as text this is the prompt of
User-LLM; with the last 10 or 50 titles it is the text-prompt baseline; with both, the paper's hybrid.

A *template* knows no dataset: it makes a prompt of the item ids of a history, whoever's it is. *Examples* know a dataset: where in
it a task can be asked, and what the answer is.
"""

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
Items = Int[np.ndarray, "E"]  # item ids of a history, oldest first


@dataclasses.dataclass(frozen=True)
class TextRow:
    """One tokenised row.

    Attributes:
      ids: the tokens, unpadded.
      answers: the answer positions.
      items: the item to rank at each of them; 0 where the target is text alone.
    """

    ids: Ids
    answers: Int[np.ndarray, " P"]
    items: Int[np.ndarray, " P"]


class Template(Protocol):
    """How a task's prompts are put together.

    Attributes:
      fields: what a prompt holds besides the history, such as `title`.
      max_tokens: the most tokens of a prompt and its target.
      shared_tokens: how many tokens all prompts start with, the answer position left out.
      settings: what the template was made of besides its `lines`.
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
        """Return the prompt about a user who has had these items, oldest first, up to its answer position."""


class Examples(Protocol):
    """Where in a dataset a task can be asked. An `end` is a number of events: the history is all of the user's events before it.

    Attributes:
      ranks: whether the target is an item, to be ranked too.
    """

    ranks: bool

    @property
    def template(self) -> Template: ...

    def row(self, user: int, end: int) -> TextRow | None:
        """Return the training row with its target, or None where the task has none."""

    def stretch(self, user: int, start: int, end: int, rng: np.random.Generator) -> TextRow | None:
        """Return a training row out of the events [start, end] of a user whom no encoder shows."""

    def prompt(self, user: int, end: int) -> Ids:
        """Return the row up to its answer position."""

    def answer(self, user: int, end: int) -> str:
        """Return what is wanted."""

    def targets(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the (users, ends) of a part of the split (`validation`, `test`) that have a target."""


class Lines:
    """Text as lines of token ids: titles, encoded once, and a user's history.

    Args:
      max_title_tokens: longer titles are cut in prompts and training targets, never in the ranking trie.
      history: how events stand as text: `titles`, or `summary`, one line of prose.
      text_items: the most recent events that do; 0 for none. A summary names these, and counts all.
    """

    def __init__(self, tokenizer: Tokenizer, catalogue: Catalogue, *, max_title_tokens: int, history: str, text_items: int):
        if history not in ("titles", "summary"):
            raise ValueError(f"Unknown kind of history {history!r}: choose titles or summary.")
        self.tokenizer, self.catalogue = tokenizer, catalogue
        self.max_title_tokens, self.kind, self.text_items = max_title_tokens, history, text_items
        # Encoded apart and joined, so that a title has the same tokens wherever it stands.
        ends = tokenizer.encode("\n")
        if not ends:
            raise ValueError("The tokenizer has no token for the end of a line.")
        self.end_id = ends[-1]
        self.start = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
        self.titles = tokenizer.encode_all(catalogue.titles)
        self.title_lines = [np.array([*title[:max_title_tokens], self.end_id], np.int32) for title in self.titles]

    def line(self, text: str, most: int | None = None) -> Ids:
        """Return a text's first `most` tokens and the end token; nothing for no text."""
        ids = self.tokenizer.encode(text)[:most] if text else []
        return np.array([*ids, self.end_id] if ids else [], np.int32)

    def title(self, item: int) -> Ids:
        """Return an item's title as a line."""
        return self.title_lines[item]

    def titles_as_targets(self) -> dict[int, list[int]]:
        """Return the whole title of every item id, with its end token."""
        return {item: [*self.titles[item].tolist(), self.end_id] for item in range(1, len(self.titles))}

    def first(self, end: int) -> int:
        """Return the place of the oldest of `end` events that text is made of; those before it need not be read."""
        return 0 if self.text_items and self.kind == "summary" else max(end - self.text_items, 0)

    def history(self, items: Items) -> list[Ids]:
        """Return the lines of a history: its last titles, or a summary of all of it."""
        if not self.text_items or not len(items):
            return []
        if self.kind == "summary":
            return [self.line(self.summary(items))]
        return [self.title(item) for item in items[-self.text_items :]]

    def summary(self, items: Items) -> str:
        """Return a history as prose: how many events, of which categories, seen most often, and the last ones."""
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
    """Return how many of the oldest lines must be left out for the rest to fit `budget` tokens."""
    drop, total = 0, sum(map(len, lines))
    while total > budget:
        total -= len(lines[drop])
        drop += 1
    return drop


class Question:
    """Prompts that ask for a text: of a class, or of what the user will write.

    Args:
      question: may hold {names}, which are the template's `fields`.
      max_target_tokens: longer targets are cut.

    Raises:
      ValueError: neither an instruction nor a question, or braces around anything but a name.
    """

    def __init__(self, lines: Lines, *, instruction: str, question: str, max_tokens: int, max_target_tokens: int):
        self.lines, self.max_tokens, self.max_target_tokens = lines, max_tokens, max_target_tokens
        self.question = question
        self.settings = dict(
            instruction=instruction, question=question, max_tokens=max_tokens, max_target_tokens=max_target_tokens
        )
        holes = [hole for _, *hole in string.Formatter().parse(question) if hole[0] is not None]
        # A hole such as {title.x} or {title:>999999999} would compute.
        for field, form, conversion in holes:
            if not str(field).isidentifier() or form or conversion:
                raise ValueError(f"The question {question!r} has braces around {field!r}: a name alone may stand there.")
        self.fields = tuple(str(field) for field, _, _ in holes)
        self.instruction = np.concatenate([lines.start, lines.line(instruction)]).astype(np.int32)
        self.shared_tokens = len(self.instruction) - (not question)
        if not (instruction or question):
            raise ValueError("A prompt needs an instruction or a question: both are empty.")

    def ask(self, **fields: object) -> Ids:
        """Return the question as a line; a long title in it is cut."""
        if "title" in fields:
            title = self.lines.tokenizer.encode(str(fields["title"]))[: self.lines.max_title_tokens]
            fields["title"] = self.lines.tokenizer.decode(title)
        return self.lines.line(self.question.format(**fields) if self.fields else self.question)

    def room(self, question: Ids) -> int:
        """Return how many tokens of history fit beside a question and its target.

        Raises:
          ValueError: not even these two fit.
        """
        budget = self.max_tokens - len(self.instruction) - len(question) - self.max_target_tokens - 1
        if budget < 0:
            raise ValueError(
                f"The question {self.lines.tokenizer.decode(question)!r} and {self.max_target_tokens} tokens of target do not fit "
                f"{self.max_tokens} tokens: raise max_tokens."
            )
        return budget

    def prompt(self, items: Items, **fields: object) -> Ids:
        """Return the prompt, without the oldest lines of history where it would leave no room for the target."""
        question, history = self.ask(**fields), self.lines.history(items)
        kept = history[fitting(history, self.room(question)) :]
        return np.concatenate([self.instruction, *kept, question]).astype(np.int32)

    def row(self, items: Items, target: str, **fields: object) -> TextRow | None:
        """Return the prompt with its target, None for an empty one."""
        ids = self.lines.line(target, self.max_target_tokens)
        if not len(ids):
            return None
        prompt = self.prompt(items, **fields)
        return TextRow(np.concatenate([prompt, ids]), np.array([len(prompt) - 1], np.int32), np.zeros(1, np.int32))


def pad_rows(rows: Sequence[Ids], length: int, count: int | None = None) -> Int[np.ndarray, "B T"]:
    """Right-pad rows with 0 to `length`, and with rows of 0 to `count` rows."""
    out = np.zeros((len(rows) if count is None else count, length), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
