"""Texts for users: whole, in pieces, in batches, drawn, and until a stop text."""

import numpy as np
import pytest

from user_llm.common import trees
from user_llm.data.tokenizer import Tokenizer
from user_llm.models.generate import generate


def test_a_text_is_what_the_decoder_writes_whole_or_in_pieces(made, model):
    user = model.encode(made.rows(1))
    text = model.generate("Next:", user, max_tokens=20)
    assert "".join(model.generate("Next:", user, max_tokens=20, stream=True)) == text
    other = model.encode(made.rows(4))
    texts = model.generate_many(["Next:", "The Film", "Next:"], [user, None, other], max_tokens=20)
    assert texts == [text, model.generate("The Film", max_tokens=20), model.generate("Next:", other, max_tokens=20)]
    decoder = trees.split(trees.merge(model.predictor.graphdef, model.predictor.params).decoder)
    ids = [*model.lines.start.tolist(), *model.tokenizer.encode("The Film")]
    bare = generate(*decoder, [ids], max_tokens=20, stop_ids=model.tokenizer.stop_ids).rows()[0]
    assert texts[1] == model.tokenizer.decode(bare)
    if made.written.predictor.config.encoder is not None:
        assert not np.array_equal(model.score("Next:", ["Film"], user), model.score("Next:", ["Film"]))


def test_many_texts_are_written_in_batches(made, model):
    users = [model.encode(made.rows(user)) for user in (0, 1, 2, 3, 4, 0)]  # more than a batch
    one_by_one = [model.generate("Next:", user, max_tokens=6) for user in users]
    assert model.generate_many(["Next:"] * 6, users, max_tokens=6) == one_by_one
    assert model.generate_many([]) == []
    drawn = model.generate_many(["Next:"] * 6, users, max_tokens=6, temperature=1.0, seed=3)
    assert drawn == [model.generate("Next:", user, max_tokens=6, temperature=1.0, seed=3 + n) for n, user in enumerate(users)]


def test_writing_stops_at_a_text(model):
    text = model.generate("Next:", max_tokens=24)
    for start in (0, 3, len(text) - 2):
        stop = text[start : start + 2]
        expected = text[: text.index(stop)]
        assert model.generate("Next:", max_tokens=24, stop=[stop]) == expected
        assert "".join(model.generate("Next:", max_tokens=24, stop=[stop, "zzz"], stream=True)) == expected
    assert model.generate("Next:", max_tokens=24, stop=["no such text"]) == text


def test_who_draws_with_a_seed_draws_the_same_again(model):
    drawn = [model.generate("Next:", max_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_chat_whose_template_writes_a_token_without_a_row_is_refused(model, monkeypatch):
    rows = model.predictor.config.decoder.vocab_size
    monkeypatch.setattr(Tokenizer, "chat", lambda *_: [5, rows])
    monkeypatch.setattr(Tokenizer, "chat_around", lambda *_: ([5], [rows]))
    with pytest.raises(ValueError, match=rf"^The prompt has the token {rows}, and the LLM's table {rows} rows"):
        model.generate(chat=[{"role": "user", "content": "Hello"}])
