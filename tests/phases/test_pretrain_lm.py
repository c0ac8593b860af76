"""The loss of the small LLM by hand: the mean cross entropy of each next token within its line."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from user_llm.common import trees
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.phases.pretrain_lm import lm_loss

CONFIG = DecoderConfig(vocab_size=13, num_layers=1, block=BlockConfig(width=8, heads=2, kv_heads=1, head_dim=4, mlp_width=12), tie_embeddings=True)  # fmt: skip
LINES = [[1, 5, 9, 2], [1, 7, 2]]
# One row that holds both lines and padding, as `packed_text` makes it.
PACKED = {
    "tokens": np.array([[1, 5, 9, 1, 7, 0]]), "next": np.array([[5, 9, 2, 7, 2, 0]]),
    "segments": np.array([[1, 1, 1, 2, 2, 0]]), "positions": np.array([[0, 1, 2, 0, 1, 0]]),
}  # fmt: skip


def test_the_loss_is_the_mean_over_real_tokens_and_lines_do_not_see_each_other(drawn, bare_logits):
    graphdef, params = drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    batch = jax.tree.map(jnp.asarray, PACKED)
    loss = float(jax.jit(lambda params: lm_loss(trees.merge(graphdef, params), batch, None, 4)[0])(params))
    found = []
    for line in LINES:  # each alone
        log_probs = jax.nn.log_softmax(bare_logits(CONFIG, params, np.array([line[:-1]]))[0])
        found += [-float(log_probs[place, token]) for place, token in enumerate(line[1:])]
    np.testing.assert_allclose(loss, np.mean(found), rtol=1e-5)
