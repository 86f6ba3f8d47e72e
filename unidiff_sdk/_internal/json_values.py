"""JSON from outside: one loader with limits, and one conversion of Python and numpy values to JSON values."""

from __future__ import annotations

import enum
import json
import math
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from unidiff_sdk.errors import DataError, OptionError, UniDiffError

from .files import read_regular_file

__all__ = [
    "MAX_DEPTH",
    "MAX_DOCUMENT",
    "MAX_JSON_DEPTH",
    "checked_text",
    "damaged_content",
    "is_finite_number",
    "is_missing",
    "number_within",
    "parse_json",
    "plain_number",
    "read_json",
    "shown_integer",
    "to_json",
    "unwrapped",
    "whole_number",
]

MAX_DEPTH = 32
"""The deepest nesting of a stored value and of a filter. The engine is recursive: 1,000 levels crash it."""

MAX_JSON_DEPTH = 100
"""The deepest nesting of a JSON document. Each level of a filter takes up to three of them."""

MAX_DIGITS = 100
"""The longest integer in a JSON document. Python refuses 4,300 digits with a bare error; tokenizers write 31."""

MAX_DOCUMENT = 64 << 20
"""The largest JSON file in bytes. The largest one that models have, a tokenizer.json, takes about 35 MB."""

_PLAIN = frozenset({type(None), bool, int, float, str})


# ------------------------------------------------------------------------------------------------ loading


def read_json(
    path: Path,
    *,
    error: type[UniDiffError] = DataError,
    kind: type = dict,
    nan: bool = False,
    max_size: int = MAX_DOCUMENT,
) -> Any:
    """Read a JSON file.

    Args:
        path: a regular file, UTF-8.
        error: the class of the error that is raised.
        kind, nan: as for `parse_json`.
        max_size: the largest size in bytes.

    Raises:
        error: the file is missing, is not a regular file or too large, or `parse_json` refuses its content.
    """
    return parse_json(read_regular_file(path, max_size, error), str(path), error=error, kind=kind, nan=nan)


@contextmanager
def damaged_content(name: object, error: type[UniDiffError], fix: str) -> Iterator[None]:
    """Convert what Python raises for missing keys and other types while the content of a file is used.

    Args:
        name: the file or folder, for messages.
        error: the class of the error that is raised. A `UniDiffError` is passed on.
        fix: what to do, a sentence.
    """
    try:
        yield
    except UniDiffError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as reason:
        raise error(f"{name} is damaged ({type(reason).__name__}: {reason!s:.200}). {fix}") from reason


def parse_json(
    content: bytes | str,
    name: str,
    *,
    error: type[UniDiffError] = DataError,
    kind: type = dict,
    nan: bool = False,
    unique_keys: bool = False,
) -> Any:
    """Parse JSON within the limits of this module.

    Args:
        content: the text, or its bytes in UTF-8.
        name: what the text is, for messages.
        error: the class of the error that is raised.
        kind: the type that the value must have.
        nan: whether NaN and infinity are accepted as numbers. JSON does not have them, but Python writes them.
        unique_keys: whether an object with a repeated key is refused. Python keeps the last value only.

    Raises:
        error: the text is not valid JSON, exceeds a limit, contains a lone surrogate such as "\\ud83d", or holds a
            value of another type.
    """
    try:
        if isinstance(content, str):
            content = content.encode()  # a string can hold lone surrogates, too
        text = content.decode("utf-8-sig")
        value = json.loads(
            text,
            parse_int=_parse_int,
            parse_constant=None if nan else _refuse_constant,
            object_pairs_hook=_with_unique_keys if unique_keys else None,
        )
        _check_depth(value)
        if "\\u" in text:  # an escape can make what UTF-8 cannot hold
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as reason:
        raise error(f"{name} is not UTF-8 text ({reason}). Save it as UTF-8.") from None
    except UnicodeEncodeError as reason:
        letter = reason.object[reason.start]
        raise error(f"{name} is not valid Unicode: it has a lone surrogate {letter!r}. Remove or replace it.") from None
    except RecursionError:
        raise error(f"{name} is not valid JSON (nested more than {MAX_JSON_DEPTH} levels deep). Flatten it.") from None
    except ValueError as reason:
        raise error(f"{name} is not valid JSON ({reason})") from None
    if not isinstance(value, kind):
        wanted = "a JSON object" if kind is dict else f"a JSON {kind.__name__}"
        raise error(f"{name} is not {wanted} but {type(value).__name__} {value!r:.60}")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits):,} digits; at most {MAX_DIGITS} are allowed")
    return int(digits)


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r:.60} occurs several times")
    return members


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        members = (member for outer in level for member in (outer.values() if isinstance(outer, dict) else outer))
        level = [member for member in members if isinstance(member, (dict, list))]
        if not level:
            return
    raise RecursionError


# ------------------------------------------------------------------------------------------------ converting


def unwrapped(value: Any) -> Any:
    """A scalar or array of pyarrow, or a tensor of torch, as Python has it. Other values are returned as they are.

    Raises:
        OptionError: Python has no such value.
    """
    if type(value).__module__.partition(".")[0] not in ("pyarrow", "torch"):  # neither library is imported
        return value
    convert = getattr(value, "as_py", None) or getattr(value, "tolist", None)
    try:
        return value if convert is None else convert()
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise OptionError(f"{value!r:.60} cannot be converted to Python ({error}). Give a Python value.") from None


def plain_number(value: Any) -> Any:
    """A number of numpy or pyarrow, or an array of no dimensions with one, as a Python number; others unchanged."""
    if type(value) in _PLAIN:
        return value
    value = unwrapped(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
        return float(value) if isinstance(value, np.floating) else value  # a longdouble has no equal in Python
    return value


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """Check an argument that counts something. Integers of numpy are accepted, booleans are not.

    Raises:
        OptionError: the value is not an integer, or too small.
    """
    number = plain_number(value)
    if isinstance(number, int) and number.bit_length() > 128:  # Python refuses to print those of 4,300 digits
        raise OptionError(f"{name} is an integer of {number.bit_length():,} bits; give at most 64 bits")
    if not isinstance(number, int) or isinstance(number, bool) or number < at_least:
        raise OptionError(f"{name} is {value!r:.60}; give an integer of at least {at_least}")
    return number


def is_finite_number(value: Any) -> bool:
    """Whether a value is an integer or a float, and a finite one as a float. Booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def shown_integer(number: int) -> str:
    """An integer for a message. Python refuses to print those of more than 4,300 digits."""
    return str(number) if number.bit_length() <= 128 else f"an integer of {number.bit_length():,} bits"


def number_within(
    name: str, value: Any, low: float, high: float, error: type[UniDiffError], *, whole: bool = False
) -> float:
    """Check a number in a file from outside.

    Args:
        name: the field, for messages.
        value: what the file holds.
        low, high: the smallest and the largest number that are accepted.
        error: the class of the error that is raised.
        whole: whether it must be an integer.

    Raises:
        error: the value is not a number, or not within the limits. NaN and booleans are not.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and low <= value <= high and (not whole or value == int(value)):
        return int(value) if whole else float(value)
    kind = "an integer" if whole else "a number"
    raise error(f"{name} is {value!r:.60}; it must be {kind} from {low:g} to {high:g}")


def checked_text(text: str) -> str:
    """Return the text if it is valid Unicode, so that tokenizers, engines and files can store it.

    Raises:
        OptionError: the text contains a lone surrogate, such as the JSON string "\\ud83d".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{text!r:.60} is not valid Unicode: it has a lone surrogate {text[error.start]!r} at {error.start}. "
            "Remove or replace it."
        ) from None
    return text


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, NaT of numpy or pandas, or NA of pandas."""
    if value is None or type(value).__name__ == "NAType":
        return True
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(value))
    return isinstance(value, (float, np.floating, Decimal, datetime, timedelta)) and bool(value != value)


def to_json(value: Any, name: str, depth: int = 0) -> Any:
    """Convert a value to what JSON holds: None, bool, int, float, str, list or dict, each of exactly that type.

    | from | to |
    |---|---|
    | numpy scalars and arrays, subclasses of str, int and float | the plain value |
    | enumerations | their value |
    | `date`, `datetime`, `time`, `numpy.datetime64`, timestamps of pandas | ISO 8601, with all nanoseconds |
    | `timedelta`, `numpy.timedelta64` | seconds |
    | `Decimal` | a number, if it has no more digits than a 64-bit float |
    | `uuid.UUID` | a string |
    | NaT and pandas.NA | None |
    | scalars and arrays of pyarrow, tensors of torch | what they hold |

    Args:
        value: any value.
        name: what holds it, for messages.
        depth: how deep it is nested.

    Raises:
        OptionError: the value has no exact equal in JSON: bytes, NaN, infinity, an integer beyond 64 bits.
    """
    if depth > MAX_DEPTH:
        raise OptionError(f"{name:.60} is nested more than {MAX_DEPTH} levels deep. Flatten it.")
    value = unwrapped(value)
    if isinstance(value, enum.Enum) and not isinstance(value, (str, int, float)):
        value = value.value
    match value:
        case None | bool():
            return value
        case np.bool_():
            return bool(value)
        case str():
            return checked_text(str.__str__(value))
        case Mapping():
            return {_key(key, name): to_json(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item, name, depth + 1) for item in value]
        case np.ndarray():
            # Not tolist(): it turns dates with nanoseconds into integers.
            return [to_json(item, name, depth + 1) for item in value] if value.ndim else to_json(value[()], name, depth)
        case uuid.UUID():
            return str(value)
        case date() | time() | np.datetime64():
            return None if is_missing(value) else _iso_8601(value, name)
    number = _number(value, name)
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
        raise OptionError(f"{name} is an integer of {number.bit_length()} bits, more than 64 bits: give a string")
    if isinstance(number, float) and not math.isfinite(number):
        raise OptionError(f"{name} is {number}: give a JSON value, such as a finite number, or leave it out")
    return number


def _key(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise OptionError(f"{name} has the key {key!r:.60}: give a JSON value, whose keys are strings")
    return checked_text(str.__str__(key))


def _number(value: Any, name: str) -> int | float | None:
    match value:
        case np.timedelta64() | timedelta():
            return None if is_missing(value) else _seconds(value, name)
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return float(value)
        case Decimal():
            if not value.is_finite():
                return float(str(value).lower().removeprefix("s"))
            if value == value.to_integral_value() and value.as_tuple().exponent >= 0:  # type: ignore[operator]
                return int(value) if value.adjusted() < MAX_DIGITS else math.inf
            if Decimal(repr(float(value))) != value:
                raise OptionError(f"{name} is {value}, which has more digits than a 64-bit float. Give it as a string.")
            return float(value)
    if is_missing(value):
        return None
    raise OptionError(
        f"{name} is {value!r:.60} ({type(value).__name__}): give a JSON value, a string, a finite number, true, null, "
        "a list or an object. Dates, durations, decimals and numpy values are converted."
    )


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    unit = np.datetime_data(value.dtype)[0]
    if unit in ("Y", "M", "generic"):
        raise OptionError(f"{name} is {value!r}, which is no fixed number of seconds. Give a number with its unit.")
    return float(value / np.timedelta64(1, "s"))


def _iso_8601(value: Any, name: str) -> str:
    """A date or time as the engine parses it: a time zone requires seconds, and has no seconds itself."""
    if isinstance(value, np.datetime64):
        if not 1 <= int(value.astype("M8[Y]").astype(np.int64)) + 1970 <= 9999:
            raise OptionError(f"{name} is {value!r}, which is outside the years 1 to 9999.")
        unit = np.datetime_data(value.dtype)[0]
        if unit in ("Y", "M", "W", "D"):
            return str(value.astype("M8[D]"))
        text, _, fraction = str(value.astype("M8[s]") if unit in ("h", "m") else value).partition(".")
        fraction = fraction.rstrip("0")
        return f"{text}.{fraction}" if fraction else text
    offset = value.utcoffset() if isinstance(value, datetime) else None
    if offset is not None and offset % timedelta(minutes=1):
        value = value.astimezone(UTC)  # a local mean time such as +00:53:28
    return str(value.isoformat())
