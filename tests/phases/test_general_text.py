"""The perplexity of general text; what training does to it is in tests/test_export.py."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from user_llm.data.tokenizer import train_bpe
from user_llm.models.decoder import Decoder, DecoderConfig
from user_llm.models.user import SoftPrompt, User
from user_llm.nn.cross_attention import CrossAttentionConfig, UserKV
from user_llm.nn.transformer import BlockConfig
from user_llm.phases.general_text import perplexity, read_windows

CONFIG = DecoderConfig(
    vocab_size=300, num_layers=2, block=BlockConfig(width=12, heads=2, kv_heads=2, head_dim=6, mlp_width=16),
    tie_embeddings=True,
)  # fmt: skip
ATTENDING = dataclasses.replace(CONFIG, cross=CrossAttentionConfig(user_width=8, every=1, heads=2, head_dim=4))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(["the rain in the old town\n"] * 5, 300, tmp_path_factory.mktemp("tokenizer") / "bpe")


def test_windows_cover_the_text_once_and_start_with_the_start_token(tokenizer, tmp_path):
    (tmp_path / "text").write_text("the old rain " * 30)
    ids = tokenizer.encode("the old rain " * 30)
    batch = read_windows(tokenizer, file=str(tmp_path / "text"), windows=99, window=8)
    assert batch["next"].size == len(ids) // 8 * 8 and len(ids) % 8  # an incomplete window was there to leave out
    np.testing.assert_array_equal(batch["next"].reshape(-1), ids[: batch["next"].size])
    assert (batch["tokens"][:, 0] == tokenizer.bos_id).all()
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["next"][:, :-1])
    assert len(read_windows(tokenizer, file=str(tmp_path / "text"), windows=2, window=8)["tokens"]) == 2


def test_the_text_that_comes_along_fills_windows(tokenizer):
    assert read_windows(tokenizer, file="", windows=16, window=128)["tokens"].shape == (16, 128)


def test_what_is_too_short_is_refused(tokenizer, tmp_path):
    (tmp_path / "text").write_text("rain")
    with pytest.raises(ValueError, match="less than one window: set general_text.window below 8"):
        read_windows(tokenizer, file=str(tmp_path / "text"), windows=2, window=8)


def test_perplexity_is_that_of_the_logits(drawn, bare_logits, tokenizer, tmp_path):
    (tmp_path / "text").write_text("the old rain " * 30)
    batch = read_windows(tokenizer, file=str(tmp_path / "text"), windows=5, window=8)
    graphdef, params = drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(params=0)))
    log_probs = np.asarray(jax.nn.log_softmax(bare_logits(CONFIG, params, batch["tokens"])))
    expected = np.exp(-np.take_along_axis(log_probs, batch["next"][..., None], axis=-1).mean())
    np.testing.assert_allclose(perplexity(graphdef, params, batch), expected, rtol=1e-5)


@pytest.mark.parametrize("way", ["cross_attention", "soft_prompt"])
def test_a_user_changes_it_and_a_user_without_events_does_not(drawn, tokenizer, tmp_path, way):
    (tmp_path / "text").write_text("the old rain " * 30)
    batch = read_windows(tokenizer, file=str(tmp_path / "text"), windows=3, window=8)
    model = drawn(lambda: Decoder(ATTENDING, rngs=nnx.Rngs(params=0)))
    k, v = np.random.default_rng(0).normal(size=(2, 2, 3, 2, 4, 4)).astype(np.float32)
    soft = np.random.default_rng(0).normal(size=(3, 4, 12)).astype(np.float32)
    nobody, somebody = (
        User(kv=UserKV(k, v, np.full((3, 4), real > 0)))
        if way == "cross_attention"
        else User(prompt=SoftPrompt(soft, np.full(3, real)))
        for real in (0, 4)
    )
    alone = perplexity(*model, batch)
    if way == "cross_attention":
        assert perplexity(*model, batch, nobody) == alone
    else:  # rows are longer by padding, and sums round otherwise: what is summed, and rounded, is the loss, of which this is the power
        np.testing.assert_allclose(np.log(perplexity(*model, batch, nobody)), np.log(alone), rtol=1e-6)
    assert abs(perplexity(*model, batch, somebody) - alone) > 1e-3 * alone
