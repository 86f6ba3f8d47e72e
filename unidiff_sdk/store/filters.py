"""The filter language: one small dictionary for every back end.

    {"price": {"gte": 10, "lt": 80}, "brand": ["Acme", "Nord"], "color": "red",
     "not": {"pattern": "striped"}, "or": [{"type": "dress"}, {"type": "skirt"}],
     "added": {"gte": "2026-03-01"}, "text": {"contains": "linen summer"},
     "shop": {"near": {"lat": 52.5, "lon": 13.4, "radius": 5000}}}

`parse` checks it and makes a tree of `Compare`, `AllOf`, `AnyOf` and `Not`; `translate` turns that tree into Qdrant's
own filter, for Qdrant Edge or for qdrant-client. What a filter means:

- Several keys, or several operators of one key, must all hold. A bare value is `eq`, a list is `in`, None is `null`.
- A column that holds a list satisfies a comparison if one of its elements does.
- Numbers compare as 64-bit floats, so 3 equals 3.0; true is not 1 and "3" is not 3.
- `gt`, `gte`, `lt` and `lte` take a number, or a moment: an ISO 8601 string, a date (its midnight) or a datetime.
  Moments without a time zone are UTC, here and in the columns; there, one with a zone needs its seconds, too. `eq`,
  `ne` and `in` compare strings letter by letter, but dates and datetimes as moments.
- `contains` asks for every one of its words, in any order: whole words of letters and digits, upper or lower case.
- `near` is a circle, its radius in meters; `box` lies between degrees west, east, south and north (with west > east it
  spans the antimeridian); what lies on the very border may count or not. The column holds {"lat": …, "lon": …}, or a
  list of such.
- `ne` and `not` also match items that lack the column. `exists` is true of a column that holds more than null or [].
- A dot reaches into nested objects; quote a name that has a dot of its own: '"size.cm"'. Quote a column that is called
  like a connective, too: '"or"'.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any, TypeAlias

from unidiff_sdk._internal.text import checked_text
from unidiff_sdk.errors import FilterError, OptionError

__all__ = [
    "MAX_DEPTH",
    "OPERATORS",
    "AllOf",
    "AnyOf",
    "Box",
    "Circle",
    "Clause",
    "Compare",
    "Not",
    "bounds",
    "column_path",
    "columns",
    "index_kinds",
    "parse",
    "translate",
]

MAX_DEPTH = 32  # the engine recurses: at 1,000 levels it crashes the process
MAX_CLAUSES = 1024
MAX_CHOICES = 65_536  # strings of one "in", which the engine looks up in its index at once
MAX_WORDS = 10_000  # characters of one "contains"

# The engine's geo index finds nothing in a box that ends at 180° or 90°: there its geohash starts anew. In degrees.
_GEOHASH_EDGE = 1e-9

CONNECTIVES = ("and", "or", "not")
RANGES = ("gt", "gte", "lt", "lte")
OPERATORS = ("eq", "ne", "in", *RANGES, "contains", "near", "box", "exists", "null")


@dataclass(frozen=True)
class Circle:
    """What lies within `radius` meters of a place."""

    lat: float
    lon: float
    radius: float


@dataclass(frozen=True)
class Box:
    """What lies between two meridians and two parallels, in degrees; west <= east."""

    west: float
    east: float
    south: float
    north: float


# A datetime is in UTC; a tuple of strings is a choice of them.
Value: TypeAlias = str | bool | int | float | datetime | tuple[str, ...] | Circle | Box

_LISTS = (list, tuple, set, frozenset)
_PLAIN_SEGMENT = re.compile(r"[A-Za-z0-9_-]+(\[\d*\])*")
_SEGMENT = re.compile(r'"[^"]+"(?:\[\d*\])*|[^."]+')


@dataclass(frozen=True)
class Compare:
    """One comparison; `key` is a Qdrant JSON path, `op` any operator but `ne`; `in` is of strings only."""

    key: str
    op: str
    value: Value


@dataclass(frozen=True)
class AllOf:
    parts: tuple[Clause, ...]


@dataclass(frozen=True)
class AnyOf:
    parts: tuple[Clause, ...]


@dataclass(frozen=True)
class Not:
    part: Clause


Clause: TypeAlias = Compare | AllOf | AnyOf | Not


# ------------------------------------------------------------------------------------------------ dictionary -> tree


def parse(where: Mapping[str, Any] | None) -> Clause | None:
    """Check a filter and return its tree; None (no filter) for None or {}. Raises FilterError."""
    if where is None:
        return None
    clause = _group(where, depth=1)
    size = sum(1 for _ in _comparisons(clause))
    if size > MAX_CLAUSES:
        raise FilterError(f"This filter has {size:,} clauses; at most {MAX_CLAUSES:,} are allowed. Split the query.")
    return clause if clause != AllOf(()) else None


def _group(where: Any, depth: int) -> Clause:
    if not isinstance(where, Mapping):
        raise FilterError(f'A filter is a dictionary such as {{"price": {{"lt": 80}}}}, not {_show(where)}.')
    if depth > MAX_DEPTH:
        raise FilterError(f"This filter is nested more than {MAX_DEPTH} deep. Flatten it.")
    if depth > 1 and not where:
        raise FilterError('An empty filter inside "and", "or" or "not" is ambiguous: leave it out.')
    parts: list[Clause] = []
    for key, condition in where.items():
        if not isinstance(key, str) or not key:
            raise FilterError(f"A filter's keys are names of columns, not {_show(key)}.")
        if key == "not":
            parts.append(Not(_group(condition, depth + 1)))
        elif key in CONNECTIVES:
            if not isinstance(condition, (list, tuple)) or not condition:
                raise FilterError(
                    f'"{key}" takes a list of filters, not {_show(condition)}: {{"{key}": [{{…}}, {{…}}]}}.'
                )
            members = tuple(_group(member, depth + 1) for member in condition)
            parts.append(AllOf(members) if key == "and" else AnyOf(members))
        else:
            parts.extend(_conditions(column_path(key), key, condition))
    return parts[0] if len(parts) == 1 else AllOf(tuple(parts))


def _conditions(path: str, key: str, condition: Any) -> list[Clause]:
    if not isinstance(condition, Mapping):
        operator = "in" if isinstance(condition, _LISTS) else "eq"
        condition = {operator: condition}
    if not condition:
        raise FilterError(f'The condition on "{key}" is empty. Valid operators: {", ".join(OPERATORS)}.')
    return [_comparison(path, key, operator, value) for operator, value in condition.items()]


def _comparison(path: str, key: str, operator: Any, value: Any) -> Clause:
    if operator not in OPERATORS:
        raise FilterError(
            f'Unknown operator {_show(operator)} on "{key}". Valid operators: {", ".join(OPERATORS)}; '
            f"filters are joined by {', '.join(CONNECTIVES)}."
        )
    if operator in ("exists", "null"):
        if not isinstance(value, bool):
            raise FilterError(f'"{operator}" on "{key}" is true or false, not {_show(value)}.')
        test = Compare(path, operator, True)
        return test if value else Not(test)
    if operator in RANGES:
        return Compare(path, operator, _bound(key, operator, value))
    if operator == "contains":
        return Compare(path, operator, _words(key, value))
    if operator == "near":
        return Compare(path, operator, _circle(key, value))
    if operator == "box":
        boxes = tuple(Compare(path, operator, box) for box in _boxes(key, value))
        return boxes[0] if len(boxes) == 1 else AnyOf(boxes)
    if operator == "in":
        return _choice(path, key, value)
    test = Compare(path, "null", True) if value is None else Compare(path, "eq", _scalar(key, value))
    return test if operator == "eq" else Not(test)


def _choice(path: str, key: str, values: Any) -> Clause:
    if not isinstance(values, _LISTS) or not values:
        raise FilterError(f'"in" on "{key}" needs a list of at least one value, not {_show(values)}.')
    if isinstance(values, (set, frozenset)):
        values = sorted(values, key=repr)  # in one order in every process: a cursor hangs on it
    scalars = [_scalar(key, value) for value in values]
    strings = tuple(value for value in scalars if isinstance(value, str))
    if len(strings) > MAX_CHOICES:
        raise FilterError(f'"in" on "{key}" lists {len(strings):,} strings; at most {MAX_CHOICES:,} are allowed.')
    tests = [Compare(path, "eq", value) for value in scalars if not isinstance(value, str)]
    if strings:
        tests.insert(0, Compare(path, "in", strings) if len(strings) > 1 else Compare(path, "eq", strings[0]))
    return tests[0] if len(tests) == 1 else AnyOf(tuple(tests))


def _scalar(key: str, value: Any) -> str | bool | int | float | datetime:
    if isinstance(value, str):
        return _text(value)
    if _is_number(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, date):
        return _moment(value)
    raise FilterError(
        f'"{key}" is compared with {_show(value)}; a value is a string, a finite number, true, false or a date. '
        f"Filters are joined by {', '.join(CONNECTIVES)}."
    )


def _bound(key: str, operator: str, value: Any) -> int | float | datetime:
    if _is_number(value) and not isinstance(value, bool):
        return value  # type: ignore[no-any-return]
    if isinstance(value, date):
        return _moment(value)
    if isinstance(value, str):
        try:
            return _moment(datetime.fromisoformat(value))
        except ValueError:
            pass  # said below, with everything else that is no bound
    raise FilterError(
        f'"{operator}" on "{key}" needs a finite number or a date such as "2026-03-01" or "2026-03-01T12:30:00+01:00", '
        f"not {_show(value)}."
    )


def _moment(value: date) -> datetime:
    """A date or datetime as a moment in UTC."""
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise FilterError(f"{_show(value)} in UTC lies outside the years 1 to 9999.") from None


def _words(key: str, value: Any) -> str:
    if not isinstance(value, str) or not any(letter.isalnum() for letter in value):
        raise FilterError(f'"contains" on "{key}" needs words to look for, not {_show(value)}.')
    if len(value) > MAX_WORDS:
        raise FilterError(
            f'"contains" on "{key}" is {len(value):,} characters long; at most {MAX_WORDS:,} are allowed.'
        )
    return _text(value)


def _circle(key: str, value: Any) -> Circle:
    lat, lon, radius = _numbers(key, "near", value, ("lat", "lon", "radius"))
    if not (-90 <= lat <= 90 and -180 <= lon <= 180 and radius > 0):
        raise FilterError(
            f'"near" on "{key}": lat is from -90 to 90, lon from -180 to 180, radius in meters and above 0, '
            f"not {_show(value)}."
        )
    return Circle(lat, lon, radius)


def _boxes(key: str, value: Any) -> list[Box]:
    west, east, south, north = _numbers(key, "box", value, ("west", "east", "south", "north"))
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise FilterError(
            f'"box" on "{key}": west and east are from -180 to 180, south and north from -90 to 90 with south below '
            f"north, not {_show(value)}."
        )
    limit, north = 180 - _GEOHASH_EDGE, min(north, 90 - _GEOHASH_EDGE)
    if west <= east:
        return [Box(west, min(east, limit), south, north)]
    return [Box(west, limit, south, north), Box(-180.0, east, south, north)]


def _numbers(key: str, operator: str, value: Any, names: tuple[str, ...]) -> list[float]:
    if isinstance(value, Mapping) and value.keys() == set(names):
        numbers = [value[name] for name in names]
        if all(_is_number(number) and not isinstance(number, bool) for number in numbers):
            return [float(number) for number in numbers]
    example = ", ".join(f'"{name}": …' for name in names)
    raise FilterError(f'"{operator}" on "{key}" needs the numbers {{{example}}}, not {_show(value)}.')


def _text(value: str) -> str:
    try:
        return checked_text(value)
    except OptionError as error:
        raise FilterError(str(error)) from None


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return -(2**63) <= value < 2**63  # what a payload can hold
    return isinstance(value, float) and math.isfinite(value)


def column_path(key: str) -> str:
    """The JSON path of a column: segments that Qdrant's grammar does not take bare are put into quotes."""
    if not isinstance(key, str) or not key:
        raise FilterError(f"{_show(key)} is not a column: it must be the name of one.")
    segments = _SEGMENT.findall(_text(key))
    if ".".join(segments) != key:
        raise FilterError(f"{_show(key)} is not a column: a dot reaches into an object, quotes come in pairs.")
    return ".".join(s if s.startswith('"') or _PLAIN_SEGMENT.fullmatch(s) else f'"{s}"' for s in segments)


@lru_cache(maxsize=64)  # asked again for every item that is looked at
def column_names(key: str) -> tuple[str, ...]:
    """The names that a column is reached by, the outermost first, without quotes."""
    return tuple(segment.strip('"') for segment in _SEGMENT.findall(key))


def _show(value: Any) -> str:
    return _repr.repr(value)


_repr = reprlib.Repr()  # cut short, however long or deep the value is
_repr.maxstring = _repr.maxother = 60


# ------------------------------------------------------------------------------------------------ tree -> Qdrant


def translate(
    clause: Clause,
    make_filter: Callable[..., Any],
    make_test: Callable[[Compare], Any],
) -> Any:
    """Turn a tree into a back end's filter.

    Args:
        clause: from `parse`.
        make_filter: the back end's `Filter(must=…, should=…, must_not=…)`.
        make_test: the back end's condition for one comparison; `exists` is asked for as Qdrant's opposite, `empty`.
    """

    def build(node: Clause) -> Any:
        match node:
            case Compare(key, "exists", _):
                return make_filter(must_not=[make_test(Compare(key, "empty", True))])
            case Compare():
                return make_test(node)
            case Not(part):
                return make_filter(must_not=[build(part)])
            case AllOf(parts):
                return make_filter(must=[build(part) for part in parts])
            case AnyOf(parts):
                return make_filter(should=[build(part) for part in parts])

    return make_filter(must=[build(clause)])


def bounds(op: str) -> tuple[str, ...]:
    """The bounds of the range that a comparison of numbers or moments is: equal is at least and at most."""
    return ("gte", "lte") if op == "eq" else (op,)


def index_kinds(clause: Clause) -> dict[str, str | None]:
    """Which payload index serves each column: path -> "keyword", "float", "bool", "datetime", "geo" or "text".

    None where a column is compared with numbers and with moments: no index serves both.
    """
    kinds: dict[str, str | None] = {}
    for test in _comparisons(clause):
        if test.op not in ("exists", "null"):
            kind = _index_kind(test)
            first = kinds.setdefault(test.key, kind)
            if {first, kind} == {"float", "datetime"}:
                kinds[test.key] = None
    return kinds


def columns(clause: Clause) -> list[str]:
    """The columns that a filter asks about, as JSON paths, each once."""
    return list(dict.fromkeys(test.key for test in _comparisons(clause)))


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


def _comparisons(clause: Clause) -> Iterator[Compare]:
    match clause:
        case Compare():
            yield clause
        case Not(part):
            yield from _comparisons(part)
        case AllOf(parts) | AnyOf(parts):
            for part in parts:
                yield from _comparisons(part)
