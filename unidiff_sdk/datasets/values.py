"""The values of dataset columns: which ones are missing, and the types of CSV cells."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from unidiff_sdk._internal.json_values import is_missing
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import OptionError

__all__ = ["KINDS", "MISSING_WORDS", "CellTypes", "checked_kinds", "present_columns"]

MISSING_WORDS = frozenset(
    ["", "#N/A", "-", "--", "<NA>", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "null"]
)
"""Strings that stand for a missing value, in every format. They are what pandas, R, Excel and SQL tools write."""

KINDS = ("string", "number", "boolean")
"""The kinds that a column can be declared as."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
# 12E4 is an article number, 1.2e4 and 1e-05 are numbers. Leading zeros, "+" and "_" are not parts of a number.
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)?(\.[0-9]+([eE][+-]?[0-9]+)?|[eE]-[0-9]+)")
_BOOLEANS = {"true": True, "false": False}


def checked_kinds(kinds: Mapping[str, str] | None) -> dict[str, str]:
    """Validate declared kinds: column -> kind. Raises OptionError."""
    for column, kind in (kinds or {}).items():
        if kind not in KINDS:
            raise OptionError(f"kinds: {column!r:.60} is declared as {kind!r:.60}. Kinds: {', '.join(KINDS)}.")
    return dict(kinds or {})


def present_columns(columns: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The columns with a value. NaN inside a list or an object becomes null.

    In `id`, and in a column that is declared as strings, every non-empty string is a value. Other values of declared
    columns are converted.

    Raises:
        ValueError: a value contradicts the declared kind of its column.
    """
    present: dict[str, Any] = {}
    for name, value in columns.items():
        if isinstance(value, str):
            if value.strip() not in MISSING_WORDS or (value and (name == "id" or kinds.get(name) == "string")):
                present[name] = value
        elif isinstance(value, (list, dict)):
            present[name] = _without_nan(value)
        elif not is_missing(value):
            present[name] = value
    for name in kinds.keys() & present.keys():
        present[name] = _of_kind(name, present[name], kinds[name])
    return present


def _of_kind(column: str, value: Any, kind: str) -> Any:
    """A value as its declared kind: 38 as "38", "38" as 38, "true" as true, and each element of a list."""
    if isinstance(value, list):
        return [None if element is None else _of_kind(column, element, kind) for element in value]
    if kind == "string":
        if isinstance(value, bool):
            return str(value).lower()
        return str(value) if isinstance(value, (int, float, Decimal)) else value
    typed = _typed(value) if isinstance(value, str) else value
    is_number = isinstance(typed, (int, float, Decimal)) and not isinstance(typed, bool)
    if not (is_number if kind == "number" else isinstance(typed, bool)):
        raise ValueError(f"{column} is {value!r:.60} and the column is declared as {kind}")
    return typed


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if is_missing(value) else value


@dataclass
class _Tally:
    numbers: int = 0
    texts: int = 0
    example: str = ""
    line: int = 0


@dataclass
class CellTypes:
    """The types of CSV cells, which have none of their own.

    A cell with a number or a boolean has that type. The exception is a column in which at least half of the values are
    other text: all of its cells are strings, so that sizes (S, M, 38) and codes (00123, 7) compare with strings. One
    cell never changes the type of a whole column of numbers. An `id` depends on nothing but its own cell.

    Args:
        kinds: declared kinds of columns, which take precedence.
        strings: columns that are always strings, such as captions.
    """

    kinds: Mapping[str, str]
    strings: Collection[str] = ()
    _tallies: dict[str, _Tally] = field(default_factory=dict)

    def observe(self, line: int, cells: Mapping[str, str]) -> None:
        """Count the types of one row, before any row is converted."""
        for column, cell in cells.items():
            if cell.strip() in MISSING_WORDS or column in self.kinds or column in self.strings:
                continue
            tally = self._tallies.setdefault(column, _Tally())
            if isinstance(_typed(cell), str):
                tally.texts += 1
                tally.example, tally.line = tally.example or cell, tally.line or line
            else:
                tally.numbers += 1

    def convert(self, column: str, cell: str) -> Any:
        """The value of a cell. Cells of declared columns stay strings, which `present_columns` converts."""
        kind = self.kinds.get(column)
        if kind == "string" or column in self.strings:
            return cell
        if column == "id":
            number = _integer(cell)
            return cell if number is None else number
        value = _typed(cell)
        if cell.strip() in MISSING_WORDS:
            return None
        return cell if kind is not None or self._is_text(column) else value  # declared columns are converted later

    def warn_about_mixed_columns(self, table: str) -> None:
        """Warn about each column that holds numbers and other text, with an example."""
        for column, tally in self._tallies.items():
            if column == "id" or not (tally.numbers and tally.texts):
                continue
            result = (
                "All values are read as strings"
                if self._is_text(column)
                else "The others stay strings, which filters on numbers do not match"
            )
            warn(
                f'{table}: column "{column}" holds numbers or booleans ({tally.numbers:,}) and other values '
                f"({tally.texts:,}), such as {tally.example!r:.60} in line {tally.line}. {result}. Correct the values, "
                f'or declare the column: kinds={{"{column}": "string"}} (--kinds {column}=string).'
            )

    def _is_text(self, column: str) -> bool:
        tally = self._tallies[column]
        return tally.texts > 0 and tally.texts >= tally.numbers


def _typed(cell: str) -> str | bool | int | float:
    cell = cell.strip()
    number = _integer(cell)
    if number is not None:
        return number
    if _FLOAT.fullmatch(cell) and math.isfinite(value := float(cell)):
        return value
    return _BOOLEANS.get(cell.lower(), cell)


def _integer(cell: str) -> int | None:
    """The 64-bit integer that a cell is written as, or None."""
    if _INTEGER.fullmatch(cell) and cell != "-0" and len(cell) <= 20 and -(2**63) <= int(cell) < 2**63:
        return int(cell)
    return None
