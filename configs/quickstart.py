"""The whole method in minutes on a laptop, from nothing: a synthetic world of film watchers.

    python -m user_llm.main --config=configs/quickstart.py --workdir=runs/quickstart

Pretrains the encoder and a small LLM, contextualizes the LLM by gated cross-attention, trains both text-prompt baselines on the
same LLM, ranks the full catalogue with each, and writes runs/quickstart/report.md. Titles are also written, each token chosen among those that
some title goes on with: by the LLM alone, with its item head as a guide, and for the item head to rank.
"""

from ml_collections import ConfigDict

from user_llm.config import experiments


def get_config() -> ConfigDict:
    """Return the config."""
    config = experiments.experiment("movielens", "xattn", "synthetic")
    config.user_llm.prompts.next_item.instruction = "The next film this user watches:"
    return config
