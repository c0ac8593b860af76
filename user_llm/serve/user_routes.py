"""The routes of users: their events, recommendations, and what their tokens look at; and the route that adds items."""

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from user_llm.data.declared import check_names
from user_llm.serve.front import problem
from user_llm.serve.limits import Limits
from user_llm.serve.state import State
from user_llm.serve.store import NOBODY
from user_llm.serve.users import Stored, check_id
from user_llm.serve.waiting import unless_gone
from user_llm.serve.work import Choice

User = Annotated[str, Path(max_length=256)]
Ids = Annotated[list[str] | None, Query(max_length=10_000)]


def router(state: State) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/users/{user}/events")
    async def add(user: User, request: Request) -> Response:
        body = _json(await request.body())
        keys = None
        if isinstance(body, dict) and isinstance(body.get("events"), list):
            unknown = set(body) - {"events", "keys"}
            if unknown:
                raise ValueError(f"Unknown field {sorted(unknown)[0]!r} beside the events.")
            keys = body.get("keys")
            if keys is not None and not isinstance(keys, list):
                raise ValueError("The keys are a list, one for each event.")
            body = body["events"]
        rows = body if isinstance(body, list) else [body]
        return _stored(await _add(state, rows, check_id(user, "A user's id"), keys), user)

    @routes.post("/v1/events")
    async def load(request: Request) -> Response:
        kind = request.headers.get("content-type", "")
        rows = await asyncio.to_thread(_rows, await request.body(), kind, state.limits)
        return _stored(await _add(state, rows, None, None), None)

    @routes.post("/v1/items")
    async def add_items(request: Request) -> Response:
        rows = _json(await request.body())
        if isinstance(rows, dict) and set(rows) == {"items"}:
            rows = rows["items"]
        if not isinstance(rows, list) or not rows:
            raise ValueError("The body is a list of items that is not empty, or an object with such a list as `items`.")
        if len(rows) > state.limits.events:
            raise ValueError(f"{len(rows)} items: a request has at most {state.limits.events}, so divide them.")
        # What has begun ends even where nobody waits for it.
        added = await asyncio.shield(state.items.add(rows))
        count = len(state.engine.model.vocabulary.catalogue.keys) - 1
        return JSONResponse({"added": added, "known": len(rows) - added, "items": count})

    @routes.get("/v1/users/{user}")
    async def look(user: User) -> Response:
        check_id(user, "A user's id")
        version = (await asyncio.to_thread(state.store.versions, [user])).get(user, NOBODY)
        if version == NOBODY:
            return JSONResponse(problem("There is no such user.", 404), 404)
        found, engine = await state.states.of(user)
        return JSONResponse(
            {"id": user, "events": version.events, "counted": found.count, "unknown": found.unknown, "last_time": found.last_time,
             "tokens": len(found.tokens), "model": engine.model.identity}
        )  # fmt: skip

    @routes.get("/v1/users/{user}/events")
    async def events(user: User, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> Response:
        history = (await asyncio.to_thread(state.store.histories, [check_id(user, "A user's id")])).get(user)
        if history is None:
            return JSONResponse(problem("There is no such user.", 404), 404)
        body = {"id": user, "count": len(history.rows), "events": history.rows[-limit:]}
        return Response(json.dumps(body), media_type="application/json")  # in ASCII, since texts may hold halves of characters

    @routes.delete("/v1/users/{user}")
    async def delete(user: User) -> Response:
        there = await state.users.delete(check_id(user, "A user's id"))
        return JSONResponse({"id": user, "deleted": there}, 200 if there else 404)

    @routes.get("/v1/users/{user}/recommendations")
    async def recommend(
        user: User,
        request: Request,
        k: Annotated[int, Query(ge=1)] = 10,
        seen: bool = True,
        allow: Ids = None,
        deny: Ids = None,
    ) -> Response:
        if k > state.limits.k:
            raise ValueError(f"k={k}: at most {state.limits.k} items are recommended at a time.")
        found, engine = await state.states.of(check_id(user, "A user's id"))
        choice = Choice(k, seen, None if allow is None else _split(allow), _split(deny or []))
        items = await unless_gone(request, engine.recommend(found, choice))
        listed = [{"rank": rank, **item._asdict()} for rank, item in enumerate(items, 1)]
        return JSONResponse({"id": user, "events": found.count, "model": engine.model.identity, "items": listed})

    @routes.get("/v1/users/{user}/explain")
    async def explain(user: User, request: Request, k: Annotated[int, Query(ge=1, le=1000)] = 10) -> Response:
        found, engine = await state.states.of(check_id(user, "A user's id"))
        seen = await unless_gone(request, engine.explain(found, k)) if found.count else []
        return JSONResponse({"id": user, "model": engine.model.identity, "events": [one._asdict() for one in seen]})

    return routes


async def _add(state: State, rows: list[Any], user: str | None, keys: list[str] | None) -> Stored:
    if not rows:
        raise ValueError("There are no events.")
    if len(rows) > state.limits.events:
        raise ValueError(f"{len(rows)} events: a request has at most {state.limits.events}, so divide them.")
    return await state.users.add(rows, user, keys)


def _stored(found: Stored, user: str | None) -> Response:
    """Return what became of events. The status is 422 where all of them were refused."""
    refused = [one._asdict() for one in found.refused[:100]]
    body: dict[str, Any] = {
        "stored": found.stored,
        "repeated": found.repeated,
        "refused": len(found.refused),
        "unknown_items": found.unknown,
    }
    if user is None:
        body["users"] = len(found.users)
    else:
        body |= {"id": user, "events": found.users[user].events if user in found.users else None}
    return JSONResponse(body | {"reasons": refused}, 200 if found.stored or found.repeated else 422)


def _split(ids: list[str]) -> tuple[str, ...]:
    """Return the ids of a parameter, which may be given several times."""
    return tuple(sorted(set(ids)))


def _json(body: bytes) -> Any:
    """Return the value of a body of JSON.

    Raises:
      ValueError: the body is no JSON, or holds NaN or Infinity, which JSON does not have.
    """

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is no JSON: {error}.") from None


def _rows(body: bytes, kind: str, limits: Limits) -> list[dict[str, Any]]:
    """Return the events of a file, as objects of the columns.

    Raises:
      ValueError: the type of the content is not known, or the file cannot be read.
    """
    match kind.split(";")[0].strip().lower():
        case "application/x-ndjson" | "application/jsonl":
            return [_json(line) for line in body.splitlines() if line.strip()]
        case "text/csv":
            return list(_csv(body))
        case "application/vnd.apache.parquet":
            try:
                return _parquet(body, limits)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"The file is no Parquet: {' '.join(str(error).split())[:160]}.") from None
    raise ValueError(
        "Event files are sent with the content type text/csv, application/x-ndjson or application/vnd.apache.parquet."
    )


def _parquet(body: bytes, limits: Limits) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file, times as text.

    Raises:
      ValueError: there are more than `limits.events`, they take far more memory than a body may, or two columns have one name.
    """
    file = pq.ParquetFile(io.BytesIO(body), coerce_int96_timestamp_unit="us")
    check_names("The file", file.schema_arrow.names, file.schema_arrow.names, ())
    if file.metadata.num_rows > limits.events:
        raise ValueError(f"{file.metadata.num_rows} events: a request has at most {limits.events}, so divide them.")
    found: list[dict[str, Any]] = []
    size, most = 0, 8 * limits.body_bytes
    # A few bytes of a file may stand for very many: they are looked at a few rows at a time.
    for batch in file.iter_batches(100):
        if (size := size + batch.nbytes) > most:
            raise ValueError(f"The events take more than {most} bytes: divide them.")
        columns = [column.cast(pa.string()) if pa.types.is_temporal(column.type) else column for column in batch.columns]
        found += pa.record_batch(columns, names=batch.schema.names).to_pylist()
    return found


def _csv(body: bytes) -> Iterator[dict[str, Any]]:
    try:
        rows = csv.DictReader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True)
        names = list(rows.fieldnames or ())
        check_names("it", names, list(filter(None, names)), ())
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has another number of fields than the header")
            yield row
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"The file is no CSV: {str(error).rstrip('.')}.") from None
