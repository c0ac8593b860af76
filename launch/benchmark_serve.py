"""How fast a server writes for many clients: beside one client, beside histories as text, and at twice what it can do.

    python launch/benchmark_serve.py --model=RUN/user_llm/model --clients=16 --tokens=64            # closed loop
    python launch/benchmark_serve.py --model=RUN/user_llm/model --overload=600                      # open loop, ten minutes
    python launch/benchmark_serve.py --model=RUN/user_llm/model --against=http://localhost:8001/v1  # another server of the same LLM

The script starts a server on this machine, on a free port, with a store of its own below a folder that it removes. The users have
events drawn from the model's own items. "closed" means that each client asks again as soon as it is answered. "as text" means that the
LLM gets the titles of the events as a prompt, and no user. "open" means that requests come at random moments, at twice the rate of the
closed loop, whether or not the server is ready for them. One line of JSON is printed; the ratios in it are of this run.
"""

import argparse
import asyncio
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import httpx2
import numpy as np
import openai
import psutil

import user_llm
from user_llm.serving.personalizer import Personalizer

PROMPT = "The next film this user watches:\n"


class Asked(NamedTuple):
    """What one request came to.

    Attributes:
      first: seconds until the first token; 0 where the request was refused.
      tokens: the number of tokens that were written.
      status: of HTTP.
    """

    first: float
    tokens: int
    status: int


def draw_events(model: Personalizer, users: int, events: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the events of users, of items drawn evenly from the model's catalogue."""
    fields, rng = model.vocabulary.fields, np.random.default_rng(seed)
    keys = model.vocabulary.catalogue.keys[1:]
    numbers = {number.column: list(number.allowed or (1.0,)) for number in fields.numbers.values()}
    return {
        f"user-{user}": [
            {fields.item: keys[rng.integers(len(keys))], fields.time: 1_600_000_000 + 3600 * n}
            | {column: rng.choice(allowed).item() for column, allowed in numbers.items()}
            for n in range(events)
        ]
        for user in range(users)
    }


def history_as_text(model: Personalizer, rows: Sequence[dict[str, Any]]) -> str:
    """Return the titles of events, a line each, before the question."""
    item = model.vocabulary.fields.item
    titles = dict(zip(model.vocabulary.catalogue.keys, model.vocabulary.catalogue.titles, strict=True))
    return "".join(f"{titles[row[item]]}\n" for row in rows) + PROMPT


async def ask(client: openai.AsyncOpenAI, name: str, tokens: int, prompt: str, user: str | None) -> Asked:
    """Let the server write; return what came of it."""
    begun, first, written = time.perf_counter(), 0.0, 0
    who = {} if user is None else {"user": user}
    try:
        stream = await client.completions.create(
            model=name, prompt=prompt, max_tokens=tokens, temperature=1.0, seed=random.randrange(2**31), stream=True,
            stream_options={"include_usage": True}, **who,
        )  # fmt: skip
        async for chunk in stream:
            first = first or time.perf_counter() - begun
            written = chunk.usage.completion_tokens if chunk.usage else written
    except openai.APIStatusError as error:
        return Asked(0.0, 0, error.status_code)
    return Asked(first, written, 200)


async def closed(clients: int, requests: int, one: Callable[[int], Awaitable[Asked]]) -> dict[str, float]:
    """Let clients ask, each as soon as it is answered; return what was measured."""
    numbers, found = iter(range(requests)), []

    async def client() -> None:
        for number in numbers:
            found.append(await one(number))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    if any(asked.status != 200 for asked in found):
        raise SystemExit(f"Requests were refused: {Counter(asked.status for asked in found)}.")
    firsts = [asked.first for asked in found]
    return {
        "requests_per_s": requests / seconds,
        "tokens_per_s": sum(asked.tokens for asked in found) / seconds,
        "first_token_p50": float(np.percentile(firsts, 50)),
        "first_token_p99": float(np.percentile(firsts, 99)),
    }


async def opened(rate: float, seconds: float, one: Callable[[int], Awaitable[Asked]]) -> Counter[int]:
    """Ask at random moments, `rate` times a second; return how many requests had each status."""
    tasks, end, number = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(one(number)))
        number += 1
        await asyncio.sleep(random.expovariate(rate))
    return Counter(asked.status for asked in await asyncio.gather(*tasks))


def main() -> None:
    """Start, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--requests", type=int, default=64, help="of each closed loop")
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--events", type=int, default=200, help="of each user")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--as_text", type=int, nargs="*", default=[], help="numbers of events that are given as text")
    parser.add_argument("--overload", type=float, default=0, help="seconds of the open loop")
    parser.add_argument("--against", default="", help="the address of another server of the same LLM")
    args = parser.parse_args()
    model = user_llm.load(args.model)
    events = draw_events(model, args.users, args.events)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "user_llm.serve",
            f"--model={args.model}",
            f"--store=sqlite:{folder}/users.db",
            "--port=0",
        ]
        command += [f"--rows={args.clients}", f"--context={args.context}"]
        log = open(pathlib.Path(folder) / "log.txt", "w")  # noqa: SIM115
        with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                print(json.dumps(asyncio.run(measure(args, model, events, process))))
            finally:
                process.terminate()


async def measure(
    args: argparse.Namespace, model: Personalizer, events: dict[str, list[dict[str, Any]]], process: subprocess.Popen
) -> dict[str, Any]:
    """Return all that was measured of a server that is being started."""
    url = re.search(r"http://\S+", process.stdout.readline())[0]  # type: ignore[index,union-attr]
    async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.2)
        for name, rows in events.items():
            (await http.post(f"/v1/users/{name}/events", json=rows)).raise_for_status()
            (await http.get(f"/v1/users/{name}")).raise_for_status()  # encodes the user
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        names = list(events)
        user = lambda n: ask(client, "user-llm", args.tokens, PROMPT, names[n % len(names)])  # noqa: E731
        found: dict[str, Any] = {"clients": args.clients, "tokens": args.tokens}
        found["one"] = await closed(1, max(args.requests // 8, 1), user)
        found["many"] = await closed(args.clients, args.requests, user)
        found["many_for_one"] = found["many"]["tokens_per_s"] / found["one"]["tokens_per_s"]
        for count in args.as_text:
            texts = [history_as_text(model, rows[-count:]) for rows in events.values()]
            as_text = await closed(
                args.clients, args.requests,
                lambda n, texts=texts: ask(client, "user-llm", args.tokens, texts[n % len(texts)], None),
            )  # fmt: skip
            found[f"users_for_text_of_{count}"] = found["many"]["requests_per_s"] / as_text["requests_per_s"]
        if args.against:
            other = openai.AsyncOpenAI(base_url=args.against, api_key="none", max_retries=0, timeout=600)
            name = (await other.models.list()).data[0].id
            bare = await closed(
                args.clients, args.requests, lambda n: ask(client, "user-llm", args.tokens, f"{n}. {PROMPT}", None)
            )
            theirs = await closed(args.clients, args.requests, lambda n: ask(other, name, args.tokens, f"{n}. {PROMPT}", None))
            found["ours_for_theirs"] = bare["tokens_per_s"] / theirs["tokens_per_s"]
            found["theirs"] = theirs
        if args.overload:
            found["overload"] = await overload(args, http, process, user, events, 2 * found["many"]["requests_per_s"])
    return found


async def overload(
    args: argparse.Namespace,
    http: Any,
    process: subprocess.Popen,
    user: Callable[[int], Awaitable[Asked]],
    events: dict,
    rate: float,
) -> dict[str, Any]:
    """Ask at a rate for `args.overload` seconds while events are stored; return statuses, memory and what became of the events."""
    memory = psutil.Process(process.pid).memory_info
    before, stored, end = memory().rss, 0, time.perf_counter() + args.overload
    name, row = next((name, rows[0]) for name, rows in events.items())

    async def store() -> None:
        nonlocal stored
        while time.perf_counter() < end:
            answer = await http.post("/v1/users/overload/events", json={"events": [row], "keys": [str(stored)]})
            stored += answer.json()["stored"] if answer.status_code == 200 else 0
            await asyncio.sleep(0.1)

    statuses, _ = await asyncio.gather(opened(rate, args.overload, user), store())
    there = (await http.get("/v1/users/overload")).json()["events"]
    return {
        "rate": rate, "statuses": dict(statuses), "mib_before": before >> 20, "mib_after": memory().rss >> 20,
        "events_acknowledged": stored, "events_there": there,
    }  # fmt: skip


if __name__ == "__main__":
    main()
