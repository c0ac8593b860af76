"""Rows that come and go write what `generate` writes for each prompt alone."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from user_llm.common import mesh as meshes
from user_llm.models import slots as module
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.generate import generate
from user_llm.models.sampling import GREEDY, Sampling
from user_llm.models.slots import Slots
from user_llm.models.user import SoftPrompt, User, embed_prompts
from user_llm.nn.cross_attention import LayersKV, UserKV
from user_llm.nn.transformer import BlockConfig

ROOM = 40
SAMPLINGS = [GREEDY, Sampling(1.0), Sampling(1.5, top_k=4), Sampling(1.2, top_p=0.8), Sampling(2.0, min_p=0.1)]


@dataclasses.dataclass
class Request:
    inputs: np.ndarray
    length: int
    user: UserKV | None
    sampling: Sampling
    seed: int
    most: int

    @property
    def how(self):
        return {"user": self.user, "sampling": self.sampling, "seed": self.seed}


def _kv(seed, real):
    k, v = np.random.default_rng(seed).normal(size=(2, 1, 1, 2, 2, 4)).astype(np.float32)
    return UserKV(k, v, np.arange(2)[None] < real)


def _requests(model, kind, count, seed=0):
    """Draw requests of all samplings, with prompts of 1 to 20 tokens and users of none, one or two tokens."""
    rng, requests = np.random.default_rng(seed), []
    for number in range(count):
        length, real = int(rng.integers(1, 21)), number % 3
        text = np.pad(rng.integers(3, 12, length), (0, 21 - length))[None]
        soft = (
            SoftPrompt(rng.normal(size=(1, 2, 16)).astype(np.float32), np.array([real])) if kind in ("soft", "both") else None
        )
        inputs, lengths = embed_prompts(*model, text, np.array([length]), user=User(None, soft), leading=1)
        user = _kv(number, real) if kind in ("cross", "both") and real else None
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        requests.append(Request(np.asarray(inputs), int(lengths[0]), user, sampling, 70 + number, int(rng.integers(1, 15))))
    return requests


def _alone(model, kind, r):
    user = r.user if r.user is not None or kind not in ("cross", "both") else _kv(0, 0)
    return generate(
        *model, r.inputs, lengths=[r.length], max_tokens=r.most, user=user, sampling=r.sampling, seeds=[r.seed]
    ).rows()[0]


def _slots(model, kind, **how):
    users = _kv(0, 0) if kind in ("cross", "both") else None
    return Slots(*model, **{"rows": 4, "room": ROOM, "users": users, "chunks": (4, 8)} | how)


def _serve(slots, requests, seed=0):
    """Serve requests, a random choice of what may be done next each time; return what each wrote."""
    rng, waiting = np.random.default_rng(seed), list(range(len(requests)))
    rng.shuffle(waiting)
    written, running, reading = [[] for _ in requests], {}, set()
    while waiting or running:
        free = [row for row in range(slots.rows) if row not in running]
        if waiting and free and rng.random() < 0.5:
            row, number = int(rng.choice(free)), waiting.pop()
            slots.start(row, requests[number].inputs, requests[number].length, **requests[number].how)
            running[row] = number
            reading.add(row)
        elif reading and rng.random() < 0.5:
            row = int(rng.choice(sorted(reading)))
            token = slots.read(row)
            if token is not None:
                reading.remove(row)
                written[running[row]].append(token)
        else:
            tokens = slots.step()
            assert [row for row in range(slots.rows) if tokens[row] >= 0] == sorted(set(running) - reading)
            for row in set(running) - reading:
                written[running[row]].append(int(tokens[row]))
        for row, number in list(running.items()):
            if len(written[number]) >= requests[number].most:
                slots.end(row)
                del running[row]
    return written


@pytest.fixture(scope="module")
def gemma(drawn):
    """A decoder as Gemma 3's: windows, norms of queries and keys, norms after each part, scaled and tied embeddings."""
    block = BlockConfig(
        width=16, heads=4, kv_heads=1, head_dim=8, mlp_width=24, window=5, window_rope_theta=100.0, qk_norm=True,
        post_norms=True, norm_offset=1.0, activation="gelu_tanh",
    )  # fmt: skip
    config = DecoderConfig(12, 3, block, tie_embeddings=True, embed_scale=4.0, windowed=(True, True, False), unroll=True)
    return drawn(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))


@pytest.mark.parametrize("kind", ["cross", "none", "soft", "both"])
def test_thirty_requests_through_four_rows_write_what_each_writes_alone(tiny, kind):
    requests = _requests(tiny.model, kind, 30)
    assert _serve(_slots(tiny.model, kind), requests) == [_alone(tiny.model, kind, r) for r in requests]


def test_windows_and_groups_of_heads(gemma):
    requests = _requests(gemma, "none", 8)
    assert _serve(_slots(gemma, "none"), requests) == [_alone(gemma, "none", r) for r in requests]


def test_inlined_layers_hold_their_own_part_of_the_users(tiny, drawn):
    config = dataclasses.replace(nnx.merge(*tiny.model).config, unroll=True)
    inlined, _ = drawn(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    requests = _requests(tiny.model, "cross", 8)
    slots = _slots((inlined, tiny.params), "cross")
    assert isinstance(slots._users, LayersKV)
    assert _serve(slots, requests) == [_alone(tiny.model, "cross", r) for r in requests]


@pytest.mark.parametrize("number", range(5))
def test_a_row_that_writes_alone_takes_the_program_of_one_row(tiny, monkeypatch, number):
    request = _requests(tiny.model, "cross", 5, seed=6)[number]
    monkeypatch.setattr(module, "_step", None)
    assert _serve(_slots(tiny.model, "cross"), [request]) == [_alone(tiny.model, "cross", request)]


def test_programs_of_fewer_slots_write_the_same(tiny, monkeypatch):
    requests = _requests(tiny.model, "cross", 8, seed=3)
    expected = _serve(_slots(tiny.model, "cross"), requests)
    monkeypatch.setattr(module, "LEAST_SEEN", 8)
    slots = _slots(tiny.model, "cross")
    assert slots._lengths == [8, 16, 32, 40]
    assert _serve(slots, requests, seed=1) == expected == [_alone(tiny.model, "cross", r) for r in requests]


@pytest.mark.parametrize("kind", ["cross", "none"])
def test_eight_devices_write_what_one_writes(tiny, mesh_of, kind):
    requests = _requests(tiny.model, kind, 9)
    mesh = mesh_of(2, 2, 2)
    rules = [(".*/attn/[qkv]$", ("tensor", None)), ("embed", ("fsdp", None)), (".*", ())]
    params = jax.device_put(tiny.params, meshes.shardings(rules, tiny.params, mesh))
    with jax.set_mesh(mesh):
        slots = _slots((tiny.graphdef, params), kind)
        assert len({str(shard.index[1]) for shard in slots._cache.k.addressable_shards}) == 4  # a row each
        assert _serve(slots, requests) == [_alone(tiny.model, kind, r) for r in requests]


def test_after_compile_nothing_compiles(tiny, mesh_of, monkeypatch):
    monkeypatch.setattr(module, "LEAST_SEEN", 16)
    requests = _requests(tiny.model, "cross", 8)
    count = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: count.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    mesh = mesh_of(2, 2, 2)
    for where, params in ((None, tiny.params), (mesh, jax.device_put(tiny.params, meshes.replicated(mesh)))):
        with jax.set_mesh(where) if where is not None else jax.default_device(jax.devices()[0]):
            slots = _slots((tiny.graphdef, params), "cross", room=41)
            slots.compile()
            assert count
            count.clear()
            _serve(slots, requests)
            assert count == []


def test_compiling_leaves_rows_in_use_alone(tiny):
    (request,) = _requests(tiny.model, "cross", 1, seed=4)
    slots = _slots(tiny.model, "cross", rows=1, chunks=(64,))
    slots.start(0, request.inputs, request.length, **request.how)
    tokens = [slots.read(0)]
    slots.compile()
    tokens += [int(slots.step()[0]) for _ in range(request.most - 1)]
    assert tokens == _alone(tiny.model, "cross", request)


def test_a_prompt_is_read_in_the_fewest_chunks_that_waste_little(tiny):
    slots = _slots(tiny.model, "cross", chunks=(8, 4))
    for length, reads in ((1, 1), (4, 1), (5, 1), (8, 1), (9, 2), (20, 3), (ROOM, 5)):
        slots.start(2, np.ones((1, 50, 16), np.float32), length, user=None)
        assert [slots.read(2) is None for _ in range(reads)] == [True] * (reads - 1) + [False]
        slots.end(2)


def test_not_even_a_nan_survives_its_row(tiny):
    first, request = _requests(tiny.model, "cross", 2)
    slots = _slots(tiny.model, "cross", rows=2)
    for row in (0, 1):
        slots.start(row, np.full((1, 30, 16), np.nan, np.float32), 30, user=_kv(0, 2))
        while slots.read(row) is None:
            pass
    slots.end(0)
    slots.start(0, request.inputs, request.length, **request.how)
    while (token := slots.read(0)) is None:
        slots.step()  # beside a row that computes NaN
    tokens = [token] + [int(slots.step()[0]) for _ in range(request.most - 1)]
    assert tokens == _alone(tiny.model, "cross", request)


def test_a_row_may_fill_its_room_and_no_more(tiny):
    slots = _slots(tiny.model, "cross", rows=2, room=12)
    inputs = np.ones((1, 16, 16), np.float32)
    with pytest.raises(ValueError, match="prompt of 13 positions does not fit a row's room of 12"):
        slots.start(0, inputs, 13, user=None)
    slots.start(1, inputs, 10, user=None)
    tokens = [slots.read(1), slots.read(1)]
    tokens = tokens[1:] + [int(slots.step()[1]) for _ in range(2)]
    with pytest.raises(ValueError, match="Row 1 is full: its prompt and text fill its room of 12"):
        slots.step()
    alone = generate(*tiny.model, inputs[:, :10], lengths=[10], max_tokens=3, user=_kv(0, 0)).rows()[0]
    assert tokens == alone
    slots.end(1)
    slots.end(1)
    assert slots.step().tolist() == [-1, -1]


def test_bad_calls_are_refused_in_a_sentence(tiny):
    slots = _slots(tiny.model, "cross")
    inputs = np.ones((1, 4, 16), np.float32)
    slots.start(0, inputs, 4, user=None)
    for row in (0, 4, -1):
        with pytest.raises(ValueError, match=f"Row {row} is not free"):
            slots.start(row, inputs, 4, user=None)
    with pytest.raises(ValueError, match="hold no prompt"):
        slots.start(1, inputs, 5, user=None)
    with pytest.raises(ValueError, match="are not those of one user"):
        slots.start(1, inputs, 4, user=tiny.user)
    with pytest.raises(ValueError, match="seeds"):
        slots.start(1, inputs, 4, user=None, sampling=Sampling(1.0), seed=-1)
    with pytest.raises(ValueError, match="Row 1 has no prompt left to read"):
        slots.read(1)
    assert slots.read(0) is not None
    with pytest.raises(ValueError, match="Row 0 has no prompt left to read"):
        slots.read(0)
    with pytest.raises(ValueError, match="take no user"):
        _slots(tiny.model, "none").start(0, inputs, 4, user=_kv(0, 1))
    for how in ({"rows": 0}, {"room": 0}, {"chunks": ()}, {"chunks": (0, 4)}):
        with pytest.raises(ValueError, match="must be at least 1"):
            _slots(tiny.model, "cross", **how)
    with pytest.raises(ValueError, match="K/V of 3 users"):
        _slots(tiny.model, "cross", users=tiny.user)
