"""User-LLM: a decoder LLM that answers for a user whose events were encoded once into a handful of vectors (arXiv 2402.13598).

    import user_llm

    model = user_llm.load("runs/x/user_llm/model")
    user = model.encode(events)
    model.recommend(user, k=10)

Importing the package imports nothing else; jax comes with the first name that is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from user_llm.serving.bulk import forget
    from user_llm.serving.front import load
    from user_llm.serving.personalizer import Item, Personalizer, Seen
    from user_llm.serving.user import User

NAMES = {
    "forget": "user_llm.serving.bulk",
    "load": "user_llm.serving.front",
    "Item": "user_llm.serving.personalizer",
    "Personalizer": "user_llm.serving.personalizer",
    "Seen": "user_llm.serving.personalizer",
    "User": "user_llm.serving.user",
}
__all__ = ["Item", "Personalizer", "Seen", "User", "forget", "load"]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'user_llm' has no attribute {name!r}")
    return getattr(importlib.import_module(NAMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
