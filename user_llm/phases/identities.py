"""The identities of a run, its tokenizer and its phases: the settings and files that each depends on."""

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from etils import epath

from user_llm.common.hashes import content_hashes
from user_llm.common.workdir import path_part
from user_llm.config.inputs import data_settings, flat
from user_llm.config.phases import Contextualize
from user_llm.config.reader import Config
from user_llm.config.variants import changed
from user_llm.training.identity import Identity

WITHOUT_LABELS = {"next_item", "review"}  # tasks that do not read the section `labels`; others may
SMALL_LLM = ("llm.vocab_size", "llm.num_layers", "llm.block")
ITEM_TABLE = ("encoder.kind", "encoder.options", "encoder.features", "encoder.block.width")
OFF = (
    "loss.trie_softmax",
    "loss.teacher",
    "loss.all_words",
    "loss.in_batch",
    "residual",
    "transitions",
    "eval.guide",
    "eval.rerank",
    "eval.bert_score",
    "eval.control_users",
    "loop.keep",
)  # keys of a phase that compute nothing where they are off
OFF_AT = {"loop.keep": "best"}  # where such a key is off; the others are off where they are empty or 0
OF_TITLES = ("teacher", "all_words")  # keys of `loss` that compute nothing without `trie_softmax`


def run_identity(config: Config, data_files: Mapping[str, str]) -> Identity:
    """Return what every phase of a run depends on, and the baselines on alone: dataset, protocol and seed."""
    return Identity(data_files, {"seed": config.seed} | data_settings(config.said))


def tokenizer_identity(config: Config, data_files: Mapping[str, str]) -> Identity:
    """Return the identity of a tokenizer that is trained on the dataset.

    The lines of the run's prompts, which it is trained on too, are left out: phases that are added to a run use the tokenizer that is
    there.
    """
    return Identity(data_files, {"seed": config.seed, "llm.vocab_size": config.llm.vocab_size} | data_settings(config.said))


def phase_identity(
    config: Config, name: str, data: Mapping[str, str], llm: Mapping[str, str], built_on: Mapping[str, str]
) -> Identity:
    """Return the identity of a phase.

    Args:
      data, llm: content hashes of the dataset's files, and of the LLM's: checkpoint and tokenizer.
      built_on: identities of the phases that `sources` returns.

    Raises:
      ValueError: the phase's name or its method's is no part of a path.
    """
    phase, said = config.sections[path_part(name, "The phase")], config.said
    settings = {**run_identity(config, data).settings, **own_settings(config, name)}
    if phase.task == "pretrain_encoder":
        return Identity(data, settings | flat(_encoder(config, name), "encoder"))
    files = {**data, **llm}
    if not config.llm.checkpoint:
        small = flat(said["llm"], "llm")
        settings |= {key: value for key, value in small.items() if key.startswith(SMALL_LLM)}
    if isinstance(phase, Contextualize):
        settings |= encoder_settings(config, name)
        if config.llm.checkpoint:
            files |= text_files(config)
            settings |= text_settings(config)
        if phase.prompts.asked.keys() - WITHOUT_LABELS:
            settings |= flat(said["labels"], "labels")
    return Identity(files, settings, built_on)


def own_settings(config: Config, name: str) -> dict[str, Any]:
    """Return the settings of a phase's section and of its strategy.

    The strategy is left out by name and counts by what it trains; the section's `encoder` is left out, and `encoder_settings` has the
    settings of that encoder. What computes nothing is left out, too:

    - `pack`, where histories are not packed;
    - `muon` and `matrices` of the optimizer, where Muon moves nothing;
    - OF_TITLES, where titles are written among all words;
    - `teacher`, where no pretrained encoder reads events;
    - tasks of weight 0;
    - the keys in OFF, where they are off.

    A phase of older code, whose config lacks these keys, is therefore the same phase.

    Raises:
      ValueError: a method whose name is no part of a path.
    """
    strategy = config.sections[name].strategy
    section = {key: value for key, value in config.said[name].items() if key not in ("strategy", "encoder")}
    if "method" in section:
        path_part(section["method"].replace("/", "_"), f"{name}.method")
    if "pack" in section and not section["pack"]["histories"]:
        del section["pack"]
    if not section["optimizer"]["muon"]:
        section["optimizer"] = {key: value for key, value in section["optimizer"].items() if key not in ("muon", "matrices")}
    if "trie_softmax" in section.get("loss", ()):
        unread = OF_TITLES if not section["loss"]["trie_softmax"] else () if config.contextual(name).taught_by else ("teacher",)
        section["loss"] = {key: value for key, value in section["loss"].items() if key not in unread}
    if "prompts" in section:
        asked = section["prompts"].items()
        section["prompts"] = {task: of for task, of in asked if not isinstance(of, dict) or of.get("weight")}
    own = {key: value for key, value in flat(section, name).items() if not _is_off(key.removeprefix(f"{name}."), value)}
    settings = own | flat(config.said["strategies"][strategy], f"{name}.strategy")
    return settings | (flat(config.said["lora"], "lora") if config.strategies[strategy].adapters else {})


def _is_off(key: str, value: Any) -> bool:
    """Return whether a key of a phase is one of OFF and is off."""
    return key in OFF and (value == OFF_AT[key] if key in OFF_AT else not value)


def encoder_settings(config: Config, name: str) -> dict[str, Any]:
    """Return the encoder's settings that a contextualization depends on; a text prompt has the item table's alone."""
    phase = config.contextual(name)
    settings = flat(_encoder(config, phase.encoder), "encoder")
    if phase.examples.max_events:
        return settings
    return {key: value for key, value in settings.items() if key.startswith(ITEM_TABLE)}


def _encoder(config: Config, phase: str) -> dict[str, Any]:
    """Return the section `encoder` as a phase that pretrains an encoder changes it, as plain values, without a tower that is off."""
    section = changed(config.said["encoder"], config.said[phase]["encoder"])
    return {key: value for key, value in section.items() if value or key != "tower"}


def text_settings(config: Config) -> dict[str, Any]:
    """Return how much of the general text is read, and what by."""
    settings = flat(config.said["general_text"], "general_text")
    settings.pop("general_text.file", None)
    return settings | llm_settings(config)


def llm_settings(config: Config) -> dict[str, Any]:
    """Return how the weights of an open LLM are kept; nothing where they are kept as they come."""
    return {"llm.quantize": config.llm.quantize} if config.llm.quantize else {}


def text_files(config: Config) -> dict[str, str]:
    """Return the content hash of the general text.

    Raises:
      ValueError: no such file.
    """
    if not config.general_text.file:
        text = resources.files("user_llm.data") / "general.txt"
        return {"general_text": hashlib.sha256(text.read_bytes()).hexdigest()}
    if not epath.Path(config.general_text.file).is_file():
        raise ValueError(f"general_text.file={config.general_text.file} is no file: name one of UTF-8 text.")
    return {"general_text": content_hashes([config.general_text.file])[0]}
