r"""Requests for a vLLM server, in which a user stands as a soft prompt. vLLM itself stays as it is.

    python -m user_llm.export --model=RUN/user_llm/model --out=DIR
    vllm serve DIR --enable-prompt-embeds

    model = user_llm.load("DIR")
    body = vllm.completion(model, user, "The next film this user watches:\n")       # for /v1/completions
    body = vllm.conversation(model, user, [{"role": "user", "content": "Hello"}])   # for /v1/chat/completions
    requests.post(f"{url}/v1/completions", json={"model": "DIR", "max_tokens": 64, **body})

A model with cross-attention is served with the plugin of `vllm_plugin.py`, whose first lines say how; it takes conversations.

A completion is the whole prompt as embeddings. The soft prompt stands where `Personalizer.generate` puts it, so that greedy tokens
are the same. A conversation is messages: the user's first one has the soft prompt as a content part in front of its text, and the
server applies its chat template around that.

vLLM's cache of prefixes knows a block of embeddings by their bytes. In a prompt of tokens and embeddings it takes a zero embedding
for the token 0 (vLLM issue 56655). A conversation therefore has a `cache_salt` of its user: nothing is shared between two users.

The server reads embeddings without checking what they are. Only trusted programs may therefore send them. Granite multiplies them
once more, wherever they come from: its models are refused.
"""

import base64
import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from user_llm.common import mesh as meshes
from user_llm.data.tokenizer import first_of_user
from user_llm.serving import batch
from user_llm.serving.personalizer import Personalizer
from user_llm.serving.user import User


def completion(
    model: Personalizer,
    user: User | None,
    prompt: str | None = None,
    *,
    task: str = "",
    fields: Mapping[str, Any] | None = None,
    chat: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the part of a request of /v1/completions that holds the prompt, its user and what ends the text.

    The caller adds `model`, `max_tokens`, `temperature` and so on. A caller whose client insists on `prompt` passes an empty list.

    Args:
      user: the user whom the text is for; None for the LLM without a user.
      prompt, task, fields, chat: what to write, as in `Personalizer.generate_many`.

    Raises:
      ValueError: the model has cross-attention or is a Granite, the user is of another model, or the prompt, task or chat is one that
        `Personalizer.generate_many` refuses.
    """
    if model.predictor.config.decoder.cross is not None:
        raise ValueError(
            "This model attends to its user by cross-attention, for which a completion has no place: ask it by a conversation."
        )
    _check_scale(model)
    if user is not None:
        model.check(user)
    writer = model.writer
    template = writer.template(task, fields) if task else None
    row = writer.row(prompt, user, template, fields or {}, chat)
    leading = model.predictor.leading(task) if task else writer.leading([row], chat)
    with jax.set_mesh(model.predictor.mesh):
        _, inputs, lengths, _ = model.predictor.decoding(*writer.padded([row]), batch.present(model.predictor, [user]), leading)
        embedded = meshes.fetch(inputs)[0, : int(meshes.fetch(lengths)[0])]
    stops = [model.lines.end_id] if task else list(model.tokenizer.stop_ids)
    # The server adds stop tokens that the checkpoint names, unless it ignores them.
    return {"prompt_embeds": encode_tensor(embedded), "stop_token_ids": stops, "ignore_eos": True}


def conversation(model: Personalizer, user: User | None, chat: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of a request of /v1/chat/completions that holds the messages and their user.

    The user is a content part in front of the text of the user's first message, or of the first message where the user has none.

    For a model with a soft prompt the part is the soft prompt. A server whose chat template takes texts, and not lists of parts,
    writes a line break behind it, which `Personalizer.generate` and `completion(model, user, chat=...)` do not.

    For a model with cross-attention the part is the user tokens, which are no part of the text: tokens are those of
    `Personalizer.generate`.

    Args:
      user: the user whom the answer is for. Without a user, or for a user without events, the messages are returned as they are.
      chat: messages such as {"role": "user", "content": "Hello"}.

    Raises:
      ValueError: the model has both cross-attention and a soft prompt, or a soft prompt and is a Granite, the user is of another model, or there is no message.
    """
    if not chat:
        raise ValueError("The chat has no messages: give at least one.")
    if user is not None:
        model.check(user)
    config = model.predictor.config
    if config.decoder.cross is not None and config.soft_prompt:
        raise ValueError("vLLM gives a request cross-attention or a soft prompt, and this model has both.")
    messages = [dict(message) for message in chat]
    if user is None or not len(user.tokens) or config.encoder is None:
        return {"messages": messages}
    if config.decoder.cross is not None:
        data = encode_tensor(user.tokens)
        part = {"type": "image_embeds", "image_embeds": data}
    else:
        _check_scale(model)
        data = encode_tensor(soft_tokens(model, user))
        part = {"type": "prompt_embeds", "data": data}
    first = messages[first_of_user(messages)]
    content = first.get("content")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    first["content"] = [part, *texts]
    return {"messages": messages, "cache_salt": hashlib.sha256(data.encode()).hexdigest()}


def _check_scale(model: Personalizer) -> None:
    """Refuse an LLM that scales all embeddings that it is given; Gemma scales by the square root of the width, and tokens' alone."""
    decoder = model.predictor.config.decoder
    if decoder.embed_scale not in (1.0, decoder.block.width**0.5):
        raise ValueError(
            f"LLMs of this family (Granite) multiply embeddings by {decoder.embed_scale} wherever they come from, and these are "
            "multiplied already: let this package itself write, or use cross-attention."
        )


def soft_tokens(model: Personalizer, user: User | None) -> Float[np.ndarray, "M D"]:
    """Return a user's soft prompt: M soft tokens of the width D of the LLM's embeddings; none without a user or events."""
    with jax.set_mesh(model.predictor.mesh):
        read = batch.present(model.predictor, [user])
    if read is None or read.prompt is None:
        return np.zeros((0, model.predictor.config.decoder.block.width), np.float32)
    return meshes.fetch(read.prompt.tokens)[0, : int(meshes.fetch(read.prompt.lengths)[0])]


def encode_tensor(array: Float[np.ndarray, "T D"]) -> str:
    """Return a matrix as base64 of the file that `torch.save` writes of a float32 tensor: the one form that vLLM reads.

    Such a file is an uncompressed zip archive of the numbers and of a pickle that says how to read them. It is simple enough to be
    written without torch.
    """
    rows, width = array.shape
    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731 - a pickled int
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value  # noqa: E731 - a pickled str
    # _rebuild_tensor_v2(storage, offset=0, shape=(rows, width), strides=(width, 1), requires_grad=False, hooks=OrderedDict())
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + number(rows * width) + b"tQ"
    shape, strides = (number(n) + number(m) + b"\x86" for n, m in ((rows, width), (width, 1)))
    call = b"(" + storage + number(0) + shape + strides + b"\x89ccollections\nOrderedDict\n)Rt"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + call + b"R.")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", np.ascontiguousarray(array, "<f4").tobytes())
        archive.writestr("archive/version", "3\n")
    return base64.b64encode(file.getvalue()).decode()
