"""The filter language: one small dictionary for every back end.

    {"price": {"gte": 10, "lt": 80}, "brand": ["Acme", "Nord"], "colour": "red",
     "not": {"pattern": "striped"}, "or": [{"type": "dress"}, {"type": "skirt"}]}

`parse` checks it and makes a tree of `Compare`, `AllOf`, `AnyOf` and `Not`; `translate` turns that tree into Qdrant's
own filter, for Qdrant Edge or for qdrant-client. What a filter means:

- Several keys, or several operators of one key, must all hold. A bare value is `eq`, a list is `in`, None is `null`.
- A column that holds a list satisfies a comparison if one of its elements does.
- Numbers compare as 64-bit floats, so 3 equals 3.0; true is not 1 and "3" is not 3.
- `ne` and `not` also match items that lack the column. `exists` is true of a column that holds more than null or [].
- A dot reaches into nested objects; quote a name that has a dot of its own: '"size.cm"'. Quote a column that is called
  like a connective, too: '"or"'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import FilterError

__all__ = ["OPERATORS", "AllOf", "AnyOf", "Clause", "Compare", "Not", "index_kinds", "parse", "translate"]

MAX_DEPTH = 32  # the engine recurses: at 1,000 levels it crashes the process
MAX_CLAUSES = 1024

Scalar: TypeAlias = str | bool | int | float

CONNECTIVES = ("and", "or", "not")
RANGES = ("gt", "gte", "lt", "lte")
OPERATORS = ("eq", "ne", "in", *RANGES, "exists", "null")

_LISTS = (list, tuple, set, frozenset)
_PLAIN_SEGMENT = re.compile(r"[A-Za-z0-9_-]+(\[\d*\])*")
_SEGMENT = re.compile(r'"[^"]+"(?:\[\d*\])*|[^."]+')


@dataclass(frozen=True)
class Compare:
    """One comparison; `key` is a Qdrant JSON path, `op` is eq, a range operator, exists or null."""

    key: str
    op: str
    value: Scalar


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
    size = _size(clause)
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
            parts.extend(_conditions(_path(key), key, condition))
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
        if isinstance(value, bool) or not _is_number(value):
            raise FilterError(f'"{operator}" on "{key}" needs a finite number, not {_show(value)}.')
        return Compare(path, operator, value)
    if operator == "in":
        if not isinstance(value, _LISTS) or not value:
            raise FilterError(f'"in" on "{key}" needs a list of at least one value, not {_show(value)}.')
        choices = tuple(Compare(path, "eq", _scalar(key, choice)) for choice in value)
        return choices[0] if len(choices) == 1 else AnyOf(choices)
    test = Compare(path, "null", True) if value is None else Compare(path, "eq", _scalar(key, value))
    return test if operator == "eq" else Not(test)


def _scalar(key: str, value: Any) -> Scalar:
    if isinstance(value, str) or _is_number(value):
        return value  # type: ignore[no-any-return]
    raise FilterError(f'"{key}" is compared with {_show(value)}; a value is a string, a finite number, true or false.')


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return -(2**63) <= value < 2**63  # what a payload can hold
    return isinstance(value, float) and math.isfinite(value)


def _path(key: str) -> str:
    """The JSON path of a column: segments that Qdrant's grammar does not take bare are put into quotes."""
    segments = _SEGMENT.findall(key)
    if ".".join(segments) != key:
        raise FilterError(f"{_show(key)} is not a column: a dot reaches into an object, quotes come in pairs.")
    return ".".join(s if s.startswith('"') or _PLAIN_SEGMENT.fullmatch(s) else f'"{s}"' for s in segments)


def _size(clause: Clause) -> int:
    match clause:
        case Compare():
            return 1
        case Not(part):
            return _size(part)
        case AllOf(parts) | AnyOf(parts):
            return sum(_size(part) for part in parts)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


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


def index_kinds(clause: Clause) -> dict[str, str]:
    """Which payload index serves each column of a filter: path -> "keyword", "float" or "bool"."""
    match clause:
        case Compare(_, "exists" | "null", _):
            return {}
        case Compare(key, _, value):
            return {key: "bool" if isinstance(value, bool) else "keyword" if isinstance(value, str) else "float"}
        case Not(part):
            return index_kinds(part)
        case AllOf(parts) | AnyOf(parts):
            kinds: dict[str, str] = {}
            for part in parts:
                kinds = index_kinds(part) | kinds
            return kinds
