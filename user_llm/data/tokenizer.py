"""Text to token ids and back: a checkpoint's own tokenizer, or a byte-level BPE trained on a dataset's text.

Both are one `tokenizers.Tokenizer` underneath. Special tokens are never added by `encode`, and a title that reads
"<eos>" is text like any other; whoever builds a prompt puts their ids where they belong, and `chat` does so by the
checkpoint's own template. Left out: images and other parts of a message that are no text.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from user_llm.common.records import misfit, read_file, read_json, read_text, text, whole_number
from user_llm.data.values import shown

SPECIALS = ("<pad>", "<bos>", "<eos>")
GUARD = 0xF0000  # first of 65,533 private-use characters, which stand for what only looks like special tokens
PLACE = chr(0xFFFFD)  # the last private-use character there marks a place in a conversation
BATCH = 10_000  # texts that are encoded at once
FEWEST_WORDS = 32  # of a vocabulary, special and added tokens not counted; a missing file leaves next to none
AGAIN = "get the tokenizer again"
MIN_BPE_VOCAB = len(SPECIALS) + 256  # one token per byte, so that any text can be encoded


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids of its special tokens.

    Attributes:
      bos_id, eos_id: None where the model has no such token.
      pad_id: 0 where the model names none; padding is masked, so any id would do.
      stop_ids: tokens that end a text: those of generation_config.json, else those of the LLM's config.json; where neither names any, `eos_id`
        if there is one.
      special_tokens: texts of the special tokens by role, such as {"eos_token": "</s>"}, for the chat template.
      chat_template: Jinja template of a conversation; None where the checkpoint has none.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    stop_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; a checkpoint's embedding table may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def check_fits(self, rows: int, source: str, remedy: str = AGAIN) -> None:
        """Check that an embedding table of `rows` rows has a row for every token that can come to stand in a prompt.

        Special tokens beyond the table, such as Gemma 3's for images, may be there as long as no prompt has them.

        Raises:
          ValueError: it has not; `source` and `remedy` are named.
        """
        special = {number for number, token in self.backend.get_added_tokens_decoder().items() if token.special}
        own = {number for number in (self.bos_id, self.eos_id) if number is not None}
        ids = (set(self.backend.get_vocab(with_added_tokens=True).values()) - special) | own
        if (highest := max(ids, default=-1)) >= rows:
            raise ValueError(f"{source}: the tokenizer has {highest + 1} tokens, and the LLM's table {rows}; {remedy}.")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them special.

        Raises:
          ValueError: it is no text, or holds half a surrogate pair.
        """
        return _ids(self.backend, text)

    def encode_all(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        """Return the ids of many texts, each as `encode` does, on all cores."""
        ids = []
        for begin in range(0, len(texts), BATCH):  # the backend's own records of a text take far more memory than its ids
            part = list(texts[begin : begin + BATCH])
            try:
                encodings = self.backend.encode_batch_fast(part, add_special_tokens=False)
            except TypeError:
                raise _no_text(part) from None
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Return the text of `ids`; special tokens are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Return the ids of a conversation, as the checkpoint's template writes it.

        Special tokens are those of the template: what a message holds is text, even if it reads "<|im_end|>". Added tokens
        that the checkpoint does not call special, such as Qwen3's <think>, are parsed wherever they stand.

        Args:
          messages: such as {"role": "user", "content": "Hello"}.
          add_generation_prompt: end where the assistant's answer begins.
          variables: of the template, such as enable_thinking=False.

        Raises:
          ValueError: a tokenizer without a template, or messages that its template refuses.
        """
        return self._parsed(self._rendered(self._guarded(list(messages)), add_generation_prompt, variables))

    def chat_around(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation in two parts: what stands before the text of the user's first message, and the rest.

        In front of this text is the place of a soft prompt: behind the system's message, and outside of the template's own marks. In
        a conversation without a user's message it is the first message's text. Joined, the parts are the ids of `chat`. The exceptions
        are a token of `chat` that begins before the place and ends behind it, and a template that does more with this text than
        write it. Where the template writes no such text, or the text is empty, all ids are in the second part.

        Raises:
          ValueError: as in `chat`.
        """
        marked = self._guarded(list(messages))
        if marked:
            message = marked[first_of_user(marked)]
            message["content"] = _marked(message.get("content"))
        before, place, after = self._rendered(marked, True, {}).partition(PLACE)
        parts = (before, after.replace(PLACE, "")) if place else ("", before)
        first, second = map(self._parsed, parts)
        return first, second

    def _rendered(self, messages: list, add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        """Return what the template makes of guarded messages; errors as in `chat`."""
        if self.chat_template is None:
            raise ValueError("This tokenizer has no chat template: build the prompt from `encode` and special ids.")
        from transformers.utils import chat_template_utils  # here, since it takes seconds

        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return chat_template_utils.render_jinja_template(
                [given], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **self._guarded(variables)},
            )[0][0]  # fmt: skip
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template refuses these messages: {error}.") from error

    def _parsed(self, rendered: str) -> list[int]:
        """Return the ids of a rendered conversation: the template's special tokens as such, those of messages as text."""
        ids = []
        for part in re.split(f"([{self._guards}])", rendered):
            if re.fullmatch(f"[{self._guards}]", part):
                ids += self.encode(self._specials[ord(part) - GUARD])
            elif part:
                ids += _ids(self._parsing, part)
        return ids

    def _guarded(self, value: Any) -> Any:
        """Replace each special token in all texts of a message by one character, which no template can cut apart."""
        if isinstance(value, str):
            special = "|".join(map(re.escape, self._specials)) or "(?!)"
            plain = re.sub(f"[{self._guards}{PLACE}]", "", value)
            return re.sub(special, lambda match: chr(GUARD + self._specials.index(match[0])), plain)
        if isinstance(value, Mapping):
            return {key: self._guarded(item) for key, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list | tuple) else value

    @functools.cached_property
    def _specials(self) -> list[str]:
        """Texts of the special tokens, the longer before those that they begin with."""
        added = self.backend.get_added_tokens_decoder().values()
        return sorted((token.content for token in added if token.special), key=len, reverse=True)

    @property
    def _guards(self) -> str:
        return f"{chr(GUARD)}-{chr(GUARD + len(self._specials))}"

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """A backend of its own that reads special tokens as such, since threads may share the other."""
        return tokenizers.Tokenizer.from_str(self.backend.to_str())  # what `_wrap` sets is not stored


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except TypeError:
        raise _no_text([text]) from None


def _no_text(values: Sequence[Any]) -> ValueError:
    """Return what is wrong with the first value that the backend does not take."""
    for value in values:
        if not isinstance(value, str):
            return ValueError(f"{shown(value)} is no text.")
        try:
            value.encode()
        except UnicodeEncodeError:
            return ValueError(f"The text {shown(value)} holds half a surrogate pair, which stands for no character.")
    return ValueError("The texts cannot be read.")


def first_of_user(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the place in a conversation of the user's first message; 0 where there is none."""
    return next((place for place, message in enumerate(messages) if message.get("role") == "user"), 0)


def _marked(content: Any) -> Any:
    """Return a message's content with PLACE in front of its text; templates may strip the spaces before that.

    An empty text stays empty, since templates ask whether there is one.
    """
    if isinstance(content, list):
        at = next((n for n, part in enumerate(content) if isinstance(part, dict) and isinstance(part.get("text"), str)), None)
        return (
            content
            if at is None
            else [*content[:at], {**content[at], "text": _marked(content[at]["text"])}, *content[at + 1 :]]
        )
    if not isinstance(content, str):
        return content
    text = content.lstrip()
    return content[: len(content) - len(text)] + PLACE + text if text else content


def train_bpe(texts: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> Tokenizer:
    """Train a byte-level BPE and save it as a directory in Hugging Face layout.

    Ids 0, 1, 2 are <pad>, <bos>, <eos>; a newline is always one token of its own, so that it can end a title. Little
    text gives fewer than `vocab_size` tokens. The directory appears only when it is complete.

    Raises:
      ValueError: a vocabulary too small for all bytes, or a directory that exists.
    """
    path = epath.Path(directory)
    if vocab_size < MIN_BPE_VOCAB:
        raise ValueError(f"vocab_size {vocab_size} is too small: byte-level BPE needs at least {MIN_BPE_VOCAB}.")
    if path.exists():
        raise ValueError(f"{path} exists already: delete it to train the tokenizer anew.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    unfinished = path.parent / f"{path.name}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / "tokenizer.json").write_text(backend.to_str())
    (unfinished / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=1)
    )
    unfinished.rename(path)
    return _wrap(backend, names)


def load_tokenizer(directory: str | os.PathLike, llm: str | os.PathLike | None = None) -> Tokenizer:
    """Load a directory with tokenizer.json, or with other files that `transformers.AutoTokenizer` knows.

    Args:
      llm: the directory of the LLM's config.json; None for the same directory.

    Raises:
      ValueError: no tokenizer there, broken files, or a vocabulary of next to no words.
    """
    path = epath.Path(directory)
    file = path / "tokenizer.json"
    stop_ids = _stop_ids(path, path if llm is None else epath.Path(llm))
    if not file.exists():
        return _with_words(_load_with_transformers(path, stop_ids), path)
    try:
        backend = tokenizers.Tokenizer.from_buffer(read_file(file))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file} is no tokenizer: {error}.") from error
    settings = _settings(path / "special_tokens_map.json") | _settings(
        path / "tokenizer_config.json", {"chat_template?": template}
    )
    if (path / "chat_template.jinja").exists():
        settings["chat_template"] = read_text(path / "chat_template.jinja")
    return _with_words(_wrap(backend, settings, stop_ids), path)


def _stop_ids(path: epath.Path, llm: epath.Path) -> int | list[int] | None:
    """Return the tokens that end a text where generation_config.json, or else config.json, names any.

    A wrapper's config.json may name them in its own settings or in those of its language model.
    """
    form, file = {"eos_token_id?": token_ids}, llm / "config.json"
    whole = _settings(file, form)
    part = whole.get("text_config")
    if isinstance(part, dict) and (wrong := misfit(part, form)):
        raise ValueError(f"{file}: text_config {wrong}; {AGAIN}.")
    files = (_settings(path / "generation_config.json", form), whole, part if isinstance(part, dict) else {})
    return next((ids for of in files if (ids := of.get("eos_token_id")) is not None), None)


def _with_words(tokenizer: Tokenizer, path: epath.Path) -> Tokenizer:
    """Return a tokenizer that has words to write with."""
    if (count := tokenizer.backend.get_vocab_size(with_added_tokens=False)) < FEWEST_WORDS:
        raise ValueError(
            f"{path}: the tokenizer has a vocabulary of {count}: a file such as tokenizer.model is missing; {AGAIN}."
        )
    return tokenizer


def template(value: Any) -> bool:
    """Return whether a value is a chat template, a list of several with their names, or null."""
    return value is None or isinstance(value, str) or not misfit(value, [{"name": text, "template": text}])


def token_ids(value: Any) -> bool:
    """Return whether a value is the id of a token, a list of ids, or null."""
    return value is None or all(
        whole_number(token) and 0 <= token < 2**31 for token in (value if isinstance(value, list) else [value])
    )


def _settings(file: epath.Path, form: Mapping[str, Any] | None = None) -> dict:
    """Return what a JSON file holds; nothing if there is none."""
    return read_json(file, dict(form or {}), AGAIN) if file.exists() else {}


def _wrap(backend: tokenizers.Tokenizer, settings: dict, stop_ids: int | list[int] | None = None) -> Tokenizer:
    """Look up the ids of the special tokens that Hugging Face's settings name, and the chat template."""
    special = {}
    for role, token in settings.items():
        text = token["content"] if isinstance(token, dict) and "content" in token else token  # an AddedToken of older versions
        if role.endswith("_token") and isinstance(text, str):
            special[role] = text
    bos_id, eos_id, pad_id = (
        backend.token_to_id(special[role]) if role in special else None for role in ("bos_token", "eos_token", "pad_token")
    )
    if stop_ids is None:
        stop_ids = [] if eos_id is None else [eos_id]
    chat_template = settings.get("chat_template")
    if isinstance(chat_template, list):  # several, by name
        chat_template = {named["name"]: named["template"] for named in chat_template}
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    backend.encode_special_tokens = True  # means: as ordinary text
    backend.no_truncation()  # a tokenizer.json may store both, which are for who trained the model
    backend.no_padding()
    return Tokenizer(
        backend, bos_id, eos_id, 0 if pad_id is None else pad_id,
        stop_ids=(stop_ids,) if isinstance(stop_ids, int) else tuple(stop_ids),
        special_tokens=special,
        chat_template=chat_template,
    )  # fmt: skip


def _load_with_transformers(path: epath.Path, stop_ids: int | list[int] | None) -> Tokenizer:
    import transformers  # here, since it takes seconds and most tokenizers do without

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(os.fspath(path), trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except Exception as error:  # of whichever library reads the files
        raise ValueError(f"No tokenizer at {path}: a tokenizer.json or a known tokenizer is needed.") from error
    settings = {**loaded.special_tokens_map, "chat_template": loaded.chat_template}
    return _wrap(backend, settings, stop_ids)
