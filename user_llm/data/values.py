"""What a single value of JSON means: ids and names as text, numbers checked, what stands for nothing known as such."""

import ast
import json
import math
import re
from typing import Any

# A text that stands for none, as programs write it. Spaces around it do not count.
NO_TEXT = frozenset(["", r"\N", "NULL", "null", "nan", "NaN", "<NA>", "#N/A", "(not set)"])
INFINITE = {sign + word for sign in ("", "+", "-") for word in ("inf", "Inf", "INF", "Infinity")}
# The same of a user, an item, a time or a number, where further words stand for none that may well be a title or a category. NA is not
# among them: it is a name as well, such as that of a country.
MISSING = NO_TEXT | {"Null", "None", "NAN", "-nan", "N/A", "n/a", "NaT", "undefined"} | INFINITE
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
EXACT = 2**53  # whole numbers up to it are exact as float64
LONGEST_LITERAL = 1 << 20  # bytes of a line that is read as a Python literal, which takes 100 times as much memory


class Spelled(str):
    """A number of JSON that is no whole number, as it is spelled."""


DECODER = json.JSONDecoder(parse_float=Spelled, parse_constant=lambda name: None)  # NaN and Infinity stand for nothing


def json_object(line: bytes) -> dict[str, Any]:
    """Return the object of a line of JSON, or of a Python literal, as Amazon's files of 2014 are written.

    Raises:
      ValueError: another content, an encoding that is not UTF-8, or nesting that is too deep.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}: {shown(line[error.start :])}") from None
    try:
        row = DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        row = _literal(text)
    if not isinstance(row, dict):
        raise ValueError(f"{shown(text)} is no JSON object; write one object a line")
    return row


def _literal(text: str) -> Any:
    if not text.startswith("{") or len(text) > LONGEST_LITERAL:
        return None
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def shown(value: Any) -> str:
    """Return the start of a value for a message, on one line."""
    text = repr(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def text_of(value: Any, *, exact: bool = False) -> str | None:
    """Return a single value as text, None for nothing.

    Text is kept as it is. A number without decimals is written as a whole number, be it 7, 7.0 or 7e0, and others as spelled.

    Args:
      exact: refuse a float so large that it may have lost its last digits.

    Raises:
      ValueError: a list, an object, or such a float.
    """
    if type(value) is str or value is None:
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Spelled):
        number = float(value)
        if not math.isfinite(number):
            return None if isinstance(value, float) else str(value)
        if exact and abs(number) > EXACT:
            raise ValueError(f"{shown(value)} is a float so large that it may have lost its last digits")
        return str(int(number)) if number.is_integer() and abs(number) <= EXACT else str(value)
    raise ValueError(f"{shown(value)} is {'a list' if isinstance(value, list | tuple) else 'an object'}, not text")


def names_of(value: Any) -> list[str]:
    """Return the names that a list, a single value or nothing stands for; those that stand for none are left out.

    Raises:
      ValueError: an object, or lists within a list.
    """
    values = value if isinstance(value, list | tuple) else [value]
    return [text for text in map(text_of, values) if text is not None and text.strip() not in NO_TEXT]


def is_missing(text: str | None) -> bool:
    """Say whether a text stands for nothing."""
    return text is None or text.strip() in MISSING


def identifier(value: Any, name: str) -> str:
    """Return an id as text.

    Raises:
      ValueError: there is none, or in its place a list, an object or a float so large that it may have lost its last digits.
    """
    text = text_of(value, exact=True)
    if text is None or is_missing(text):
        raise ValueError(f"no {name}" + (f", as {shown(text)} stands for none" if text else ""))
    return text


def whole(value: Any, name: str, lowest: int, highest: int) -> int:
    """Return a number that must be whole and within bounds.

    Raises:
      ValueError: it is not.
    """
    number: int | float = math.nan
    if type(value) in (int, float):  # and not bool
        number = value
    elif type(value) is Spelled:
        number = float(value)
    elif isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        number = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    if not (lowest <= number <= highest and number == int(number)):
        raise ValueError(f"{name} {shown(value)} is no whole number from {lowest} to {highest}")
    return int(number)
