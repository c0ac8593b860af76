"""What an engine is asked for, and what it gives."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import NamedTuple

from absl import logging

from user_llm.data.prompts.base import Ids
from user_llm.models.sampling import GREEDY, Sampling
from user_llm.serving.user import User
from user_llm.serving.writing import Written


class Busy(Exception):
    """The queue is full.

    Attributes:
      seconds: when to try again, as far as can be told.
    """

    def __init__(self, seconds: int):
        super().__init__(f"The server has as much to do as it takes: try again in {seconds} s.")
        self.seconds = seconds


class Closing(Exception):
    """The server is shutting down."""


class Piece(NamedTuple):
    """A piece of a text.

    Attributes:
      text: what is added; it may be empty.
      tokens: the number of tokens that were written for it.
      finish: "" while more will come, "stop" where the text ended by itself or at a stop text, "length" at the most tokens.
    """

    text: str
    tokens: int
    finish: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be written.

    Attributes:
      row: the tokens of the prompt.
      leading: the number of these tokens that stand before a soft prompt.
      user: the user whom the text is for; None for the LLM without a user.
      max_tokens: the most tokens that are written.
      seed: seed of the random draws.
      stop: texts that end the text.
    """

    row: Ids
    leading: int
    user: User | None
    max_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question: which items to recommend; the attributes are arguments of `Personalizer.recommend_many`."""

    k: int = 10
    seen: bool = True
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A question: what a user's tokens are."""


@dataclasses.dataclass(frozen=True)
class Explaining:
    """A question: the `k` events that a user's tokens look at most."""

    k: int


@dataclasses.dataclass(eq=False)
class Writing:
    """A text that is wanted, from its arrival to its end.

    Attributes:
      deliver: takes each piece; it is called in the engine's thread. An exception is delivered where the engine has failed.
      left: the number of tokens that may still be written.
      gone: whether nobody wants the text any longer.
      seated: when it got its row, by `time.perf_counter`.
    """

    prompt: Prompt
    deliver: Callable[[Piece | Exception], None]
    written: Written
    left: int
    gone: bool = False
    seated: float = 0.0


def together(answers: Callable[[Hashable, list], list], question: Hashable, chosen: list) -> list[tuple[list, list]]:
    """Return answers by questions; where they cannot be answered together, each is answered, or refused, alone."""
    if not chosen:
        return []
    try:
        return [(chosen, answers(question, [about for _, about, _ in chosen]))]
    except Exception as error:
        if len(chosen) == 1:
            if not isinstance(error, ValueError):
                logging.exception("A question could not be answered.")
                error = RuntimeError(f"The question could not be answered ({type(error).__name__}).")
            return [(chosen, [error])]
    return [pair for one in chosen for pair in together(answers, question, [one])]
