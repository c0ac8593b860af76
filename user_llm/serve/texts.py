"""OpenAI's API: chat completions and completions, for the user whom the field `user` names.

What changes an answer and is not implemented here is refused by name. What OpenAI's clients send besides, such as `metadata`, is ignored.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from user_llm.models.sampling import Sampling
from user_llm.serve.engine import Engine, Piece, Prompt
from user_llm.serve.front import problem
from user_llm.serve.state import State
from user_llm.serve.users import check_id
from user_llm.serving.user import User

T = TypeVar("T")
Row = tuple[np.ndarray, int]  # the tokens of a prompt, and how many of them stand before a soft prompt
STOPS, LONGEST_STOP = 16, 256  # stop texts, and characters of one
LONGEST_TOKEN = 64  # characters that a token stands for at most, in texts that anybody writes


class Gone(Exception):
    """The client does not wait for the answer any longer."""


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


def router(state: State) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(state)]}

    @routes.get("/v1/models/{name:path}")
    def model(name: str) -> Response:
        if name != state.name:
            return _unknown_model(name, state)
        return JSONResponse(_model(state))

    @routes.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        if asked.max_completion_tokens is not None:
            asked.max_tokens = asked.max_completion_tokens
        messages = [message.plain() for message in asked.messages]

        def rows(engine: Engine) -> list[Row]:
            _check_length(engine, sum(len(message["content"]) for message in messages))
            return [engine.model.writer.conversation(messages)]

        return await _answer(state, asked, request, rows, Chat(state.name), state.answer_tokens)

    @routes.post("/v1/completions")
    async def completions(asked: TextAsked, request: Request) -> Response:
        given = asked.prompt
        prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        _check_number(len(prompts) * asked.copies, state)

        def rows(engine: Engine) -> list[Row]:
            return [(row, engine.model.writer.leading([row])) for row in (_row(engine, prompt) for prompt in prompts)]

        return await _answer(state, asked, request, rows, Completion(state.name), 16)

    return routes


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


async def _answer(
    state: State, asked: Asked, request: Request, rows_of: Callable[[Engine], list[Row]], form: Completion, most: int
) -> Response:
    """Write all texts of a request, and answer it whole or as a stream."""
    if asked.model != state.name:
        return _unknown_model(asked.model, state)
    asked.check()
    user, engine = None, state.engine
    if asked.user is not None:
        user, engine = await unless_gone(request, state.states.of(check_id(asked.user, "A user's id")))
    rows = await asyncio.to_thread(rows_of, engine)
    _check_number(len(rows) * asked.copies, state)
    prompts = asked.prompts(rows, user, most, engine.limits.context)
    for prompt in prompts:
        engine.check(prompt)
    begun, tokens = time.perf_counter(), sum(len(prompt.row) for prompt in prompts[:: asked.copies])
    usage = Usage(tokens)
    request.state.logged = usage.logged
    pieces = _merged([engine.write(prompt) for prompt in prompts])

    async def counted() -> AsyncGenerator[tuple[int, Piece]]:
        async with aclosing(pieces):
            async for index, piece in pieces:
                if not usage.written:
                    state.metrics.first.observe(time.perf_counter() - begun)
                usage.add(piece.tokens)
                yield index, piece

    if asked.stream:
        source = counted()
        first = await unless_gone(request, anext(source))  # what cannot begin is refused with a status of its own
        left = engine.limits.seconds - (time.perf_counter() - begun) - 0.5  # before the whole request is given up
        events = _events(first, _in_time(source, left), form, usage, asked, len(prompts))
        return StreamingResponse(events, media_type="text/event-stream")

    async def whole() -> dict[str, Any]:
        texts, ends = [""] * len(prompts), [""] * len(prompts)
        async for index, piece in counted():
            texts[index] += piece.text
            ends[index] = piece.finish
        choices = [form.choice(n, text, end) for n, (text, end) in enumerate(zip(texts, ends, strict=True))]
        return {**form.head, "object": form.kind, "choices": choices, "usage": usage.report()}

    return JSONResponse(await unless_gone(request, whole()))


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


async def _events(
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


async def _in_time(source: AsyncGenerator[T], seconds: float) -> AsyncGenerator[T]:
    """Yield what comes within some seconds.

    Raises:
      TimeoutError: more would have come.
    """
    end = time.perf_counter() + seconds
    async with aclosing(source):
        while True:
            try:
                one = await asyncio.wait_for(anext(source), max(end - time.perf_counter(), 0.01))
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise TimeoutError("The answer took too long, and ends here.") from None
            yield one


def _check_number(texts: int, state: State) -> None:
    """Check that a request does not want more texts than there is room for.

    Raises:
      ValueError: it does.
    """
    if texts > (most := state.limits.rows + state.limits.queue):
        raise ValueError(f"{texts} texts are wanted, more than the server takes on at a time ({most}): ask for fewer.")


def _check_length(engine: Engine, characters: int) -> None:
    """Check that a text is not far too long, before it is made into tokens, which takes time.

    Raises:
      ValueError: it has more characters than so many tokens can have.
    """
    if characters > (most := LONGEST_TOKEN * engine.limits.context):
        raise ValueError(f"The prompt has {characters} characters, more than {most}.")


async def _merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """Yield the pieces of several texts as they come, each with the place of its text. The end of the caller ends all of them."""
    queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def pump(index: int, source: AsyncIterator[Piece]) -> None:
        try:
            async for piece in source:
                queue.put_nowait((index, piece))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        left = len(pumps)
        while left:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield index, piece
    finally:
        for one in pumps:
            one.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Return an answer; give it up if the client is gone.

    Raises:
      Gone: the client is gone.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone("The client is gone.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _row(engine: Engine, prompt: Any) -> np.ndarray:
    """Return the tokens of a prompt, which is a text or a list of tokens.

    Raises:
      ValueError: it is neither, there are no tokens, or a number is no token.
    """
    if isinstance(prompt, str):
        _check_length(engine, len(prompt))
        return engine.model.writer.row(prompt, None, None, {}, None)
    size = engine.model.predictor.config.decoder.vocab_size
    if not isinstance(prompt, list) or not prompt or not all(type(token) is int and 0 <= token < size for token in prompt):
        raise ValueError(f"The prompt is a text or a list of tokens: there is at least one, and each is from 0 to {size - 1}.")
    return np.array(prompt, np.int32)


def _model(state: State) -> dict[str, Any]:
    return {
        "id": state.name,
        "object": "model",
        "created": state.begun,
        "owned_by": "user-llm",
        "identity": state.engine.model.identity,
    }


def _unknown_model(name: str, state: State) -> Response:
    return JSONResponse(problem(f"There is no model {name[:100]!r}: this server has {state.name!r}.", 404), 404)
