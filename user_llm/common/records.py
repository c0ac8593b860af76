"""JSON files read as data that anybody may have written: what does not fit is refused in one sentence that names the file.

A form says what a value must be: a function that returns whether the value fits, whose name is what a message calls it; a
dict of the forms of an object's keys, of which keys that end in `?` may be missing; or a list of one form, which every
element has. Keys that a form does not name are allowed.
"""

import json
from typing import Any

from etils import epath

from user_llm.common.files import check_regular

MAX_BYTES = 256 * 2**20  # of a file


def text(value: Any) -> bool:
    """Return whether a value is a text."""
    return isinstance(value, str)


def number(value: Any) -> bool:
    """Return whether a value is a number that can be computed with: finite, and its square too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def number_or_null(value: Any) -> bool:
    """Return whether a value is a number or null."""
    return value is None or number(value)


def whole_number(value: Any) -> bool:
    """Return whether a value is a whole number of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def positive_whole_number(value: Any) -> bool:
    """Return whether a value is a whole number above 0 that fits 31 bits, as the size of an array does."""
    return whole_number(value) and 0 < value < 2**31


def positive_number(value: Any) -> bool:
    """Return whether a value is a number above 0, which has a logarithm."""
    return number(value) and value > 0


def number_of_at_least_1(value: Any) -> bool:
    """Return whether a value is a number that is at least 1."""
    return number(value) and value >= 1


def true_or_false(value: Any) -> bool:
    """Return whether a value is a truth value."""
    return isinstance(value, bool)


def anything(value: Any) -> bool:
    """Fit every value."""
    return True


def misfit(value: Any, form: Any) -> str:
    """Return where a value does not fit a form and why, such as `'n' is no whole number`; nothing if it fits."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return "is no object"
        for key, inner in form.items():
            name = key.removesuffix("?")
            if name not in value:
                if name == key:
                    return f"no {name!r}"
            elif wrong := misfit(value[name], inner):
                return f"{name!r} {wrong}"
        return ""
    if isinstance(form, list):
        if not isinstance(value, list):
            return "is no list"
        wrongs = ((index, misfit(element, form[0])) for index, element in enumerate(value, 1))
        return next((f"{index}: {wrong}" for index, wrong in wrongs if wrong), "")
    return "" if form(value) else f"is no {form.__name__.replace('_', ' ')}"


def parse(line: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
      ValueError: not JSON as its standard has it (a NaN is none), not UTF-8, numbers of thousands of digits, or lists in lists
        beyond what a stack can hold; a JSONDecodeError where it has a line.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(line, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_file(path: epath.PathLike) -> bytes:
    """Return the bytes of a file.

    Raises:
      ValueError: no regular file (a pipe would be waited for without end), or larger than `MAX_BYTES`.
    """
    try:
        check_regular(path)
        if (size := epath.Path(path).stat().length) > MAX_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, more than the {MAX_BYTES:,} that are read.")
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_text(path: epath.PathLike, remedy: str = "save it as UTF-8") -> str:
    """Return the text of a file.

    Raises:
      ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8; {remedy}.") from error


def read_json(path: epath.PathLike, form: Any, remedy: str = "delete the file and run the command again") -> Any:
    """Return what a JSON file holds.

    Raises:
      ValueError: it cannot be read, is not JSON, or does not fit the form.
    """
    try:
        value = parse(read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON; {remedy}.") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}; {remedy}.") from error
    if wrong := misfit(value, form):
        row, _, rest = wrong.partition(": ")
        where = f"{path}, row {row}: {rest}" if isinstance(form, list) and rest else f"{path}: {wrong}"
        raise ValueError(f"{where}; {remedy}.")
    return value
