"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; floats get four decimals."""

    def show(cell: Any) -> str:
        text = f"{cell:.4f}" if isinstance(cell, float) else str(cell)
        return text.replace("|", "\\|")

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(show, line)) + " |" for line in lines)
