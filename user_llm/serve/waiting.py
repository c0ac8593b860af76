"""Waiting for answers: for several at once, for a number of seconds, and for as long as the client is there."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from fastapi import Request

from user_llm.serve.work import Piece

T = TypeVar("T")


class Gone(Exception):
    """The client does not wait for the answer any longer."""


async def in_time(source: AsyncGenerator[T], seconds: float) -> AsyncGenerator[T]:
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


async def merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
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
