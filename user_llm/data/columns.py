"""The one place that reads a column as what it is declared to be, whatever type a file gives it: text, numbers, names, or times.

A column is an Arrow array, or a list of JSON's values. Each reader returns what it made of the values and a mask of the rows in
which it could make nothing of them; a column whose type can never be what it is declared to be is a `WrongType`. No type is guessed
from a sample of the rows.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from user_llm.data.values import EXACT, MISSING, NO_TEXT, NUMBER, names_of, text_of

Column = Any  # pa.Array | Sequence[Any]; Arrow has no types for mypy
Bad = Bool[np.ndarray, "rows"]
WHOLE = r"^-?[0-9]{1,18}$"
MANTISSA = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): EXACT}  # whole numbers up to it are exact


class WrongType(ValueError):
    """A column's type, which can never be what the column is declared to be."""


def plain(column: pa.Array) -> pa.Array:
    """Return the values themselves, without dictionary, run lengths, views or 64-bit offsets.

    Raises:
      WrongType: run lengths of values that Arrow cannot repeat.
    """
    if pa.types.is_dictionary(column.type):
        # Arrow decodes no dictionary of views, which polars has.
        column = pa.DictionaryArray.from_arrays(column.indices, plain(column.dictionary)).dictionary_decode()
    if pa.types.is_run_end_encoded(column.type):
        try:
            column = pc.run_end_decode(column)
        except pa.ArrowNotImplementedError:
            raise WrongType(str(column.type)) from None
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.binary())  # its UTF-8 is not checked by the file's reader
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return column.cast(pa.binary())
    return column


def text(column: Column, *, exact: bool = True) -> tuple[pa.Array, Bad]:
    """Return texts, null where there are none.

    Text keeps its spelling, bytes are UTF-8, and a number without decimals is written as a whole number (7.0 as 7). Bad are bytes
    that are no UTF-8, JSON's lists, objects and lone surrogates, and floats so large that they may have lost their last digits.
    Without `exact` such floats of JSON are not bad, and are kept as they are spelled.

    Raises:
      WrongType: a nested type, or a duration.
    """
    if not isinstance(column, pa.Array):
        return _text_of_json(column, exact)
    column = plain(column)
    kind, fine = column.type, np.zeros(len(column), bool)
    if pa.types.is_binary(kind):
        return _decoded(column)
    if pa.types.is_floating(kind):
        return _text_of_floats(column)
    if pa.types.is_decimal(kind):
        return pc.replace_substring_regex(column.cast(pa.string()), r"\.0+$", ""), fine
    if pa.types.is_nested(kind) or pa.types.is_duration(kind) or isinstance(kind, pa.BaseExtensionType):
        raise WrongType(str(kind))
    try:
        return column.cast(pa.string()), fine
    except pa.ArrowException:
        raise WrongType(str(kind)) from None


def _decoded(column: pa.Array) -> tuple[pa.Array, Bad]:
    """Return UTF-8 bytes as text."""
    try:
        return column.cast(pa.string()), np.zeros(len(column), bool)
    except pa.ArrowInvalid:
        return _each(column.to_pylist(), lambda value: None if value is None else value.decode())


def _each(values: Sequence[Any], read: Callable[[Any], str | None]) -> tuple[pa.Array, Bad]:
    """Read values one by one."""
    texts, bad = [], np.zeros(len(values), bool)
    for row, value in enumerate(values):
        try:
            one = read(value)
            if one is not None:
                one.encode()  # refuses a lone surrogate
            texts.append(one)
        except ValueError:
            bad[row] = True
            texts.append(None)
    return pa.array(texts, pa.string()), bad


def _text_of_json(values: Sequence[Any], exact: bool) -> tuple[pa.Array, Bad]:
    kinds = set(map(type, values)) - {type(None)}
    try:
        if kinds <= {str}:
            return pa.array(values, pa.string()), np.zeros(len(values), bool)
        if kinds == {int}:
            return pa.array(values, pa.int64()).cast(pa.string()), np.zeros(len(values), bool)
    except (pa.ArrowException, OverflowError, ValueError):  # beyond 64 bits, or a lone surrogate
        pass
    return _each(values, functools.partial(text_of, exact=exact))


def _text_of_floats(column: pa.Array) -> tuple[pa.Array, Bad]:
    values = column.to_numpy(zero_copy_only=False).astype(np.float64)
    finite = np.isfinite(values)
    large = finite & (np.abs(values) > MANTISSA[column.type])
    integral = finite & ~large & (np.floor(values) == values)
    spelled = column.cast(pa.string())
    integers = pa.array(np.where(integral, values, 0).astype(np.int64)).cast(pa.string())
    found = pc.if_else(pa.array(integral), integers, spelled)
    return pc.if_else(pa.array(finite), found, pa.scalar(None, pa.string())), large


def missing(texts: pa.Array, words: Collection[str] = MISSING) -> Bad:
    """Say which texts stand for nothing known: null, and those of `words`."""
    blank = pc.is_in(pc.utf8_trim_whitespace(texts), value_set=pa.array(sorted(words)))
    return pc.or_kleene(blank, texts.is_null()).fill_null(True).to_numpy(zero_copy_only=False)


def number(column: Column) -> tuple[pa.Array, Bad]:
    """Return float64 numbers, null where one is missing, is no number (NaN) or has no end; true and false are 1 and 0.

    Bad are texts that are no number as programs write them: 4.5, 1e3 and .5 are, "4,5" is not.

    Raises:
      WrongType: a type that holds no numbers.
    """
    if isinstance(column, pa.Array):
        column = plain(column)
        kind = column.type
        if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return _finite(_as_float(column)), np.zeros(len(column), bool)
        if not (pa.types.is_binary(kind) or pa.types.is_null(kind)):
            raise WrongType(str(kind))
    texts, bad = text(column, exact=False)
    texts = pc.utf8_trim_whitespace(texts)
    none = missing(texts) | bad
    numeric = pc.match_substring_regex(texts, f"^({NUMBER.pattern})$").fill_null(False).to_numpy(zero_copy_only=False)
    values = pc.if_else(pa.array(numeric), texts, pa.scalar(None, pa.string()))
    if numeric.all() or (numeric | none).all():
        return _finite(values.cast(pa.float64())), bad
    flags = {"true": 1.0, "false": 0.0}
    rest = np.flatnonzero(~numeric & ~none)
    found = [flags.get(value.lower()) for value in texts.take(pa.array(rest)).to_pylist()]
    whole = values.cast(pa.float64()).to_numpy(zero_copy_only=False).copy()
    whole[rest] = [np.nan if value is None else value for value in found]
    bad = bad.copy()
    bad[rest] = [value is None for value in found]
    return _finite(pa.array(whole)), bad


def _as_float(column: pa.Array) -> pa.Array:
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return column.cast(pa.float64(), safe=False)


def _finite(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_finite(values).fill_null(False), values, pa.scalar(None, pa.float64()))


def names(column: Column) -> tuple[pa.Array, Bad]:
    """Return lists of names, empty where there are none: of lists, of single values, or of null; missing names are left out.

    Raises:
      WrongType: objects, or lists of them.
    """
    if not isinstance(column, pa.Array):
        return _names_of_json(column)
    column = plain(column)
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        column = column.cast(pa.list_(kind.value_type))
    if not pa.types.is_list(column.type):
        texts, bad = text(column)
        lengths, flat = np.ones(len(texts), np.int64), texts
    else:
        flat, bad_values = text(column.flatten())
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        bad = np.zeros(len(column), bool)
        bad[np.repeat(np.arange(len(column)), lengths)[bad_values]] = True
    filled = ~missing(flat, NO_TEXT)
    ends = np.cumsum(np.concatenate([[0], filled]))[np.concatenate([[0], np.cumsum(lengths)])]
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), flat.filter(pa.array(filled))), bad


def _names_of_json(values: Sequence[Any]) -> tuple[pa.Array, Bad]:
    lists, bad = [], np.zeros(len(values), bool)
    for row, value in enumerate(values):
        try:
            found = [value] if type(value) is str and value.strip() not in NO_TEXT else names_of(value)
            "".join(found).encode()
        except ValueError:
            bad[row], found = True, []
        lists.append(found)
    return pa.array(lists, pa.list_(pa.string())), bad
