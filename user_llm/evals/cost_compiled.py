"""What a request costs as compiled: XLA's count of its FLOPs, and how long the same program takes (the paper's efficiency).

Programs are those of serving: `UserLLM` and its decoder's cache, one user a batch, layers unrolled, since XLA counts the body of a
scan once. The count is of the optimised HLO; exp and other functions, which it counts apart as "transcendentals", are left out.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from user_llm.common import trees
from user_llm.common.trees import Params
from user_llm.evals.cost import Request, user_side
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.nn.attention import KVCache
from user_llm.nn.cross_attention import UserKV
from user_llm.nn.visibility import cache_mask

# Shorter calls are repeated until they have taken this long together.
SHORTEST_S = 0.05
# Without LLVM's optimisations a program compiles far sooner; its HLO and the count are the same.
COUNTING: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

Key = TypeVar("Key", bound=Hashable)
Given = dict[str, Any]


def unrolled(config: UserLLMConfig) -> UserLLMConfig:
    """Return the same model with all its layers inlined, so that XLA counts each."""
    encoder = config.encoder
    encoder = dataclasses.replace(encoder, unroll=True) if isinstance(encoder, UserEncoderConfig) else encoder
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, unroll=True), encoder=encoder)


def create(config: UserLLMConfig) -> Params:
    """Draw random parameters of an unrolled model, on the first device."""
    place = functools.partial(jax.tree.map, lambda _: SingleDeviceSharding(jax.devices()[0]))
    return trees.init(lambda: UserLLM(unrolled(config), rngs=nnx.Rngs(params=0)), place)


@functools.lru_cache(maxsize=8)
def structure(config: UserLLMConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the structure and the shapes of an unrolled model."""
    return trees.abstract(lambda: UserLLM(unrolled(config), rngs=nnx.Rngs(params=0)))


def serve(graphdef: nnx.GraphDef, params: Params, given: Given, cache: KVCache):
    """Read `given["text"]` [1, T] behind what the cache holds; return the last token's logits and the cache.

    The user comes as `events` [1, E, A], `tokens` [1, M, U] or `kv`, or not at all.
    """
    model, user = trees.merge(graphdef, params), given.get("kv")
    if "events" in given:
        user = model.user(model.encode(given["events"], jnp.full((1, 1), given["events"].shape[1]))).kv
    elif "tokens" in given:
        user = model.decoder.user_kv(given["tokens"], jnp.ones(given["tokens"].shape[:2], bool))
    length = given["text"].shape[1]
    positions = cache.slots - length + jnp.arange(length)[None]
    embedded = model.decoder.embed_tokens(given["text"])
    hidden, cache = model.decoder(
        embedded, mask=cache_mask(positions, cache.slots), positions=positions, cache=cache, user=user
    )
    return model.decoder.logits(hidden[:, -1]), cache


def inputs(config: UserLLMConfig, request: Request) -> tuple[Given, KVCache]:
    """Return the shapes of what `serve` reads for one request."""
    graphdef, params = structure(config)
    of_decoder = lambda f: jax.eval_shape(lambda params: f(trees.merge(graphdef, params).decoder), params)  # noqa: E731
    cache = of_decoder(lambda decoder: decoder.init_cache(1, request.slots))
    given: Given = {"text": jax.ShapeDtypeStruct((1, request.tokens), jnp.int32)}
    if request.user == "none":
        return given, cache
    encoder, resampler = user_side(config)
    tokens = (1, config.num_tokens or 0, resampler.input_width)
    if request.user == "events":
        given["events"] = jax.ShapeDtypeStruct((1, request.events, encoder.schema.width), jnp.int32)
    elif request.user == "tokens":
        given["tokens"] = jax.ShapeDtypeStruct(tokens, jnp.float32)
    else:
        given["kv"] = of_decoder(lambda decoder: decoder.user_kv(jnp.zeros(tokens), jnp.ones(tokens[:2], bool)))
    return given, cache


def _ones(shapes: Any) -> Any:
    return jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled request."""

    config: UserLLMConfig
    request: Request
    compiled: jax.stages.Compiled

    @property
    def flops(self) -> int:
        """XLA's count; refused where the backend gives none."""
        analysis = self.compiled.cost_analysis()
        if not analysis or "flops" not in analysis:
            raise ValueError("XLA counts no FLOPs on this backend: count on CPU by JAX_PLATFORMS=cpu.")
        return int(analysis["flops"])

    @property
    def temporary_bytes(self) -> int:
        """Memory that a run needs besides parameters, inputs and outputs."""
        analysis = self.compiled.memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes

    def timer(self, params: Params) -> Callable[[], float]:
        """Return a function that serves the request and returns the seconds; the cache is updated in place, run after run."""
        given, cache = _ones(inputs(self.config, self.request))
        kept = [cache]

        def run() -> float:
            count, start = 0, time.perf_counter()
            while not count or time.perf_counter() - start < SHORTEST_S:
                logits, kept[0] = self.compiled(params, given, kept[0])
                logits.block_until_ready()
                count += 1
            return (time.perf_counter() - start) / count

        return run


def compile_request(config: UserLLMConfig, request: Request, *, to_run: bool = True) -> Program:
    """Compile one request, of shapes alone; what is not `to_run` only to be counted compiles sooner."""
    graphdef, params = structure(config)
    lowered = jax.jit(functools.partial(serve, graphdef), donate_argnums=2).lower(params, *inputs(config, request))
    return Program(config, request, lowered.compile(compiler_options=None if to_run else COUNTING))


def step_timer(config: UserLLMConfig, params: Params, step: Request, *, steps: int) -> Callable[[], float]:
    """Return a function that writes `steps` tokens behind `step.cached` in one compiled loop and returns the seconds of one.

    The loop is greedy, and as in `models/generate.py` takes the layers' parameters once.
    """
    graphdef, _ = structure(config)

    def write(params: Params, cache: KVCache, kv: UserKV | None) -> tuple[Array, KVCache]:
        decoder = trees.merge(graphdef, params).decoder
        layers = decoder.stack.layers()

        def advance(i, carry):
            token, cache = carry
            positions = jnp.full((1, 1), step.cached) + i
            hidden, cache = decoder(
                decoder.embed_tokens(token), mask=cache_mask(positions, cache.slots), positions=positions, cache=cache,
                user=kv, layers=layers,
            )  # fmt: skip
            return decoder.logits(hidden[:, 0]).argmax(-1)[:, None], cache

        return jax.lax.fori_loop(0, steps, advance, (jnp.ones((1, 1), jnp.int32), cache))

    last = dataclasses.replace(step, cached=step.cached + steps - 1)
    given, cache = _ones(inputs(config, last))
    kept, kv = [cache], given.get("kv")
    compiled = jax.jit(write, donate_argnums=1).lower(params, cache, kv).compile()

    def run() -> float:
        start = time.perf_counter()
        token, kept[0] = compiled(params, kept[0], kv)
        token.block_until_ready()
        return (time.perf_counter() - start) / steps

    return run


def least(timers: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, float]:
    """Return the least of `rounds` timings of each, turn by turn: whatever else the machine does only adds to them.

    A turn before them warms up and is not counted.
    """
    turns = [{key: timer() for key, timer in timers.items()} for _ in range(rounds + 1)][1:]
    return {key: min(turn[key] for turn in turns) for key in timers}
