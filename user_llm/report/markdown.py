"""The one place that turns what a run left into Markdown.

Everything in a run's folder is data: a name or a title is shown as it reads and never obeyed. So `Markdown` is a type of its
own. Text of our own becomes Markdown by `say`, which escapes every value that it puts in; whatever is not `Markdown` is
escaped by `table`, too. A report is a list of `Markdown`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from user_llm.common.printable import printable

# What Markdown, with GitHub's additions, or HTML would take for its own.
_SPECIAL = re.compile(r"[\\`*\[\]<>#&|~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|:(?=//)|(?<=www)\.|@(?![0-9])", re.IGNORECASE)
_AT_START = re.compile(r"^([-+=](?=[-+=\s]|$)|[0-9]{1,9}(?=[.)](?:\s|$)))")
_COMMAND_LIMIT = 10_000  # characters


class Markdown(str):
    """Markdown of our own, which is not escaped again."""


def text(value: Any) -> Markdown:
    """Return any value as Markdown that shows it: floats with four decimals, other text on one line, escaped and cut."""
    if isinstance(value, Markdown):
        return value
    if isinstance(value, float):
        return Markdown(f"{value:.4f}" if abs(value) < 1e9 else f"{value:.4g}")
    escaped = _SPECIAL.sub(r"\\\g<0>", printable(value))
    return Markdown(_AT_START.sub(lambda match: _escape_start(match[0]), escaped))


def _escape_start(start: str) -> str:
    return "\\" + start if not start.isdigit() else f"&#{ord(start[0])};{start[1:]}"


def say(template: str, *values: Any) -> Markdown:
    """Return a template of ours with values in its `{}`, each escaped."""
    return Markdown(template.format(*map(text, values)))


def listed(values: Iterable[Any]) -> Markdown:
    """Return values one after the other, with commas, each escaped."""
    return Markdown(", ".join(map(text, values)))


def code(value: Any) -> Markdown:
    """Return a value as code within a line; no backtick of its own ends it."""
    inner = printable(value).replace("|", "\u2502")  # A table would end its cell there, and code has no escapes.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", inner)), default=0))
    padding = " " if len(fence) > 1 or not inner else ""
    return Markdown(f"{fence}{padding}{inner or '-'}{padding}{fence}")


def command(value: str) -> Markdown:
    """Return a command as a block of code; no backticks of its own end it."""
    inner = printable(value, _COMMAND_LIMIT)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", inner)), default=0))
    return Markdown(f"{fence}\n{inner}\n{fence}")


def picture(name: str, shows: str) -> Markdown:
    """Return the image of a plot that the report drew, by its file's name; `shows` stands in for it where it cannot be seen."""
    return Markdown(f"![{text(shows)}]({name})")


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Markdown:
    """Return a table; every cell is escaped."""
    lines = [header, [Markdown("---")] * len(header), *rows]
    return Markdown("\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines))
