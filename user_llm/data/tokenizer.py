"""Text to token ids and back: a checkpoint's own tokenizer, or a byte-level BPE trained on a dataset's text.

Both are one `tokenizers.Tokenizer` underneath. Special tokens are never added by `encode`, and a title that reads
"<eos>" is text like any other; whoever builds a prompt puts their ids where they belong. Left out: chat templates.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIALS = ("<pad>", "<bos>", "<eos>")
MIN_BPE_VOCAB = len(SPECIALS) + 256  # one token per byte, so that any text can be encoded


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids of its special tokens.

    Attributes:
      bos_id, eos_id: None where the model has no such token.
      pad_id: 0 where the model names none; padding is masked, so any id would do.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; a checkpoint's embedding table may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them special."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """Return the text of `ids`; special tokens are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


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


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Load a directory with tokenizer.json, or anything else that `transformers.AutoTokenizer` knows, hub names too."""
    path = epath.Path(directory)
    file = path / "tokenizer.json"
    if not file.exists():
        return _load_with_transformers(path)
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file} is no tokenizer: {error}.") from error
    names: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).exists():
            names |= json.loads((path / name).read_text())
    return _wrap(backend, names)


def _wrap(backend: tokenizers.Tokenizer, names: dict) -> Tokenizer:
    """Look up the ids of the special tokens that Hugging Face's settings name."""

    def token_id(role: str) -> int | None:
        token = names.get(role)
        if isinstance(token, dict):  # an AddedToken, as older versions write it
            token = token["content"]
        return None if token is None else backend.token_to_id(token)

    backend.encode_special_tokens = True  # means: as ordinary text
    pad_id = token_id("pad_token")
    return Tokenizer(backend, token_id("bos_token"), token_id("eos_token"), 0 if pad_id is None else pad_id)


def _load_with_transformers(path: epath.Path) -> Tokenizer:
    import transformers  # here, since it takes seconds and most tokenizers do without

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(os.fspath(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer at {path}: a tokenizer.json or a known tokenizer is needed.") from error
    return _wrap(
        loaded.backend_tokenizer,
        {"bos_token": loaded.bos_token, "eos_token": loaded.eos_token, "pad_token": loaded.pad_token},
    )
