"""The file `user_llm.json` of a model directory: its keys, their types, its checksum (the seal), and the files that it lists.

Anybody may have written the file. Therefore the type of each key is checked, and an error names the first key that does not fit.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from user_llm.common.files import check_own, sha256
from user_llm.common.records import positive_whole_number, read_json
from user_llm.common.workdir import path_part
from user_llm.config.reader import either, read_record
from user_llm.config.values import Count, CountOrZero, Must, Text, Weight
from user_llm.data.prompts.base import Lines, Question, Template
from user_llm.data.prompts.next_item import NextItem
from user_llm.models.decoder import DecoderConfig
from user_llm.models.encoder import EncoderConfig
from user_llm.models.export import tokenizer_files
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLMConfig
from user_llm.nn.rotary import RopeScaling
from user_llm.nn.transformer import BlockConfig

FORMAT = 1
FILE = "user_llm.json"
AGAIN = "get the model directory again"
# The keys that the identity of a model is made of. Two models that are equal in these answer alike, and can share users.
COMPUTES = ("encoder", "model", "vocabulary", "lines", "prompts", "names", "dtype", "transitions")
LIMITS_THAT_COMPUTE = ("max_events", "beams", "after_instruction", "ranks", "trie_softmax")
# The sizes that model directories of before do not have, by the class that has them. At their defaults they compute nothing.
LATER: Mapping[type, tuple[str, ...]] = {
    UserLLMConfig: ("residual",),
    UserEncoderConfig: ("tower", "trained_items"),
    DecoderConfig: ("logit_divisor", "logit_softcap", "unrotated"),
    BlockConfig: (
        "quantize", "rotary_share", "pre_norms", "residual_scale", "qk_norm_over_heads", "attn_softcap", "experts",
    ),
    RopeScaling: ("slow_turns", "fast_turns", "whole_numbers", "factors", "magnitude", "query_growth"),
}  # fmt: skip

MOST = 1 << 20  # the most events, tokens and rows that arrays may be padded to: more would fill any memory
Size = Annotated[int, Must(f"from 1 to {MOST}", lambda n: 1 <= n <= MOST)]
SizeOrZero = Annotated[int, Must(f"from 0 to {MOST}", lambda n: 0 <= n <= MOST)]
Axis = Literal["data", "fsdp", "tensor"]


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint of an LLM, which is stored outside the model directory.

    Attributes:
      checkpoint: the checkpoint's name on the hub, or its directory.
      files: the content hashes of the LLM's weights, settings and tokenizer, by file name.
    """

    checkpoint: Text
    files: dict[str, str]


@dataclasses.dataclass(frozen=True)
class LineSettings:
    """The arguments of `Lines`."""

    max_title_tokens: Size
    history: Literal["titles", "summary"]
    text_items: SizeOrZero


@dataclasses.dataclass(frozen=True)
class NextItemSettings:
    """The arguments of `NextItem`."""

    kind: str
    instruction: str
    max_tokens: Size


@dataclasses.dataclass(frozen=True)
class QuestionSettings:
    """The arguments of `Question`."""

    kind: str
    instruction: str
    question: str
    max_tokens: Size
    max_target_tokens: Size


@dataclasses.dataclass(frozen=True)
class Limits:
    """The sizes of a `Predictor`."""

    max_events: SizeOrZero
    batch_size: Size
    beams: Size
    after_instruction: bool
    ranks: bool
    pad_whole: bool
    trie_softmax: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A result on the model card; `value` is None where it is not a finite number."""

    task: str
    method: str
    metric: str
    value: float | None
    n: CountOrZero
    interval: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model card says about the training."""

    dataset: str
    users: CountOrZero
    events: CountOrZero
    items: CountOrZero
    columns: tuple[str, ...]
    command: str
    rows: tuple[Row, ...]
    phase: str = ""
    llm: str | None = None
    license: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `user_llm.json`.

    Attributes:
      identity: hash of everything that changes an answer; see `identity`.
      seal: hash of all other keys, by which an altered file is found.
      encoder: the kind of the user encoder, `EncoderConfig.kind`; that of ours for a model without one.
      vocabulary: the vocabulary, as `Vocabulary.from_json` reads it.
      prompts: how each task is asked: the `kind` of its template, and the arguments of that template.
      names: the possible answers of each task that chooses among names: {task: {number: name}}.
      sharding: the mesh axes of each parameter's dimensions, by the parameter's path.
      files: the SHA-256 of each file of the directory that is read.
      llm: the LLM that the directory names; None if the directory holds its LLM.
      added: the number of items that were added after the training. They are the last ones of the catalogue.
      transitions: the weight of the transitions beside the item head's scores; 0 for a model without them.
    """

    format: Count
    identity: Text
    seal: str
    model: UserLLMConfig
    vocabulary: Any
    lines: LineSettings
    prompts: dict[str, Any]
    names: dict[str, dict[str, str]]
    limits: Limits
    dtype: Literal["float32", "bfloat16", "float16"]
    sharding: dict[str, tuple[Axis | None, ...]]
    files: dict[str, str]
    llm: Base | None
    facts: Facts
    encoder: Text = UserEncoderConfig.kind
    added: CountOrZero = 0
    transitions: Weight = 0.0


KINDS: dict[str, tuple[Any, Any]] = {"next_item": (NextItem, NextItemSettings), "question": (Question, QuestionSettings)}


def kind_of(template: Template) -> str:
    """Return the name of a template's kind, a key of KINDS.

    Raises:
      ValueError: a template of another class, which a model directory cannot hold.
    """
    for kind, (of, _) in KINDS.items():
        if type(template) is of:
            return kind
    classes = either([of.__name__ for of, _ in KINDS.values()])
    raise ValueError(f"no model directory can hold a template of class {type(template).__name__}: make it a {classes}.")


def template(lines: Lines, task: str, settings: Any) -> Template:
    """Return the template of a task.

    Args:
      settings: an entry of `Settings.prompts`.

    Raises:
      ValueError: the kind is unknown, or an argument is missing, of another type or not one of this kind.
    """
    kind = settings.get("kind") if isinstance(settings, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"prompts.{task} is of an unknown kind: choose {either(list(KINDS))}.")
    make, arguments = KINDS[kind]
    read = dataclasses.asdict(read_record(arguments, settings, f"prompts.{task}"))
    return make(lines, **{name: value for name, value in read.items() if name != "kind"})


def numbered(task: str, names: Mapping[str, str]) -> dict[int, str]:
    """Return the names of a task's answers with their numbers as int; JSON holds the numbers as text.

    Raises:
      ValueError: there are no names, or a number is not a whole number from 1.
    """
    for number in names or [""]:
        if not (number.isascii() and number.isdecimal() and positive_whole_number(len(number) < 10 and int(number))):
            raise ValueError(f"names.{task} has the number {number[:20]!r}: it must be a whole number from 1.")
    return {int(number): name for number, name in names.items()}


def digest(value: Any) -> str:
    """Return a hash of a JSON value: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity(settings: Mapping[str, Any]) -> str:
    """Return the hash of everything that changes an answer. Where the LLM is stored and what the model card says do not count."""
    limits = {name: settings["limits"][name] for name in LIMITS_THAT_COMPUTE if name in settings["limits"]}
    llm = settings["llm"] and settings["llm"]["files"]
    # The adapters' settings repeat those of the model, and also say where the LLM is stored, which must not count.
    files = {name: checksum for name, checksum in settings["files"].items() if name != "adapter_config.json"}
    return digest(
        {name: settings[name] for name in COMPUTES if name in settings} | {"files": files, "limits": limits, "llm": llm}
    )


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: tuples become lists; infinities and NaN become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sizes(config: UserLLMConfig) -> dict[str, Any]:
    """Return a model's config as JSON holds it. What is LATER, and computes nothing here, is left out, as code of before wrote it."""

    def said(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [said(inner) for inner in value]
        if isinstance(value, Mapping):
            return {key: said(inner) for key, inner in value.items()}
        if not dataclasses.is_dataclass(value):
            return value
        later = LATER.get(type(value), ())
        kept = [f for f in dataclasses.fields(value) if f.name not in later or getattr(value, f.name) != f.default]
        return {f.name: said(getattr(value, f.name)) for f in kept}

    return plain(said(config))


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write `user_llm.json` with its seal."""
    (directory / FILE).write_text(json.dumps(dict(settings) | {"seal": digest(settings)}, indent=1))


def read_settings(directory: Path, encoders: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Settings]:
    """Read `user_llm.json`, and check that it and the files that it lists are unaltered.

    Args:
      encoders: encoders besides ours, by their kinds.

    Returns:
      The content of the file as a dict, and the same content as `Settings`.

    Raises:
      ValueError: a file is missing or altered, the format is unknown, a key does not fit its type, or the directory holds a
        further file that loading would read.
    """
    file = directory / FILE
    if not file.exists():
        raise ValueError(f"{directory} holds no {FILE}: name the directory of a model, such as RUN/user_llm/model.")
    check_own(file, directory)
    written = read_json(file, {"format": positive_whole_number}, AGAIN)
    if written["format"] != FORMAT:
        raise ValueError(f"{file} is of format {written['format']}, and this version reads {FORMAT}: update user_llm.")
    if written.get("seal") != digest({key: value for key, value in written.items() if key != "seal"}):
        raise ValueError(f"{file} is not as it was written: {AGAIN}.")
    kinds = {UserEncoderConfig.kind: UserEncoderConfig, **(encoders or {})}
    kind = written.get("encoder", UserEncoderConfig.kind)
    if isinstance(kind, str) and kind not in kinds:
        raise ValueError(
            f"{file}: the model has an encoder of kind {kind[:50]!r}, which this package has not: load it in Python, by "
            f"user_llm.load(DIRECTORY, encoders={{{kind[:50]!r}: ...}})."
        )
    with reading(file):
        settings = read_record(Settings, written, "", {EncoderConfig: kinds.get(kind) if isinstance(kind, str) else None})
    _check_files(directory, settings.files)
    return written, settings


def _check_files(directory: Path, files: Mapping[str, str]) -> None:
    """Check that the listed files are unaltered, and that the directory holds no other file that loading would read."""
    for name, wanted in files.items():
        file = directory / path_part(name, f"{directory / FILE}: the file")
        if not file.exists():
            raise ValueError(f"{file} is missing: {AGAIN}.")
        check_own(file, directory)
        if sha256(file) != wanted:
            raise ValueError(f"{file} is not as it was written: {AGAIN}.")
    there = [*tokenizer_files(directory), *directory.glob("*config.json"), *directory.glob("*.safetensors*")]
    if others := sorted({file.name for file in there} - set(files)):
        raise ValueError(f"{directory / others[0]} is no file of this model, and would be read as one: delete it.")


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Add the file's name, and a remedy, to the message of a ValueError that the block raises.

    Raises:
      ValueError: the block's error with the longer message.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error} {AGAIN[0].upper()}{AGAIN[1:]}.") from error
