"""A tiny decoder with users, and an oracle of its next-token log-probs that knows no cache."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.nn.cross_attention import CrossAttentionConfig, UserKV
from user_llm.nn.transformer import BlockConfig
from user_llm.nn.visibility import causal_mask

VOCAB, END = 12, 2
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=2,
    block=BlockConfig(
        width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24, window=3, window_rope_theta=100.0, attn_softcap=2.0
    ),
    tie_embeddings=False,
    logit_divisor=0.5,
    logit_softcap=4.0,
    windowed=(True, False),
    unrotated=(False, True),
    cross=CrossAttentionConfig(user_width=6, every=2, heads=2, head_dim=4),
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model split in two, prompts of mixed length, and users with two, no and one token."""

    graphdef: nnx.GraphDef
    params: trees.Params
    prompts: list[list[int]]
    user: UserKV
    vocab: int = VOCAB
    end: int = END

    @property
    def model(self) -> tuple[nnx.GraphDef, trees.Params]:
        return self.graphdef, self.params

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(prompt) for prompt in self.prompts])

    @property
    def padded(self) -> np.ndarray:
        """The prompts, with a token that is no PAD behind the shorter ones."""
        table = np.full((len(self.prompts), self.lengths.max()), 7)
        for row, prompt in zip(table, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        return table

    def log_probs(self, row: int, continuation: Sequence[int]) -> np.ndarray:
        """Return log-probs [T, V] from the answer position on, by one full forward pass."""
        return self._full(row, tuple(int(token) for token in continuation))

    @functools.cache  # noqa: B019
    def _full(self, row: int, continuation: tuple[int, ...]) -> np.ndarray:
        ids = [*self.prompts[row], *continuation]
        user = UserKV(self.user.k[:, [row]], self.user.v[:, [row]], self.user.mask[[row]])
        table = np.pad(ids, (0, 24 - len(ids)))[None]
        return np.asarray(_forward(self.graphdef, self.params, table, len(ids), user))[len(self.prompts[row]) - 1 : len(ids)]

    def __hash__(self) -> int:
        return id(self)


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, params, ids, length, user):
    decoder = trees.merge(graphdef, params)
    mask = causal_mask(jnp.arange(ids.shape[1])[None] < length)
    hidden, _ = decoder(decoder.embed_tokens(ids), mask=mask, positions=jnp.arange(ids.shape[1])[None], user=user)
    return jax.nn.log_softmax(decoder.logits(hidden))[0]


@pytest.fixture(scope="session")
def random_titles() -> Callable[..., dict[int, list[int]]]:
    """Return `draw(count, seed, most)`: distinct titles over few tokens, so that many share prefixes; ids out of order."""

    def draw(count: int, seed: int, most: int = 6) -> dict[int, list[int]]:
        rng, titles = np.random.default_rng(seed), set()
        while len(titles) < count:
            titles.add((*rng.integers(3, 7, rng.integers(0, most)).tolist(), END))
        ids = rng.permutation(np.arange(1, count + 1)).tolist()
        return dict(zip(ids, map(list, sorted(titles)), strict=True))

    return draw


@pytest.fixture(scope="session")
def tiny(drawn) -> Tiny:
    graphdef, params = drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (2, 5, 3)]
    k, v = rng.normal(size=(2, 1, 3, 2, 2, 4)).astype(np.float32)
    user = UserKV(k, v, np.array([[True, True], [False, False], [True, False]]))
    return Tiny(graphdef, params, prompts, user)
