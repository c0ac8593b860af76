"""OpenAI's API: chat completions and completions, for the user whom the field `user` names.

What changes an answer and is not implemented here is refused by name. What OpenAI's clients send besides, such as `metadata`, is ignored.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from user_llm.serve.asked import Asked, ChatAsked, Row, TextAsked
from user_llm.serve.engine import Engine
from user_llm.serve.forms import Chat, Completion, Usage, events
from user_llm.serve.front import problem
from user_llm.serve.state import State
from user_llm.serve.users import check_id
from user_llm.serve.waiting import in_time, merged, unless_gone
from user_llm.serve.work import Piece

LONGEST_TOKEN = 64  # characters that a token stands for at most, in texts that anybody writes


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
            writer = engine.model.writer
            row = writer.row(None, None, None, {}, messages)
            return [(row, writer.leading([row], messages))]

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
    pieces = merged([engine.write(prompt) for prompt in prompts])

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
        stream = events(first, in_time(source, left), form, usage, asked, len(prompts))
        return StreamingResponse(stream, media_type="text/event-stream")

    async def whole() -> dict[str, Any]:
        texts, ends = [""] * len(prompts), [""] * len(prompts)
        async for index, piece in counted():
            texts[index] += piece.text
            ends[index] = piece.finish
        choices = [form.choice(n, text, end) for n, (text, end) in enumerate(zip(texts, ends, strict=True))]
        return {**form.head, "object": form.kind, "choices": choices, "usage": usage.report()}

    return JSONResponse(await unless_gone(request, whole()))


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
