"""Conversations: where a soft prompt stands in them."""

import dataclasses

import jax
import numpy as np

import user_llm
from user_llm.models.generate import generate
from user_llm.serving import batch


def test_in_a_conversation_a_soft_prompt_stands_in_front_of_the_users_first_text(make_model):
    made = make_model("soft")
    model = user_llm.load(made.directory)
    template = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}\n{% endfor %}bot:"
    model.lines.tokenizer = dataclasses.replace(model.tokenizer, chat_template=template)
    user, encode = model.encode(made.rows(1)), model.tokenizer.encode
    bos = model.tokenizer.bos_id
    before = [bos, *encode("system\nFilms.\n"), bos, *encode("user\n")]
    row = np.array([*before, *encode("Next?\nbot:")], np.int32)
    with jax.set_mesh(model.predictor.mesh):
        inputs = model.predictor.decoding(*model.writer.padded([row]), batch.present(model.predictor, [user]), len(before))
        decoder, embedded, sizes, kv = inputs
        tokens = generate(*decoder, embedded, lengths=sizes.tolist(), max_tokens=12, stop_ids=model.tokenizer.stop_ids, user=kv)
    chat = [{"role": "system", "content": "Films."}, {"role": "user", "content": "Next?"}]
    text = model.generate(chat=chat, user=user, max_tokens=12)
    assert text == model.tokenizer.decode(tokens.rows()[0]) != model.generate(chat=chat, max_tokens=12)
    ids = model.writer.row(None, None, None, {}, chat)
    assert ids.tolist() == row.tolist() and model.writer.leading([ids], chat) == len(before)
