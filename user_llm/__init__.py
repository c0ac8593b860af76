"""User-LLM (arXiv 2402.13598): an LLM that answers for a user. An encoder turns the user's events into a few vectors, once.

    import user_llm

    model = user_llm.load("runs/x/user_llm/model")
    user = model.encode(events)
    model.recommend(user, k=10)

`import user_llm` alone imports no jax. The first use of a name, such as `user_llm.load`, imports the module that defines it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from user_llm.experiment import run
    from user_llm.serving.bulk import forget
    from user_llm.serving.explaining import Seen
    from user_llm.serving.front import load
    from user_llm.serving.personalizer import Personalizer
    from user_llm.serving.ranking import Item
    from user_llm.serving.user import User

NAMES = {
    "forget": "user_llm.serving.bulk",
    "load": "user_llm.serving.front",
    "run": "user_llm.experiment",
    "Item": "user_llm.serving.ranking",
    "Personalizer": "user_llm.serving.personalizer",
    "Seen": "user_llm.serving.explaining",
    "User": "user_llm.serving.user",
}
__all__ = ["Item", "Personalizer", "Seen", "User", "forget", "load", "run"]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'user_llm' has no attribute {name!r}")
    return getattr(importlib.import_module(NAMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
