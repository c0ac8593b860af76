"""The model card: the README.md of a model directory, which people and the hub read."""

from collections.abc import Mapping
from typing import Any

from user_llm.common.printable import printable
from user_llm.models.pretrained import is_hub_name


def card(settings: Mapping[str, Any]) -> str:
    """Return the text of the model card, made from the content of `user_llm.json`."""
    facts = {key: printable(value) if isinstance(value, str) else value for key, value in settings["facts"].items()}
    llm, license_of_llm = facts.get("llm"), facts.get("license")
    base = llm or "a small LLM, trained from scratch on the catalogue"
    lines = [
        "---", "library_name: user_llm", f"license: {license_of_llm or 'other'}",
        # The hub refuses a card that names a directory.
        *([f"base_model: {llm}"] if llm and is_hub_name(llm) else []), "---", "",
        f"# {facts.get('phase') or 'user_llm'} on {facts['dataset']}", "",
        f"An LLM that answers for a user whose events it has encoded ([User-LLM](https://arxiv.org/abs/2402.13598)): {base}.", "",
        "```python", "import user_llm", "", 'model = user_llm.load("THIS DIRECTORY")', "user = model.encode(events)", "model.recommend(user, k=10)", "```", "",
        f"Trained on {facts['dataset']}: {facts['users']:,} users, {facts['events']:,} events in training, {facts['items']:,} items. "
        "No parameter belongs to one user. What all users together have taught the parameters cannot be removed again.", "",
        f"Events have the columns {', '.join(map(printable, facts['columns']))}.", "",
        "| task | method | metric | value | 95% interval | n |", "|---|---|---|---|---|---|", *map(_row, facts["rows"]), "",
        f"Licence of the LLM: {license_of_llm or 'see where it comes from'}. Identity: `{settings['identity']}`. Command: `{facts['command']}`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    names = (printable(row[key]).replace("|", r"\|") for key in ("task", "method", "metric"))
    return f"| {' | '.join(names)} | {_shown(row['value'])} | {' to '.join(map(_shown, row.get('interval') or []))} | {row['n']:,} |"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
