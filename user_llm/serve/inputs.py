"""The way of a prompt into the rows of an engine, and the programs that are compiled before anybody waits."""

import contextlib
import dataclasses
from typing import Any

import numpy as np

from user_llm.common import mesh as meshes
from user_llm.data.prompts.base import pad_rows
from user_llm.models.slots import Slots
from user_llm.serve.limits import Limits
from user_llm.serve.work import Prompt
from user_llm.serving import batch
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.user import User


class Inputs:
    """Makes what the decoder of a model reads: prompts as embeddings, and users as keys and values.

    Args:
      room: the number of tokens to which prompts are padded.
    """

    def __init__(self, model: Personalizer, room: int):
        self._model, self._room = model, room

    def decoder(self) -> tuple:
        """Return the structure and the parameters of the decoder."""
        text, lengths = self._put(np.array([[self._model.lines.end_id]], np.int32), [1])
        return self._model.predictor.decoding(text, lengths, self.users(None), 0)[0]

    def of_prompt(self, prompt: Prompt) -> tuple:
        """Return a prompt as embeddings, its length, and the keys and values of its user."""
        text, lengths = self._put(pad_rows([prompt.row], self._room), [len(prompt.row)])
        _, inputs, sizes, kv = self._model.predictor.decoding(text, lengths, self.users(prompt.user), prompt.leading)
        return inputs, int(meshes.fetch(sizes)[0]), kv

    def users(self, user: User | None) -> Any:
        """Return what the decoder reads of a user."""
        return batch.present(self._model.predictor, [user])

    def _put(self, rows: np.ndarray, lengths: list[int]) -> tuple:
        return meshes.put_rows((rows, np.array(lengths, np.int32)), self._model.predictor.mesh)


def compiled(model: Personalizer, inputs: Inputs, limits: Limits) -> Slots:
    """Return free rows for texts; compile all programs, so that none is compiled while somebody waits."""
    nobody = inputs.users(None)
    slots = Slots(*inputs.decoder(), rows=limits.rows, room=limits.context, users=None if nobody is None else nobody.kv)
    slots.compile()
    inputs.of_prompt(Prompt(np.array([*model.lines.start, model.lines.end_id], np.int32), 0, None, 1))
    ask(model, limits)
    if model.tokenizer.chat_template is not None:  # the first conversation imports what takes seconds
        with contextlib.suppress(ValueError):
            model.tokenizer.chat([{"role": "user", "content": "Hello"}])
    return slots


def ask(model: Personalizer, limits: Limits) -> None:
    """Compile all programs that answer questions about users."""
    user, size = model.reader.nobody(), 1
    if model.predictor.max_events:
        user = dataclasses.replace(user, events=np.ones((1, user.events.shape[1]), np.int32), ticks=np.zeros(1, np.int64))
    while size <= limits.batch:
        those = model.reader.encoded([user] * size)
        if "next_item" in model.tasks:
            for seen in (True, False):
                model.recommend_many(those, 1, seen=seen)
        size *= 2
    if model.predictor.config.resampler is not None:
        model.explain(those[0], 1)
