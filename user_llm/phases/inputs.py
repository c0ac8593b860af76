"""What all phases of a run depend on, as parts of an `Identity`: the dataset, its protocol and the seed."""

from collections.abc import Mapping

from user_llm.config.inputs import data_settings
from user_llm.config.reader import Config
from user_llm.training.identity import Identity


def run_identity(config: Config, data_files: Mapping[str, str]) -> Identity:
    """Return what every phase of a run depends on, and the baselines on alone: dataset, protocol and seed."""
    return Identity(data_files, {"seed": config.seed} | data_settings(config.said))


def tokenizer_identity(config: Config, data_files: Mapping[str, str]) -> Identity:
    """Return the identity of a tokenizer that is trained on the dataset.

    The lines of the run's prompts, which it is trained on too, are left out: phases that are added to a run use the tokenizer that is
    there.
    """
    return Identity(data_files, {"seed": config.seed, "llm.vocab_size": config.llm.vocab_size} | data_settings(config.said))
