"""One thread that owns a model: it writes texts in rows that come and go, and answers questions about users in batches.

    requests ─> queue ─> free row ─> prompt is read, a chunk at a time ┐
                                     one step: each row writes a token ┴─> pieces of text, as they come
    questions ─> as many of one kind as there are, up to a batch ─> answers

The thread alternates: one chunk of a prompt, one step of all rows, one batch of questions. Texts that are being written therefore wait
for one chunk and one batch at most between two tokens. All other threads, and the event loop of the server, only put things
into the queues and receive what was made.
"""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import Future
from typing import Any

import jax
from absl import logging

from user_llm.serve.inputs import Inputs, ask, compiled
from user_llm.serve.limits import Limits
from user_llm.serve.work import Busy, Choice, Closing, Encoding, Explaining, Piece, Prompt, Writing, together
from user_llm.serving.explaining import Seen
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.ranking import Item
from user_llm.serving.user import User
from user_llm.serving.writing import Written


class Engine:
    """A model in a thread of its own. `start` begins to compile; `ready` says when it answers.

    Args:
      model: the model.
      limits: what it takes on at most.
      observe: is told what is measured, by name and value: `tokens` written, `batch` of questions, seconds of a `step`.
    """

    def __init__(self, model: Personalizer, limits: Limits, observe: Callable[[str, float], None] = lambda name, value: None):
        predictor = dataclasses.replace(model.predictor, batch_size=limits.batch, pad_whole=True)
        self.model = dataclasses.replace(model, predictor=predictor)
        self.limits, self.observe = limits, observe
        self._inputs = Inputs(self.model, limits.context)
        self.failed = ""  # the name of the error by which the engine has failed
        self._ready, self._closing = threading.Event(), False
        self._wake = threading.Condition()
        self._queue: deque[Writing] = deque()
        self._questions: deque[tuple[Hashable, Any, Future]] = deque()
        self._rows: list[Writing | None] = [None] * limits.rows
        self._reading: deque[int] = deque()  # rows whose prompt is being read
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._seconds = 1.0  # that a text takes in its row, a moving mean

    @property
    def ready(self) -> bool:
        """Whether everything is compiled and the engine takes requests."""
        return self._ready.is_set() and not self.failed and not self._closing

    @property
    def closing(self) -> bool:
        """Whether the engine takes no further requests."""
        return self._closing

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a row."""
        return len(self._queue)

    @property
    def writing(self) -> int:
        """The number of rows in use."""
        return sum(row is not None for row in self._rows)

    def start(self) -> None:
        """Start the thread, which compiles first."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until the engine is ready.

        Raises:
          RuntimeError: it has failed.
        """
        while not self._ready.wait(0.1):
            if self.failed:
                raise self.failure()

    def drain(self) -> None:
        """Refuse what comes from now on and what waits for a row; finish what has begun."""
        with self._wake:
            self._closing = True
            waiting, self._queue = list(self._queue), deque()
            self._wake.notify()
        for one in waiting:
            one.deliver(Closing("The server is shutting down: ask again, it may be another one that answers."))

    def close(self, seconds: float = 60.0) -> None:
        """Drain, and wait until the thread has ended."""
        self.drain()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def grow(self, model: Personalizer) -> None:
        """Replace the model by the same model with added items. Programs that it needs anew are compiled here, before the exchange.

        Any thread may call this, one at a time. What has begun goes on.
        """
        self.compile(model)
        self.model, self._inputs = model, Inputs(model, self.limits.context)

    def compile(self, model: Personalizer) -> None:
        """Compile what the same model with added items needs anew, in the thread that calls this.

        Without an item head, the trie of all titles is part of the programs that recommend, so that every added item needs new ones.

        Raises:
          ValueError: two items have titles of the same tokens.
          RuntimeError: the device has no room.
        """
        if model.predictor.config != self.model.predictor.config or not model.predictor.ranks:
            with jax.set_mesh(model.predictor.mesh):
                ask(model, self.limits)

    def check(self, prompt: Prompt) -> None:
        """Check that a prompt and its answer fit into a row.

        Raises:
          ValueError: they do not.
        """
        soft = 0 if prompt.user is None or not self.model.predictor.config.soft_prompt else len(prompt.user.tokens)
        length = len(prompt.row) + soft
        if prompt.max_tokens < 1 or length + prompt.max_tokens > self.limits.context:
            of_user = f" ({soft} of them of the user)" if soft else ""
            raise ValueError(
                f"The prompt has {length} tokens{of_user} and the answer up to {prompt.max_tokens}: at least 1 can be written, and both "
                f"together have at most {self.limits.context}."
            )

    async def write(self, prompt: Prompt) -> AsyncIterator[Piece]:
        """Yield the pieces of a text. A caller who stops listening, or is cancelled, frees the row.

        Raises:
          Busy: the queue is full.
          Closing: the server is shutting down.
          ValueError: the prompt and the answer are longer than `limits.context`.
        """
        self.check(prompt)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()
        stops = frozenset(self.model.tokenizer.stop_ids)
        written = Written(self.model.tokenizer, stops, prompt.stop)
        deliver = lambda piece: _to(loop, pieces, piece)  # noqa: E731
        one = Writing(prompt, deliver, written, prompt.max_tokens)
        with self._wake:
            self._admissible(len(self._queue) + self.writing - self.limits.rows)
            self._queue.append(one)
            self._wake.notify()
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            with self._wake:
                one.gone = True
                if one in self._queue:
                    self._queue.remove(one)

    async def encode(self, user: User) -> User:
        """Return a user with their tokens computed.

        Raises:
          Busy, Closing: as in `write`.
        """
        return await self._ask(Encoding(), user)

    async def recommend(self, user: User, choice: Choice) -> list[Item]:
        """Return what to recommend to a user; errors as in `encode`, and those of `Personalizer.recommend_many`."""
        return await self._ask(choice, user)

    async def explain(self, user: User, k: int) -> list[Seen]:
        """Return the events that the user's tokens look at most; errors as in `encode`, and those of `Personalizer.explain`."""
        return await self._ask(Explaining(k), user)

    async def _ask(self, question: Hashable, about: Any) -> Any:
        future: Future = Future()
        with self._wake:
            self._admissible(len(self._questions))
            self._questions.append((question, about, future))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _admissible(self, waiting: int) -> None:
        if self.failed:
            raise self.failure()
        if self._closing:
            raise Closing("The server is shutting down: ask again, it may be another one that answers.")
        if waiting >= self.limits.queue:
            raise Busy(max(1, round(self._seconds * (waiting + 1) / self.limits.rows)))

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            with jax.set_mesh(self.model.predictor.mesh):
                self._slots = compiled(self.model, self._inputs, self.limits)
                self._ready.set()
                while self._wait():
                    self._seat()
                    self._read()
                    self._step()
                    self._answer()
        except Exception as error:
            logging.exception("The engine has failed.")
            self.failed = type(error).__name__
            with self._wake:
                left = [*self._queue, *(row for row in self._rows if row is not None)]
                questions = list(self._questions)
                self._queue.clear()
                self._questions.clear()
            for one in left:
                one.deliver(self.failure())
            for _, _, future in questions:
                if future.set_running_or_notify_cancel():
                    future.set_exception(self.failure())

    def failure(self) -> RuntimeError:
        """Return what callers get after the engine has failed."""
        return RuntimeError(f"The model has failed ({self.failed}): the server must be started again.")

    def _wait(self) -> bool:
        """Wait until there is something to do; return whether there is."""
        with self._wake:
            while not (self._queue or self._questions or self.writing):
                if self._closing:
                    return False
                self._wake.wait()
        return True

    def _seat(self) -> None:
        """Give free rows to those who wait."""
        for row, one in enumerate(self._rows):
            if one is not None and one.gone:
                self._free(row)
        for row in range(len(self._rows)):
            while self._rows[row] is None:
                with self._wake:
                    if not self._queue:
                        return
                    one = self._queue.popleft()
                if one.gone:
                    continue
                try:
                    inputs, length, kv = self._inputs.of_prompt(one.prompt)
                    self._slots.start(row, inputs, length, user=kv, sampling=one.prompt.sampling, seed=one.prompt.seed)
                except (ValueError, TypeError, OverflowError) as error:  # of this prompt alone
                    one.deliver(ValueError(f"The prompt cannot be read: {error}"))
                    continue
                except Exception:
                    one.deliver(RuntimeError("The model has failed."))
                    raise
                one.seated, self._rows[row] = time.perf_counter(), one
                self._reading.append(row)

    def _read(self) -> None:
        """Read one chunk of one prompt."""
        if self._reading:
            row = self._reading[0]
            token = self._slots.read(row)
            if token is None:
                self._reading.rotate(-1)
            else:
                self._reading.popleft()
                self._deliver(row, token)

    def _step(self) -> None:
        """Let each row whose prompt has been read write one token."""
        if self.writing > len(self._reading):
            start = time.perf_counter()
            for row, token in enumerate(self._slots.step().tolist()):
                if token >= 0:
                    self._deliver(row, token)
            self.observe("step", time.perf_counter() - start)

    def _deliver(self, row: int, token: int) -> None:
        """Hand over what a token adds to a row's text; free the row where the text ends."""
        one = self._rows[row]
        if one is None or one.gone:
            return
        one.left -= 1
        ended = token in one.written.stop_ids
        text = one.written.more([token], ended=ended or not one.left)
        finish = "stop" if ended or not one.written.open else "length" if not one.left else ""
        self.observe("tokens", 1)
        one.deliver(Piece(text, 1, finish))
        if finish:
            self._seconds += 0.1 * (time.perf_counter() - one.seated - self._seconds)
            self._free(row)

    def _free(self, row: int) -> None:
        self._slots.end(row)
        self._rows[row] = None
        if row in self._reading:
            self._reading.remove(row)

    def _answer(self) -> None:
        """Answer the first question that waits, and others of its kind with it."""
        with self._wake:
            if not self._questions:
                return
            first = self._questions[0][0]
            chosen = [one for one in self._questions if one[0] == first][: self.limits.batch]
            taken = {id(one) for one in chosen}
            self._questions = deque(one for one in self._questions if id(one) not in taken)
        chosen = [one for one in chosen if one[2].set_running_or_notify_cancel()]
        self.observe("batch", len(chosen))
        for part, answers in together(self._answers, first, chosen):
            for (_, _, future), answer in zip(part, answers, strict=True):
                future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)

    def _answers(self, question: Hashable, about: list) -> list:
        match question:
            case Encoding():
                return self.model.reader.encoded(about)
            case Choice():
                return self.model.recommend_many(about, **dataclasses.asdict(question))
            case Explaining():
                return [self.model.explain(user, question.k) for user in about]
        raise TypeError(question)


def _to(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, piece: Any) -> None:
    """Put something into the queue of an event loop, from another thread."""
    try:
        loop.call_soon_threadsafe(queue.put_nowait, piece)
    except RuntimeError:  # the loop has ended, and nobody listens
        return
