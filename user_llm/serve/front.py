"""What every request passes first: who asks, from where, how large the body is, how long it may take; and what is logged of it.

The log has one line of JSON for each request. It never holds what was asked or answered, nor a user's id, nor a key.
"""

import asyncio
import dataclasses
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from absl import logging

from user_llm.serve.keys import Keys
from user_llm.serve.limits import Limits
from user_llm.serve.metrics import Metrics

PAGE = {  # the files of the page, which hold nobody's data, and their types
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/page{part}.js": (f"page{part}.js", "text/javascript") for part in ("", "_answers", "_events", "_picker", "_server")},
}
OPEN = (*PAGE, "/health", "/ready")  # what is answered without a key
READING = ("/v1/chat/completions", "/v1/completions")  # what changes nothing, though it is posted
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE | re.ASCII)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refusal(Exception):
    """A request that is refused before anybody reads it.

    Attributes:
      status: of the answer.
      headers: of the answer.
    """

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


def problem(sentence: str, status: int) -> dict[str, Any]:
    """Return the body of an answer that refuses, in the form of OpenAI's API."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}


@dataclasses.dataclass
class _Body:
    """The body of one request. `held` is the number of bytes that are set aside for it."""

    held: int = 0


class Front:
    """The outermost layer of the server, an ASGI application around another.

    Args:
      app: the application.
      keys: returns the keys at this moment; None where anybody may ask, which is allowed on this machine only.
      limits: see `Limits`.
      metrics: where requests are counted.
    """

    def __init__(self, app: Any, keys: Callable[[], Keys | None], limits: Limits, metrics: Metrics):
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._held = 0  # bytes of the bodies of all requests that have not been answered yet

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body()
        begun, status, holder = time.perf_counter(), 499, ""  # 499 is what is logged where the client is gone before an answer

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *SAFE]
            await send(message)

        try:
            try:
                holder = self._allowed(scope)
                async with asyncio.timeout(self._limits.seconds):
                    await self._app(scope, await self._read(body, scope, receive), sent)
            except Refusal as refusal:
                await _refuse(sent, refusal)
            except TimeoutError:
                if status == 499:
                    await _refuse(sent, Refusal(504, f"The answer took longer than {self._limits.seconds:g} s.", NO_RETRY))
                else:  # the answer has begun: its end is missing, which the client can see
                    status = 504
        finally:
            self._held -= body.held
            route = getattr(scope.get("route"), "path", "none")
            seconds = time.perf_counter() - begun
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            line = {"method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 1)}
            line |= {"key": holder} if holder else {}
            logging.info(json.dumps(line | scope.get("state", {}).get("logged", {})))

    def _allowed(self, scope: Message) -> str:
        """Return the name of the holder of the request's key, "" without one.

        Raises:
          Refusal: the key is missing or does not allow this, or a page of another site asks.
        """
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        keys, host = self._keys(), headers.get("host", "")
        if keys is None and not LOOPBACK.fullmatch(host):
            raise Refusal(
                403, "Without keys only this machine is answered: name it as localhost, or start the server with --api_keys."
            )
        if (origin := headers.get("origin")) and origin.partition("://")[2] != host:
            raise Refusal(403, "Pages of other sites may not ask this server.")
        if keys is None or scope["path"] in OPEN:
            return ""
        kind, _, given = headers.get("authorization", "").partition(" ")
        holder = keys.holder(given.strip()) if kind.lower() == "bearer" else None
        if holder is None:
            raise Refusal(401, "A key is needed: send it as `Authorization: Bearer KEY`.", {"www-authenticate": "Bearer"})
        reads = scope["method"] in ("GET", "HEAD") or scope["path"] in READING
        scope_needed = "read" if reads else "items" if scope["path"] == "/v1/items" else "write"
        if scope_needed not in holder.scopes:
            raise Refusal(403, f"This key does not have the scope {scope_needed!r}.")
        return holder.name

    def _hold(self, body: _Body, size: int) -> None:
        """Set bytes aside for a body, until `size` bytes are set aside for it.

        Raises:
          Refusal: the body is too large, or there is no room for it beside the bodies of other requests.
        """
        if size > (most := self._limits.body_bytes):
            raise Refusal(413, f"The body has more than {most} bytes: divide it.")
        more = max(size - body.held, 0)
        if size > self._limits.small_body_bytes and self._held + more > self._limits.bodies_bytes:
            raise Refusal(
                503, "The server holds as many bytes of other requests as it takes: try again in 1 s.", {"retry-after": "1"}
            )
        self._held += more
        body.held += more

    async def _read(self, body: _Body, scope: Message, receive: Receive) -> Receive:
        """Read a body whole, and return what hands it on.

        Raises:
          Refusal: the body is too large or comes too slowly, there is no room for it, or the client is gone.
        """
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                parts = await self._parts(body, scope, receive)
        except TimeoutError:
            late = f"The body has not come within {self._limits.body_seconds:g} s: divide it, or send it again."
            raise Refusal(408, late, {"connection": "close"}) from None
        whole: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def again() -> Message:
            nonlocal whole
            given, whole = whole, None
            return given if given is not None else await receive()

        return again

    async def _parts(self, body: _Body, scope: Message, receive: Receive) -> list[bytes]:
        """Read a body in the parts in which it comes; errors as in `_read`, but for its time."""
        parts, size = [], 0
        said = dict(scope["headers"]).get(b"content-length", b"0")
        self._hold(body, int(said) if said.isdigit() else 0)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "The client is gone.")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._hold(body, size)
            if not message.get("more_body"):
                return parts


NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients ask again otherwise
SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"),
    (b"cache-control", b"no-store"),
)  # fmt: skip


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps(problem(str(refusal), refusal.status)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refusal.headers
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
