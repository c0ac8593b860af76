"""The requests of OpenAI's API for texts: what they may say, and what of it is refused or ignored."""

import secrets
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from user_llm.models.sampling import Sampling
from user_llm.serve.work import Prompt
from user_llm.serving.user import User

STOPS, LONGEST_STOP = 16, 256  # stop texts, and characters of one
Row = tuple[np.ndarray, int]  # the tokens of a prompt, and how many of them stand before a soft prompt
IGNORED = (
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "stream_options",
)
NEUTRAL: dict[str, tuple] = {  # what may be said as long as it changes nothing
    "presence_penalty": (0, None), "frequency_penalty": (0, None), "repetition_penalty": (1, None), "logit_bias": ({}, None),
    "logprobs": (False, None), "top_logprobs": (None, 0), "tools": ([], None), "tool_choice": ("none", "auto", None),
    "response_format": ({"type": "text"}, None), "echo": (False, None), "best_of": (1, None), "suffix": ("", None),
    "modalities": (["text"], None), "reasoning_effort": ("none", None),
}  # fmt: skip


class Asked(BaseModel):
    """What both kinds of completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    user: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: Any = None
    n: int | None = Field(None, ge=1, le=16)
    stream: bool | None = None

    def check(self) -> None:
        """Check that nothing is asked for that is not implemented.

        Raises:
          ValueError: it is, or a setting is unknown.
        """
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL:
                if value not in NEUTRAL[name]:
                    raise ValueError(f"The setting {name!r} is not supported: leave it out.")
            elif name not in IGNORED:
                raise ValueError(f"Unknown setting {name!r}.")
        given = self.stop if isinstance(self.stop, list) else [] if self.stop is None else [self.stop]
        if len(given) > STOPS or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in given):
            raise ValueError(f"There are at most {STOPS} stop texts, of 1 to {LONGEST_STOP} characters each.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def copies(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        options = (self.model_extra or {}).get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def prompts(self, rows: Sequence[Row], user: User | None, most: int, room: int) -> list[Prompt]:
        """Return each row `n` times, as it is to be continued.

        Args:
          rows: the tokens of each prompt, and how many of them stand before a soft prompt.
          most: the most tokens of an answer where the request names no limit, as far as there is room.
          room: the number of tokens of a prompt and its answer.
        """
        temperature, top_p = (1.0 if value is None else value for value in (self.temperature, self.top_p))
        sampling = Sampling(temperature, max(self.top_k or 0, 0), top_p, self.min_p or 0.0)
        first = secrets.randbits(32) if self.seed is None else self.seed
        return [
            Prompt(
                row, leading, user, self.max_tokens or max(min(most, room - len(row) - (0 if user is None else len(user.tokens))), 1),
                sampling, (first + index * self.copies + copy) % 2**32, self.stops,
            )
            for index, (row, leading) in enumerate(rows)
            for copy in range(self.copies)
        ]  # fmt: skip


class Message(BaseModel):
    """A message of a conversation. Parts of text are joined; other parts are refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None

    def plain(self) -> dict[str, str]:
        """Return the message as a chat template takes it.

        Raises:
          ValueError: a part is no text.
        """
        for name in ("tool_calls", "function_call", "audio"):
            if (self.model_extra or {}).get(name):
                raise ValueError(f"A message has {name!r}: only text is supported.")
        parts = self.content if isinstance(self.content, list) else [{"type": "text", "text": self.content or ""}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"A message has a part of the type {str(kind)[:50]!r}: only text is supported.")
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(part["text"] for part in parts)}


class ChatAsked(Asked):
    """A request of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)


class TextAsked(Asked):
    """A request of /v1/completions."""

    prompt: Any
