"""The server: its routes, and what its errors look like."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from user_llm.serve import page_routes, texts, user_routes
from user_llm.serve.front import PAGE, Front, problem
from user_llm.serve.keys import Keys
from user_llm.serve.state import State
from user_llm.serve.store import StoreError
from user_llm.serve.waiting import Gone
from user_llm.serve.work import Busy, Closing

STORE_SECONDS = 2.0  # that /metrics waits for the store; Prometheus itself gives a scrape up after 10 s by default


def make_app(state: State, keys: Callable[[], Keys | None] = lambda: None) -> Front:
    """Return the server as an ASGI application.

    Args:
      state: the engine, which is started and closed with the application, the store, and so on.
      keys: returns the keys at this moment; None where no key is needed.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        state.engine.start()
        yield
        state.engine.close()
        state.store.close()

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(texts.router(state))
    app.include_router(user_routes.router(state))
    app.include_router(page_routes.router(state))

    @app.get("/health")
    def health() -> Response:
        failed = state.engine.failed
        return JSONResponse({"status": f"failed: {failed}" if failed else "ok"}, 500 if failed else 200)

    @app.get("/ready")
    def ready() -> Response:
        try:
            state.store.ping()
        except StoreError as error:
            return JSONResponse({"status": str(error)}, 503)
        return JSONResponse({"status": "ready"}) if state.engine.ready else JSONResponse({"status": "not ready"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        state.metrics.queue.set(state.engine.waiting)
        state.metrics.rows.set(state.engine.writing)
        try:
            counts = await asyncio.wait_for(asyncio.to_thread(state.store.counts), STORE_SECONDS)
        except (StoreError, TimeoutError):
            counts = None
        state.metrics.stored(counts)
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")

    for path, (name, kind) in PAGE.items():
        app.add_api_route(path, _file(name, kind), methods=["GET"])

    def refused(status: int, **headers: str) -> Callable[[Request, Exception], Response]:
        return lambda request, error: JSONResponse(problem(str(error), status), status, headers or None)

    def busy(request: Request, error: Any) -> Response:
        state.metrics.refused.inc()
        return JSONResponse(problem(str(error), 429), 429, {"retry-after": str(error.seconds)})

    def unreadable(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(problem(f"{where or 'The body'}: {first['msg']}.", 400), 400)

    def http(request: Request, error: Any) -> Response:
        return JSONResponse(problem(str(error.detail), error.status_code), error.status_code, error.headers)

    app.add_exception_handler(ValueError, refused(400))
    app.add_exception_handler(Busy, busy)
    app.add_exception_handler(Closing, refused(503))
    app.add_exception_handler(StoreError, refused(503))
    app.add_exception_handler(RuntimeError, refused(500))
    app.add_exception_handler(Gone, refused(499))
    app.add_exception_handler(Exception, lambda request, error: JSONResponse(problem("The server has failed.", 500), 500))
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(HTTPException, http)
    return Front(app, keys, state.limits, state.metrics)


def _file(name: str, kind: str) -> Callable[[], Response]:
    content = resources.files("user_llm.serve").joinpath(name).read_bytes()
    return lambda: Response(content, media_type=kind)
