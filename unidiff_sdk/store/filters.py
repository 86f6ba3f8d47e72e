"""The filter language: one dictionary that selects items by their payload, the same for every store.

    {"price": {"gte": 10, "lt": 80}, "brand": ["Acme", "Nord"], "not": {"pattern": "striped"}}

A key is a column or one of the connectives `and`, `or` and `not`. The value of a column is a dictionary of operators.
An item matches if every key matches and, for a column, every operator.

| operator | value | matches if the column |
|---|---|---|
| `eq` | string, number, boolean, date or null | equals the value |
| `ne` | the same | does not equal the value, or is missing |
| `in` | list of strings, numbers, booleans or dates | equals one of the values |
| `gt`, `gte`, `lt`, `lte` | number or date | is greater or less than the value (`gte`, `lte`: or equal) |
| `contains` | string | contains every word of the value, in any order |
| `near` | `{"lat": …, "lon": …, "radius": …}` | lies within `radius` meters of the point |
| `box` | `{"west": …, "east": …, "south": …, "north": …}` | lies between these bounds, in degrees |
| `exists` | boolean | holds a value other than null and `[]` (`false`: holds none) |
| `null` | boolean | is null (`false`: is not null, or is missing) |

| connective | value | matches if |
|---|---|---|
| `and` | list of filters | all of them match |
| `or` | list of filters | at least one matches |
| `not` | filter | it does not match |

Short forms: `{"brand": "Acme"}` means `eq`, `{"brand": ["Acme", "Nord"]}` means `in`, `{"brand": None}` means `null`.

Values:

- A column that holds a list matches if one of its elements does.
- Numbers compare as 64-bit floats: 3 equals 3.0. Types are not converted: true is not 1 and "3" is not 3.
- Dates use ISO 8601, as a string or as a Python `date` or `datetime`. A date without a time is midnight. A value
  without a time zone is UTC. Stored values with a time zone must include seconds.
- `eq`, `ne` and `in` compare a string character by character. They compare a Python `date` or `datetime` as a
  point in time.
- `contains` compares whole words of letters and digits and ignores case.
- `near` and `box` read columns that hold `{"lat": …, "lon": …}` or a list of such objects. A box with west > east
  spans the antimeridian. A point exactly on the border may match or not.

Columns:

- A dot reaches into a nested object: `{"size.cm": {"lt": 40}}`.
- Brackets reach into a list: `tags[0]` is its first element, and `parts[].name` are the names of all elements.
- Quote a name that contains a dot or a bracket itself, or that is a connective: `{'"size.cm"': 40}`, `{'"or"': 1}`.

Limits: 32 levels, 1,024 comparisons, 65,536 strings in one `in` and 10,000 characters in one `contains`.

`parse` validates a filter and returns a tree of `Compare`, `AllOf`, `AnyOf` and `Not`. `translate` converts the tree
into a filter of Qdrant Edge or of qdrant-client.
"""

from __future__ import annotations

import contextlib
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from unidiff_sdk._internal.json_values import MAX_DEPTH, checked_text, to_json, unwrapped
from unidiff_sdk.errors import FilterError, OptionError

__all__ = [
    "GEOHASH_EDGE",
    "MAX_DEPTH",
    "OPERATORS",
    "AllOf",
    "AnyOf",
    "Box",
    "Circle",
    "Clause",
    "Compare",
    "Not",
    "column_path",
    "comparisons",
    "index_kinds",
    "is_column_name",
    "parse",
    "path_steps",
    "quoted_name",
    "range_bounds",
    "referenced_columns",
    "translate",
    "values_at",
]

CONNECTIVES = ("and", "or", "not")
RANGE_OPERATORS = ("gt", "gte", "lt", "lte")
OPERATORS = ("eq", "ne", "in", *RANGE_OPERATORS, "contains", "near", "box", "exists", "null")

MAX_COMPARISONS = 1024
MAX_CHOICES = 65_536  # strings in one "in"; the engine looks them up in its index in one step
MAX_SEARCH_TEXT = 10_000  # characters in one "contains"

# The engine's geo index finds nothing in a box that ends exactly at 180° or 90°, because the geohash wraps there.
GEOHASH_EDGE = 1e-9  # degrees


# ------------------------------------------------------------------------------------------------ the tree


@dataclass(frozen=True)
class Circle:
    """All points within `radius` meters of (lat, lon), in degrees."""

    lat: float
    lon: float
    radius: float


@dataclass(frozen=True)
class Box:
    """All points between two meridians and two parallels, in degrees, with west <= east."""

    west: float
    east: float
    south: float
    north: float


# A datetime is in UTC. A tuple of strings is the value of "in".
Value: TypeAlias = str | bool | int | float | datetime | tuple[str, ...] | Circle | Box


@dataclass(frozen=True)
class Compare:
    """One comparison.

    Attributes:
        key: the column as a Qdrant JSON path.
        op: any operator except "ne", which is a `Not`. "in" compares strings only.
        value: what the column is compared with.
    """

    key: str
    op: str
    value: Value


@dataclass(frozen=True)
class AllOf:
    """Matches if all parts match."""

    parts: tuple[Clause, ...]


@dataclass(frozen=True)
class AnyOf:
    """Matches if at least one part matches."""

    parts: tuple[Clause, ...]


@dataclass(frozen=True)
class Not:
    """Matches if the part does not match."""

    part: Clause


Clause: TypeAlias = Compare | AllOf | AnyOf | Not


# ------------------------------------------------------------------------------------------------ dictionary -> tree


def parse(where: Mapping[str, Any] | None) -> Clause | None:
    """Validate a filter and return its tree.

    Args:
        where: a filter in the language of this module. None and {} select everything.

    Returns:
        The tree, or None if everything is selected.

    Raises:
        FilterError: the filter is malformed or exceeds a limit.
    """
    if where is None:
        return None
    clause = _parse_filter(where, depth=1)
    size = sum(1 for _ in comparisons(clause))
    if size > MAX_COMPARISONS:
        raise FilterError(
            f"The filter has {size:,} clauses; at most {MAX_COMPARISONS:,} are allowed. Split it into several queries."
        )
    return clause if clause != AllOf(()) else None


def _parse_filter(where: Any, depth: int) -> Clause:
    if not isinstance(where, Mapping):
        raise FilterError(f'A filter is a dictionary such as {{"price": {{"lt": 80}}}}, not {_short_repr(where)}.')
    if depth > MAX_DEPTH:
        raise FilterError(f"The filter is nested more than {MAX_DEPTH} deep. Flatten it.")
    if depth > 1 and not where:
        raise FilterError('An empty filter inside "and", "or" or "not" is ambiguous. Remove it.')
    parts: list[Clause] = []
    for key, condition in where.items():
        if not isinstance(key, str) or not key:
            raise FilterError(f"The keys of a filter are names of columns, not {_short_repr(key)}.")
        if key == "not":
            parts.append(Not(_parse_filter(condition, depth + 1)))
        elif key in CONNECTIVES:
            parts.append(_parse_connective(key, condition, depth))
        else:
            parts.extend(_parse_column(key, condition))
    return parts[0] if len(parts) == 1 else AllOf(tuple(parts))


def _parse_connective(key: str, members: Any, depth: int) -> Clause:
    if not isinstance(members, (list, tuple)) or not members:
        raise FilterError(
            f'"{key}" needs a list of filters such as {{"{key}": [{{…}}, {{…}}]}}, not {_short_repr(members)}.'
        )
    parts = tuple(_parse_filter(member, depth + 1) for member in members)
    return AllOf(parts) if key == "and" else AnyOf(parts)


_LISTS = (list, tuple, set, frozenset)


def _parse_column(key: str, condition: Any) -> list[Clause]:
    path = column_path(key)
    condition = _listed(condition)
    if not isinstance(condition, Mapping):
        operator = "in" if isinstance(condition, _LISTS) else "eq"
        condition = {operator: condition}
    if not condition:
        raise FilterError(f'The condition on "{key}" is empty. Valid operators: {", ".join(OPERATORS)}.')
    return [_parse_comparison(path, key, operator, value) for operator, value in condition.items()]


def _listed(values: Any) -> Any:
    """An array of numpy, pyarrow or torch as a list; other values as they are."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return list(values)
    plain = unwrapped(values) if hasattr(values, "tolist") else values
    return plain if isinstance(plain, list) else values


def _parse_comparison(path: str, key: str, operator: Any, value: Any) -> Clause:
    """Validate one operator of a column. `key` is the column as the caller wrote it, for messages."""
    match operator:
        case "eq" | "ne":
            test = Compare(path, "null", True) if value is None else Compare(path, "eq", _scalar(key, value))
            return test if operator == "eq" else Not(test)
        case "in":
            return _parse_in(path, key, value)
        case "gt" | "gte" | "lt" | "lte":
            return Compare(path, operator, _bound(key, operator, value))
        case "contains":
            return Compare(path, operator, _search_text(key, value))
        case "near":
            return Compare(path, operator, _circle(key, value))
        case "box":
            boxes = tuple(Compare(path, operator, box) for box in _boxes(key, value))
            return boxes[0] if len(boxes) == 1 else AnyOf(boxes)
        case "exists" | "null":
            if not isinstance(value, bool):
                raise FilterError(f'"{operator}" on "{key}" needs true or false, not {_short_repr(value)}.')
            test = Compare(path, operator, True)
            return test if value else Not(test)
    raise FilterError(
        f'Unknown operator {_short_repr(operator)} on "{key}". Valid operators: {", ".join(OPERATORS)}. '
        f"Filters are joined by {', '.join(CONNECTIVES)}."
    )


def _parse_in(path: str, key: str, values: Any) -> Clause:
    """One lookup for all strings, and one comparison for every other value."""
    values = _listed(values)
    if not isinstance(values, _LISTS) or not values:
        raise FilterError(f'"in" on "{key}" needs a list of at least one value, not {_short_repr(values)}.')
    if isinstance(values, (set, frozenset)):
        values = sorted(values, key=repr)  # the same order in every process: cursors hash the filter
    scalars = [_scalar(key, value) for value in values]
    strings = tuple(value for value in scalars if isinstance(value, str))
    if len(strings) > MAX_CHOICES:
        raise FilterError(
            f'"in" on "{key}" lists {len(strings):,} strings; at most {MAX_CHOICES:,} are allowed. Split the list.'
        )
    tests = [Compare(path, "eq", value) for value in scalars if not isinstance(value, str)]
    if strings:
        tests.insert(0, Compare(path, "in", strings) if len(strings) > 1 else Compare(path, "eq", strings[0]))
    return tests[0] if len(tests) == 1 else AnyOf(tuple(tests))


def _plain(value: Any) -> Any:
    """A value of numpy or pyarrow, a `Decimal`, an enumeration or a duration as it is stored; others as they are."""
    if type(value) in (str, bool, int, float) or isinstance(value, (Mapping, *_LISTS)):
        return value
    with contextlib.suppress(OptionError):
        value = unwrapped(value)
    if isinstance(value, date) and value == value:  # NaT of pandas differs from itself
        return value
    try:
        plain = to_json(value, "value")
    except OptionError:
        return value
    return datetime.fromisoformat(plain) if isinstance(value, np.datetime64) and plain else plain


def _scalar(key: str, value: Any) -> str | bool | int | float | datetime:
    value = _plain(value)
    if isinstance(value, str):
        return _valid_text(value)
    if _is_number(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, date):
        return _to_utc(value)
    raise FilterError(
        f'"{key}" is compared with {_short_repr(value)}. A value is a string, a finite number, true, false or a date. '
        f"Filters are joined by {', '.join(CONNECTIVES)}."
    )


def _bound(key: str, operator: str, value: Any) -> int | float | datetime:
    value = _plain(value)
    if _is_number(value) and not isinstance(value, bool):
        return value  # type: ignore[no-any-return]
    if isinstance(value, date):
        return _to_utc(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return _to_utc(datetime.fromisoformat(value))
    raise FilterError(
        f'"{operator}" on "{key}" needs a finite number or a date such as "2026-03-01" or "2026-03-01T12:30:00+01:00", '
        f"not {_short_repr(value)}."
    )


def _to_utc(value: date) -> datetime:
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise FilterError(f"{_short_repr(value)} in UTC is outside the years 1 to 9999.") from None


def _search_text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not any(letter.isalnum() for letter in value):
        raise FilterError(f'"contains" on "{key}" needs a string with at least one word, not {_short_repr(value)}.')
    if len(value) > MAX_SEARCH_TEXT:
        raise FilterError(
            f'"contains" on "{key}" has {len(value):,} characters; at most {MAX_SEARCH_TEXT:,} are allowed. Shorten it.'
        )
    return _valid_text(value)


def _circle(key: str, value: Any) -> Circle:
    lat, lon, radius = _named_numbers(key, "near", value, ("lat", "lon", "radius"))
    if not (-90 <= lat <= 90 and -180 <= lon <= 180 and radius > 0):
        raise FilterError(
            f'"near" on "{key}" is {_short_repr(value)}. lat must be from -90 to 90, lon from -180 to 180 and radius '
            "above 0, in meters."
        )
    return Circle(lat, lon, radius)


def _boxes(key: str, value: Any) -> list[Box]:
    """One box, or two if the box spans the antimeridian."""
    west, east, south, north = _named_numbers(key, "box", value, ("west", "east", "south", "north"))
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise FilterError(
            f'"box" on "{key}" is {_short_repr(value)}. west and east must be from -180 to 180, south and north from '
            "-90 to 90 with south below north."
        )
    limit, north = 180 - GEOHASH_EDGE, min(north, 90 - GEOHASH_EDGE)
    if west <= east:
        return [Box(west, min(east, limit), south, north)]
    return [Box(west, limit, south, north), Box(-180.0, east, south, north)]


def _named_numbers(key: str, operator: str, value: Any, names: tuple[str, ...]) -> list[float]:
    if isinstance(value, Mapping) and value.keys() == set(names):
        numbers = [value[name] for name in names]
        if all(_is_number(number) and not isinstance(number, bool) for number in numbers):
            return [float(number) for number in numbers]
    example = ", ".join(f'"{name}": …' for name in names)
    raise FilterError(f'"{operator}" on "{key}" needs the numbers {{{example}}}, not {_short_repr(value)}.')


def _valid_text(value: str) -> str:
    try:
        return checked_text(value)
    except OptionError as error:
        raise FilterError(str(error)) from None


def _is_number(value: Any) -> bool:
    """Whether a payload can hold the number: finite, and within 64 bits if it is an integer (booleans included)."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, float) and math.isfinite(value)


class _Repr(reprlib.Repr):
    """Bounded output, however long or deep the value. Python refuses to print integers of more than 4,300 digits."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"an integer of {x.bit_length():,} bits"


_repr = _Repr()
_repr.maxstring = _repr.maxother = 60
_short_repr = _repr.repr


# ------------------------------------------------------------------------------------------------ columns

_ELEMENT = re.compile(r"\[([0-9]*)\]")
# Only such a segment may end with the positions of elements. Any other one is a name, with its brackets.
_NAME_AND_ELEMENTS = re.compile(r'("[^"\\]+"|[A-Za-z0-9_-]+)((?:\[[0-9]*\])*)')
# The engine accepts neither a double quote nor a backslash in a name, however it is quoted.
_SEGMENT = re.compile(r'"[^"\\]+"(?:\[[0-9]*\])*|[^."\\]+')
_POSITION_DIGITS = 9


def column_path(key: str) -> str:
    """The Qdrant JSON path of a column. Segments that Qdrant does not accept bare are quoted.

    Raises:
        FilterError: `key` is not a column name.
    """
    if not isinstance(key, str) or not key:
        raise FilterError(f"{_short_repr(key)} is not a column. Give the name of one as a string.")
    segments = _SEGMENT.findall(_valid_text(key))
    if ".".join(segments) != key:
        raise FilterError(
            f"{_short_repr(key)} is not a column. A dot separates two names, quotes must be balanced, and a name has "
            "no backslash."
        )
    path_steps(key)  # raises for a position that no list has
    return ".".join(s if _NAME_AND_ELEMENTS.fullmatch(s) else f'"{s}"' for s in segments)


def quoted_name(name: str) -> str:
    """A column as a filter names it: in quotes if its name would otherwise lead into an object or a list."""
    return f'"{name}"' if {".", "[", "]"} & set(name) else name


def is_column_name(name: Any) -> bool:
    """Whether a filter can refer to a column of this name, in quotes if it has dots."""
    return isinstance(name, str) and bool(name.strip()) and not {'"', "\\"} & set(name)


@lru_cache(maxsize=64)  # called for every item that a ranking reads
def path_steps(key: str) -> tuple[str | int | None, ...]:
    """The way to a column, outermost first: names without quotes, positions in lists, and None for all elements.

    Raises FilterError for a position of more than nine digits.
    """
    steps: list[str | int | None] = []
    for segment in _SEGMENT.findall(key):
        named = _NAME_AND_ELEMENTS.fullmatch(segment)
        name, elements = named.groups() if named else (segment, "")
        positions = _ELEMENT.findall(elements)
        if any(len(position) > _POSITION_DIGITS for position in positions):
            raise FilterError(f"{_short_repr(key)}: a position in a list has at most {_POSITION_DIGITS} digits.")
        steps += [name.strip('"'), *(int(position) if position else None for position in positions)]
    return tuple(steps)


def values_at(payload: Mapping[str, Any], key: str) -> list[Any]:
    """What a column leads to in an item: no value, one, or with `[]` one for each element of a list."""
    found: list[Any] = [payload]
    for step in path_steps(key):
        if isinstance(step, str):
            found = [value[step] for value in found if isinstance(value, Mapping) and step in value]
        else:
            chosen = slice(None) if step is None else slice(step, step + 1)
            found = [element for value in found if isinstance(value, list) for element in value[chosen]]
    return found


# ------------------------------------------------------------------------------------------------ tree -> Qdrant


def translate(
    clause: Clause,
    make_filter: Callable[..., Any],
    make_condition: Callable[[Compare], Any],
) -> Any:
    """Convert a tree into an engine's filter.

    Args:
        clause: a tree from `parse`.
        make_filter: the engine's `Filter(must=…, should=…, must_not=…)`.
        make_condition: returns the engine's condition for one comparison. "exists" never reaches it: it becomes the
            negation of Qdrant's "empty".
    """

    def build(node: Clause) -> Any:
        match node:
            case Compare(key, "exists", _):
                return make_filter(must_not=[make_condition(Compare(key, "empty", True))])
            case Compare():
                return make_condition(node)
            case Not(part):
                return make_filter(must_not=[build(part)])
            case AllOf(parts):
                return make_filter(must=[build(part) for part in parts])
            case AnyOf(parts):
                return make_filter(should=[build(part) for part in parts])

    return make_filter(must=[build(clause)])


def range_bounds(op: str) -> tuple[str, ...]:
    """The bounds of a range that expresses a comparison of numbers or dates. "eq" is both "gte" and "lte"."""
    return ("gte", "lte") if op == "eq" else (op,)


def index_kinds(clause: Clause) -> dict[str, str | None]:
    """The kind of payload index that serves each column of a filter.

    Returns:
        JSON path -> "keyword", "float", "bool", "datetime", "geo" or "text". None if the filter compares the column
        with numbers and with dates, because no index serves both.
    """
    kinds: dict[str, str | None] = {}
    for test in comparisons(clause):
        if test.op not in ("exists", "null"):
            kind = _index_kind(test)
            first = kinds.setdefault(test.key, kind)
            if {first, kind} == {"float", "datetime"}:
                kinds[test.key] = None
    return kinds


def referenced_columns(clause: Clause) -> list[str]:
    """The columns that a filter reads, as JSON paths, each once."""
    return list(dict.fromkeys(test.key for test in comparisons(clause)))


def _index_kind(test: Compare) -> str:
    match test.value:
        case bool():
            return "bool"
        case str():
            return "text" if test.op == "contains" else "keyword"
        case tuple():
            return "keyword"
        case datetime():
            return "datetime"
        case Circle() | Box():
            return "geo"
        case _:
            return "float"


def comparisons(clause: Clause) -> Iterator[Compare]:
    """Every comparison of a filter."""
    match clause:
        case Compare():
            yield clause
        case Not(part):
            yield from comparisons(part)
        case AllOf(parts) | AnyOf(parts):
            for part in parts:
                yield from comparisons(part)
