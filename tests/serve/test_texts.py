"""OpenAI's API by OpenAI's client: what it gets is what the model writes for each user alone."""

import asyncio
import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import openai
import pytest

import user_llm
from user_llm.data.timelines import hash_key
from user_llm.serving.user import User

CHAT = [{"role": "system", "content": "Films."}, {"role": "user", "content": "Next?"}]


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def users(server, made, model) -> dict[str | None, User | None]:
    """Users whom the server knows, as the model has them from a store; None is nobody."""
    found: dict[str | None, User | None] = {None: None}
    for number in range(5):
        rows = made.rows(number)
        name = rows[0]["user"]
        answer = httpx2.post(f"{server.url}/v1/users/{name}/events", json=rows)
        assert answer.json()["stored"] == len(rows)
        found[name] = User.from_bytes(model.encode(rows).to_bytes())
    return found


def test_the_model_is_listed(client, server, model):
    (one,) = client.models.list().data
    assert one.id == client.models.retrieve("tiny").id == "tiny" and one.identity == model.identity
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'"):
        client.completions.create(model="other", prompt="Next:")


def test_a_conversation_is_what_the_model_writes_for_that_user(client, users, model):
    written = {}
    for name, user in users.items():
        who = {} if name is None else {"user": name}
        answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=10, temperature=0, **who)
        (choice,) = answer.choices
        written[name] = choice.message.content
        assert written[name] == model.generate(chat=CHAT, user=user, max_tokens=10)
        assert choice.finish_reason == "length" and answer.usage.completion_tokens == 10
        assert answer.usage.prompt_tokens == len(model.tokenizer.chat(CHAT))
        pieces = client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            max_tokens=10,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            **who,
        )
        *chunks, last = pieces
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == written[name]
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
        assert last.usage.completion_tokens == 10 and not last.choices
    assert len(set(written.values())) > 2  # users are told apart


@pytest.mark.slow
def test_soft_prompts_stand_where_the_model_puts_them(serve, make_model, model):
    made = make_model("soft")
    soft = user_llm.load(made.directory)
    soft.lines.tokenizer = dataclasses.replace(soft.tokenizer, chat_template=model.tokenizer.chat_template)
    rows = made.rows(1)
    user = User.from_bytes(soft.encode(rows).to_bytes())
    with serve(soft, context=96) as served:
        assert httpx2.post(f"{served.url}/v1/users/u1/events", json=rows).json()["stored"] == len(rows)
        ask = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        settings = {"model": "tiny", "user": "u1", "max_tokens": 12, "temperature": 0}
        written, write = [], served.state.engine.write
        served.state.engine.write = lambda prompt: write(written.append(prompt) or prompt)
        chat = ask.chat.completions.create(messages=CHAT, **settings).choices[0].message.content
        assert chat == soft.generate(chat=CHAT, user=user, max_tokens=12) != soft.generate(chat=CHAT, max_tokens=12)
        text = ask.completions.create(prompt="Next:", **settings).choices[0].text
        assert text == soft.generate("Next:", user, max_tokens=12)
        starts = [soft.writer.leading([written[0].row], CHAT), soft.writer.leading([written[1].row])]
        assert [prompt.leading for prompt in written] == starts and starts[0] > starts[1]


def test_parts_of_text_and_developers_are_understood(client, model):
    parts = [{"role": "developer", "content": "Films."}, {"role": "user", "content": [{"type": "text", "text": "Next?"}]}]
    answer = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=5, temperature=0)
    assert answer.choices[0].message.content == model.generate(chat=CHAT, max_tokens=5)


def test_completions_of_several_prompts_and_copies(client, users, model):
    name, user = list(users.items())[2]
    answer = client.completions.create(
        model="tiny", prompt=["Next:", "Film 1"], user=name, n=2, max_tokens=6, temperature=1.3, top_p=0.9, seed=7
    )
    expected = [
        model.generate(prompt, user, max_tokens=6, temperature=1.3, top_p=0.9, seed=7 + 2 * place + copy)
        for place, prompt in enumerate(["Next:", "Film 1"])
        for copy in range(2)
    ]
    assert [choice.text for choice in answer.choices] == expected and len(set(expected)) > 2
    assert answer.usage.prompt_tokens == sum(len(model.writer.row(p, None, None, {}, None)) for p in ("Next:", "Film 1"))
    ids = model.writer.row("Next:", None, None, {}, None).tolist()
    (again,) = client.completions.create(model="tiny", prompt=ids, user=name, max_tokens=6, temperature=0).choices
    assert again.text == model.generate("Next:", user, max_tokens=6)
    streamed = client.completions.create(
        model="tiny", prompt="Next:", user=name, n=3, max_tokens=6, temperature=1.3, seed=3, stream=True
    )
    texts = ["", "", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [model.generate("Next:", user, max_tokens=6, temperature=1.3, seed=3 + n) for n in range(3)]


def test_a_stop_text_ends_a_text(client, users, model):
    whole = model.generate("Next:", None, max_tokens=12)
    stop = whole[4:6]
    (choice,) = client.completions.create(model="tiny", prompt="Next:", stop=stop, max_tokens=12, temperature=0).choices
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"


def test_texts_do_not_depend_on_who_else_is_asked(client, users, model):
    """Twelve threads ask for 36 texts of all kinds from three rows; each text is what the model writes alone."""
    rng = np.random.default_rng(0)
    asked = []
    for number in range(36):
        name = list(users)[int(rng.integers(len(users)))]
        settings = {"temperature": 0} if number % 2 else {"temperature": 1.2, "top_p": 0.8, "seed": number}
        prompt = "Film " * int(rng.integers(1, 8)) + str(number)
        asked.append((name, prompt, int(rng.integers(1, 15)), settings))

    def ask(one) -> str:
        name, prompt, most, settings = one
        who = {} if name is None else {"user": name}
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=most, **settings, **who).choices[0].text

    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(ask, asked))
    for text, (name, prompt, most, settings) in zip(found, asked, strict=True):
        assert text == model.generate(prompt, users[name], max_tokens=most, **settings), prompt


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logprobs": 3}, "'logprobs' is not supported"),
        ({"presence_penalty": 0.5}, "'presence_penalty' is not supported"),
        ({"temperature": -1}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 1000}, "both together have at most 64"),
        ({"n": 100}, "n: "),
        ({"stop": [""]}, "stop texts, of 1 to"),
        ({"stop": ["x" * 300]}, "stop texts, of 1 to"),
        ({"stop": ["x"] * 17}, "at most 16 stop texts"),
        ({"stop": 7}, "stop texts, of 1 to"),
        ({"prompt": [1.5] * 60}, "a text or a list of tokens"),
        ({"prompt": {}}, "a text or a list of tokens"),
        ({"prompt": "a" * 10_000}, "10000 characters, more than"),
        ({"prompt": ["a"] * 1000}, "more than the server takes on"),
        ({"extra_body": {"top_k": 2**40}}, "top_k: "),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "each is from 0 to"),
        ({"user": " u"}, "user's id is a text"),
        ({"user": "u\n"}, "user's id is a text"),
        ({"extra_body": {"typo": 1}}, "Unknown setting 'typo'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(client, settings, words):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "tiny", "prompt": "Next:", **settings})
    assert words in error.value.body["message"] and "\n" not in error.value.body["message"], error.value.body


def test_other_parts_than_text_are_refused(client):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="only text is supported"):
        client.chat.completions.create(model="tiny", messages=image)


def test_calls_of_tools_are_refused(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(openai.BadRequestError, match="'tool_calls'"):
        client.chat.completions.create(model="tiny", messages=[*CHAT, {"role": "assistant", "tool_calls": [call]}])


def test_null_is_what_is_not_said(server, model):
    names = ("user", "max_tokens", "top_p", "top_k", "min_p", "seed", "stop", "n", "stream", "logprobs", "tools")
    body = {"model": "tiny", "prompt": "Next:", "temperature": 0, **dict.fromkeys(names)}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == model.generate("Next:", max_tokens=16)


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"prompt": ["Next:", "\ud800"]}])
def test_half_a_surrogate_pair_is_refused(server, more):
    body = json.dumps({"model": "tiny", "prompt": "a\ud800"} | more)
    answer = httpx2.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and "half a surrogate pair" in answer.text


def test_half_a_surrogate_pair_in_a_message_is_refused(server):
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]})
    answer = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


def test_a_user_without_events_gets_an_answer(client, model):
    (choice,) = client.completions.create(model="tiny", prompt="Next:", user="unheard of", max_tokens=5, temperature=0).choices
    assert choice.text == model.generate("Next:", None, max_tokens=5)


def test_a_client_that_goes_frees_its_row(server):
    state = server.state
    body = {"model": "tiny", "prompt": "Next:", "max_tokens": 58, "temperature": 0, "stream": True}
    slowed(state.engine, 0.05)
    try:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            assert state.engine.writing == 1
        whole = threading.Thread(target=impatient, args=(f"{server.url}/v1/completions", body | {"stream": False}))
        whole.start()
        whole.join()
        deadline = time.monotonic() + 2
        while state.engine.writing and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not state.engine.writing
    finally:
        slowed(state.engine, 0)


def impatient(url: str, body: dict) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(url, json=body, timeout=0.3)


def slowed(engine, seconds: float) -> None:
    """Let each step of an engine take this much longer."""
    real = type(engine)._step

    def step():
        time.sleep(seconds)
        real(engine)

    engine._step = step if seconds else lambda: real(engine)


def test_more_than_the_queue_holds_is_refused_and_the_rest_is_answered(serve, model):
    with serve(model, queue=2) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        slowed(served.state.engine, 0.02)

        def ask(number: int) -> str:
            try:
                made = client.completions.create(model="tiny", prompt=f"Film {number}", max_tokens=20, temperature=0)
                return made.choices[0].text
            except openai.RateLimitError as error:
                assert int(error.response.headers["retry-after"]) >= 1
                return "refused"

        with ThreadPoolExecutor(10) as threads:
            found = list(threads.map(ask, range(10)))
        assert 3 <= found.count("refused") <= 5  # of 10, as 3 are written and 2 wait
        for number, text in enumerate(found):
            assert text in ("refused", model.generate(f"Film {number}", None, max_tokens=20))
        metrics = httpx2.get(f"{served.url}/metrics").text
        assert f"user_llm_refused_total {float(found.count('refused'))}" in metrics
        assert 'user_llm_requests_total{route="/v1/completions",status="429"}' in metrics


def test_an_answer_that_takes_too_long_is_given_up(serve, model):
    with serve(model, seconds=1) as served:
        slowed(served.state.engine, 0.2)
        body = {"model": "tiny", "prompt": "Next:", "max_tokens": 50, "temperature": 0}  # a drawn text may end at once
        answer = httpx2.post(f"{served.url}/v1/completions", json=body, timeout=20)
        assert answer.status_code == 504 and "longer than 1 s" in answer.json()["error"]["message"]
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="took too long"):
            list(client.completions.create(**body, stream=True))


def test_a_shutdown_finishes_what_has_begun_and_refuses_what_waits(serve, model):
    with serve(model) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        slowed(served.state.engine, 0.02)

        def ask(number: int) -> str:
            try:
                return client.completions.create(model="tiny", prompt="Next:", max_tokens=30, temperature=0).choices[0].text
            except openai.InternalServerError as error:
                assert error.status_code == 503
                return "refused"

        with ThreadPoolExecutor(5) as threads:
            asked = [threads.submit(ask, number) for number in range(5)]
            while served.state.engine.writing < 3 or served.state.engine.waiting < 2:
                time.sleep(0.01)
            served.state.engine.drain()
            found = sorted(one.result() for one in asked)
        assert found == sorted([*[model.generate("Next:", None, max_tokens=30)] * 3, "refused", "refused"])
        assert httpx2.get(f"{served.url}/ready").status_code == 503


def test_what_goes_wrong_with_one_question_harms_no_other(serve, model):
    with serve(model) as served:
        http = httpx2.Client(base_url=served.url, timeout=60)
        for name in ("good", "bad"):
            http.post(f"/v1/users/{name}/events", json={"item": "10", "rating": 3, "timestamp": 1})
        engine, real = served.state.engine, type(served.state.engine)._answers

        def answers(question, about):
            if any(user.key == hash_key("bad") for user in about):
                raise KeyError("not foreseen")
            return real(engine, question, about)

        engine._answers = answers
        with ThreadPoolExecutor(2) as threads:
            bad, good = threads.map(lambda name: http.get(f"/v1/users/{name}"), ("bad", "good"))
        assert good.json()["events"] == 1
        assert bad.status_code == 500 and "could not be answered (KeyError)" in bad.json()["error"]["message"]
        del engine._answers
        assert "error" not in http.get("/v1/users/bad").json()
        assert http.get("/v1/users/bad").json()["events"] == 1 and http.get("/ready").status_code == 200
        with pytest.raises(openai.BadRequestError, match="more than the server takes on"):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="none").completions.create(model="tiny", prompt=["a"] * 1000)


def test_events_of_two_moments_of_a_user_do_not_come_together(serve, model, made):
    rows = made.rows(2)
    with serve(model) as served:
        engine = served.state.engine

        async def both():
            moments = [model.reader.unencoded(part, model.keep)["u2"] for part in (rows[:3], rows[3:], rows)]
            return await asyncio.gather(*map(engine.encode, moments))

        for found, events in zip(asyncio.run(both()), (rows[:3], rows[3:], rows), strict=True):
            np.testing.assert_array_equal(found.events, model.encode(events).events)


def test_texts_that_nobody_waits_for_leave_the_queue(serve, model):
    with serve(model, queue=2) as served:
        engine = served.state.engine
        slowed(engine, 0.05)
        body = {"model": "tiny", "prompt": "Next:", "max_tokens": 50, "temperature": 0}  # a drawn text may end at once
        with ThreadPoolExecutor(5) as threads:
            gone = [threads.submit(impatient, f"{served.url}/v1/completions", body) for _ in range(5)]
        assert sorted(str(one.exception()) for one in gone) == ["None"] * 5
        deadline = time.monotonic() + 5
        while (engine.waiting or engine.writing) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine.waiting and not engine.writing
