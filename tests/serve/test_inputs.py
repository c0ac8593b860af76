"""A prompt on its way into a row of the engine."""

import dataclasses

import jax
import numpy as np

import user_llm
from user_llm.serve.inputs import Inputs
from user_llm.serve.work import Prompt


def test_a_soft_prompt_stands_behind_the_tokens_that_lead(make_model, model):
    made = make_model("soft")
    soft = user_llm.load(made.directory)
    soft.lines.tokenizer = dataclasses.replace(soft.tokenizer, chat_template=model.tokenizer.chat_template)
    chat = [{"role": "system", "content": "Films."}, {"role": "user", "content": "Next?"}]
    row = soft.writer.row(None, None, None, {}, chat)
    leading = soft.writer.leading([row], chat)
    user = soft.encode(made.rows(1))
    with jax.set_mesh(soft.predictor.mesh):
        of = Inputs(soft, 96).of_prompt
        (whole, length, _), (bare, count, _) = of(Prompt(row, leading, user, 1)), of(Prompt(row, 0, None, 1))
    whole, bare = np.asarray(whole[0, :length]), np.asarray(bare[0, :count])
    assert 0 < leading < count == len(row) and length == count + len(user.tokens) > count
    np.testing.assert_array_equal(whole[:leading], bare[:leading])
    np.testing.assert_array_equal(whole[leading + len(user.tokens) :], bare[leading:])
