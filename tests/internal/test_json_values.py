"""One conversion of values to JSON, and one loader of JSON from outside."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff_sdk._internal.json_values import (
    MAX_DEPTH,
    checked_text,
    is_missing,
    number_within,
    parse_json,
    read_json,
    to_json,
)
from unidiff_sdk.errors import DataError, OptionError, UniDiffError


class Size(enum.StrEnum):
    SMALL = "S"


class Legacy(str, enum.Enum):  # noqa: UP042  # str() of such a member is "Legacy.OLD"
    OLD = "old"


class Level(enum.IntEnum):
    HIGH = 3


class Color(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Size.SMALL, "S"),
        (Legacy.OLD, "old"),
        (Level.HIGH, 3),
        (Color.RED, "red"),
        (np.str_("a"), "a"),
        (np.bool_(True), True),
        (np.int8(-3), -3),
        (np.uint64(7), 7),
        (np.float32(0.5), 0.5),
        (np.longdouble("0.25"), 0.25),
        (Decimal("79.90"), 79.9),
        (Decimal("1E+3"), 1000),
        (np.datetime64("2026-03-05T10:00:00", "ns"), "2026-03-05T10:00:00"),
        (np.datetime64("2026-03-05T10:00:00.123456789"), "2026-03-05T10:00:00.123456789"),
        (np.datetime64("1969-12-31T23:59:59.500"), "1969-12-31T23:59:59.5"),
        (np.datetime64("2026-03-05T10:30"), "2026-03-05T10:30:00"),
        (np.datetime64("2026-03"), "2026-03-01"),
        (np.datetime64("NaT"), None),
        (np.timedelta64("NaT"), None),
        (np.timedelta64(1500, "ms"), 1.5),
        (timedelta(minutes=2), 120.0),
        (date(2026, 3, 5), "2026-03-05"),
        (time(10, 30), "10:30:00"),
        (datetime(2026, 3, 5, 10, tzinfo=timezone(timedelta(hours=1))), "2026-03-05T10:00:00+01:00"),
        (datetime(1890, 1, 1, 1, tzinfo=timezone(timedelta(minutes=53, seconds=28))), "1890-01-01T00:06:32+00:00"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (np.array([1, 2], np.uint8), [1, 2]),
        (np.array(["2026-03-05T10"], "M8[ns]"), ["2026-03-05T10:00:00"]),
        (np.array(3.0), 3.0),
        ({"a": (np.int64(1), [Decimal("0.5")])}, {"a": [1, [0.5]]}),
    ],
    ids=repr,
)
def test_to_json_returns_the_plain_value(value: Any, expected: Any) -> None:
    converted = to_json(value, "column")
    assert converted == expected
    assert type(converted) is type(expected)  # json.dumps would accept a subclass, engines do not
    assert json.loads(json.dumps(converted)) == expected


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        np.float32("nan"),
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("-Infinity"),
        Decimal("1E+400"),
        Decimal("0.1234567890123456789"),
        2**63,
        np.uint64(2**63),
        10**5000,
        b"\xff",
        np.bytes_(b"x"),
        1j,
        np.complex64(1),
        {1: "a"},
        {"a": {"b": math.nan}},
        np.timedelta64(1, "M"),
        np.datetime64("30000-01-01"),
        np.datetime64("-0001-01-01"),
        "\ud800",
        object(),
        np.array([object()]),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:20]}" if not isinstance(value, int) else "integer",
)
def test_to_json_refuses_what_json_cannot_hold_exactly(value: Any) -> None:
    with pytest.raises(OptionError):
        to_json(value, "column")


def test_to_json_limits_the_depth() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert to_json(value, "column") == value
    with pytest.raises(OptionError, match="nested more than 32"):
        to_json([value], "column")


def test_is_missing_recognizes_nat_and_nan() -> None:
    missing = [None, math.nan, np.float64("nan"), np.datetime64("NaT"), np.timedelta64("NaT"), Decimal("nan")]
    assert all(is_missing(value) for value in missing)
    assert not any(is_missing(value) for value in [0, "", False, [], "nan", datetime.now(UTC), np.array([1, 2])])


# ------------------------------------------------------------------------------------------------ the loader


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested more than 100"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested more than 100"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"a": "\x00"}', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
    ],
)
def test_parse_json_refuses_what_exceeds_its_limits(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_json(content, "x.json")


def test_parse_json_accepts_what_tokenizers_write() -> None:
    assert parse_json(b'\xef\xbb\xbf{"model_max_length": 1000000000000000019884624838656}', "x")["model_max_length"]
    assert math.isnan(parse_json('{"price": NaN}', "x", nan=True)["price"])


def test_read_json_reads_only_regular_files_of_limited_size(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    os.truncate(file, 64 << 30)  # sparse: takes no space, claims 64 GB
    with pytest.raises(DataError, match="at most"):
        read_json(file)
    os.mkfifo(tmp_path / "fifo")
    for path, reason in {
        tmp_path / "fifo": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path: "cannot be read|not a regular file",
        tmp_path / "absent": "no such file",
        Path("a\0b"): "cannot be read",
        file / "inside": "no such file",
    }.items():
        with pytest.raises(DataError, match=reason):
            read_json(path)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60)))
def test_parse_json_raises_only_errors_of_this_package(content: bytes | str) -> None:
    with contextlib.suppress(UniDiffError):
        assert isinstance(parse_json(content, "x"), dict)


@given(st.text(st.characters(codec="utf-8")))
def test_valid_unicode_is_returned(text: str) -> None:
    assert checked_text(text) == text


def test_lone_surrogate_is_an_error_with_its_position() -> None:
    with pytest.raises(OptionError, match=r"not valid Unicode: it has a lone surrogate .* at 4"):
        checked_text("red \ud83d dress")


@pytest.mark.parametrize("content", [b'{"a": "\\ud800"}', b'{"\\ud83d": 1}', '{"a": "\udcff"}'])
def test_lone_surrogate_is_refused(content: bytes | str) -> None:
    with pytest.raises(DataError, match="is not valid Unicode: it has a lone surrogate"):
        parse_json(content, "the row")
    assert parse_json(b'{"a": "\\ud83d\\ude42\\u0000"}', "the row") == {"a": "\U0001f642\0"}


@pytest.mark.parametrize("value", [True, None, "7", math.nan, math.inf, -1, 11, 10**40, [7], 6.5])
def test_number_within_refuses_everything_else(value: Any) -> None:
    assert number_within("steps", 7.0, 0, 10, DataError, whole=True) == 7
    with pytest.raises(DataError, match=r"steps is .*; it must be an integer from 0 to 10"):
        number_within("steps", value, 0, 10, DataError, whole=True)
