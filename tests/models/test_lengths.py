"""A decoder that is read for texts of some length: what is read of a text counts, and neither padding nor beams beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.models.beam_search import beam_generate
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.generate import generate
from user_llm.models.score import score
from user_llm.models.slots import Slots
from user_llm.nn.rotary import RopeScaling
from user_llm.nn.transformer import BlockConfig

LONGEST = 70
SCALING = RopeScaling("longrope", 2.0, factors=(1.0, 1.5, 2.0, 2.5), original_length=LONGEST)
BLOCK = BlockConfig(width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=24, rope_scaling=SCALING)
CONFIG = DecoderConfig(vocab_size=12, num_layers=1, block=BLOCK, tie_embeddings=True, unroll=True)
PROMPT = np.random.default_rng(0).integers(3, 12, 62).tolist()  # in 64 slots, with 64 or more behind it for what is written


@pytest.fixture(scope="module")
def model(drawn):
    return drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(params=0)))


def test_texts_that_end_at_the_last_position_are_written_and_scored(model, bare_logits):
    written = generate(*model, [PROMPT], max_tokens=9).tokens[0]  # of which 8 are read
    said = bare_logits(CONFIG, model[1], np.array([[*PROMPT, *written[:-1]]]))[0, len(PROMPT) - 1 :]
    np.testing.assert_array_equal(written, said.argmax(-1))
    log_probs = jax.nn.log_softmax(jnp.asarray(said))[jnp.arange(9), written]
    np.testing.assert_allclose(score(*model, [PROMPT], [[written.tolist()]])[0, 0], log_probs.sum(), atol=1e-4)
    beams = beam_generate(*model, [PROMPT], beams=2, max_tokens=9, length_penalty=0.0)
    texts = [tokens.tolist() for tokens in beams.tokens[0]]
    np.testing.assert_allclose(score(*model, [PROMPT], [texts])[0], beams.scores[0], atol=1e-4)


def test_longer_texts_are_refused(model):
    for ask in (
        lambda: generate(*model, [PROMPT[:5], PROMPT], max_tokens=10),
        lambda: beam_generate(*model, [PROMPT], beams=2, max_tokens=10),
        lambda: score(*model, [PROMPT], [[[3], [3] * 10]]),
    ):
        with pytest.raises(
            ValueError, match="^A text of 71 tokens is asked for, .* read for texts of at most 70: make prompts"
        ):
            ask()
    with pytest.raises(ValueError, match="^A row of 71 tokens is asked for"):
        Slots(*model, rows=1, room=LONGEST + 1, users=None)
    assert Slots(*model, rows=1, room=LONGEST, users=None).room == LONGEST
