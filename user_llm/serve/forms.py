"""The answers of OpenAI's API: texts whole and in pieces, and the numbers of their tokens."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from user_llm.serve.asked import Asked
from user_llm.serve.front import problem
from user_llm.serve.work import Piece


class Completion:
    """The forms of answers of /v1/completions.

    Args:
      model: the name of the model.
    """

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str):
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Return a whole text."""
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": None}

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Return a piece of a text."""
        return self.choice(index, text, finish)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a stream says of a text before its first piece."""
        return None


class Chat(Completion):
    """The forms of answers of /v1/chat/completions."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Return a whole text."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": finish, "logprobs": None}

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Return a piece of a text."""
        return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish, "logprobs": None}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a stream says of a text before its first piece."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}


class Usage:
    """The numbers of tokens of a request.

    Args:
      prompt: the tokens of the prompts, those of users left out.
    """

    def __init__(self, prompt: int):
        self.prompt, self.written = prompt, 0
        self.logged = {"prompt_tokens": prompt, "completion_tokens": 0}

    def add(self, tokens: int) -> None:
        """Count tokens that were written."""
        self.written += tokens
        self.logged["completion_tokens"] = self.written

    def report(self) -> dict[str, int]:
        """Return the numbers as OpenAI's API has them."""
        return {**self.logged, "total_tokens": self.prompt + self.written}


async def events(
    first: tuple[int, Piece], rest: AsyncGenerator, form: Completion, usage: Usage, asked: Asked, count: int
) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream."""

    def event(choices: list, **more: Any) -> str:
        return f"data: {json.dumps({**form.head, 'object': form.chunk, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    for index in range(count):
        if (opening := form.opening(index)) is not None:
            yield event([opening])
    try:
        async with aclosing(rest):
            yield event([form.delta(first[0], first[1].text, first[1].finish or None)])
            async for index, piece in rest:
                if piece.text or piece.finish:
                    yield event([form.delta(index, piece.text, piece.finish or None)])
        if asked.usage_wanted:
            yield event([], usage=usage.report())
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status has been sent: the error is part of the stream
        yield f"data: {json.dumps(problem(str(error), 500))}\n\n"
