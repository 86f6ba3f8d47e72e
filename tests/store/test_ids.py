"""Item ids: plain strings and integers, whatever class they are given as."""

from __future__ import annotations

import enum
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from unidiff_sdk._internal.json_values import to_json
from unidiff_sdk.errors import OptionError
from unidiff_sdk.retrieval.options import SearchOptions
from unidiff_sdk.store.filters import parse
from unidiff_sdk.store.ids import checked_id, key_of, possible_ids


class Sku(enum.StrEnum):
    BOOTS = "boots-1"


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (Sku.BOOTS, "boots-1"),
        (np.str_("boots-1"), "boots-1"),
        (np.int32(7), 7),
        (np.uint64(7), 7),
        (enum.IntEnum("Number", {"SEVEN": 7}).SEVEN, 7),
        (Decimal("7"), 7),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    ],
    ids=repr,
)
def test_an_id_of_another_class_is_the_plain_value(given: Any, plain: str | int) -> None:
    assert checked_id(given) == plain
    assert type(checked_id(given)) is type(plain)
    assert key_of(given) == key_of(plain)


def test_scalars_of_pyarrow_and_torch_are_what_they_hold_at_every_door() -> None:
    pa = pytest.importorskip("pyarrow")
    for scalar, value in ((pa.scalar(7), 7), (pa.scalar("boots-1"), "boots-1"), (pa.scalar(7, pa.uint8()), 7)):
        assert checked_id(scalar) == value == to_json(scalar, "x") and key_of(scalar) == key_of(value)
        assert parse({"a": scalar}) == parse({"a": value}) == parse({"a": [scalar]})
    assert parse({"a": pa.array([1, 2])}) == parse({"a": {"in": pa.array([1, 2])}}) == parse({"a": [1, 2]})
    day = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert parse({"a": {"lt": pa.scalar(day)}}) == parse({"a": {"lt": day}})
    assert to_json({"a": pa.scalar({"b": [1, None]}), "c": pa.array([day])}, "x") == {
        "a": {"b": [1, None]},
        "c": ["2026-03-01T12:00:00+00:00"],
    }
    assert SearchOptions(limit=pa.scalar(5)).limit == 5  # type: ignore[arg-type]
    for invalid in (pa.scalar(None), pa.scalar(1.0), pa.scalar(True), pa.scalar(b"x"), pa.array([1])):
        with pytest.raises(OptionError, match="is not an id"):
            checked_id(invalid)
    torch = pytest.importorskip("torch")
    assert (checked_id(torch.tensor(7)), to_json(torch.tensor([1.5, 2]), "x")) == (7, [1.5, 2.0])
    assert parse({"a": {"gt": torch.tensor(3)}}) == parse({"a": {"gt": 3}})


def test_a_number_and_its_digits_are_different_ids() -> None:
    assert key_of(7) != key_of("7")


@pytest.mark.parametrize("id", ["", None, True, np.bool_(True), 1.0, np.float64(1), Decimal("1.5"), b"a", 2**63, [1]])
def test_other_values_are_no_ids(id: Any) -> None:
    with pytest.raises(OptionError):
        key_of(id)


def test_a_very_long_integer_is_no_id() -> None:
    with pytest.raises(OptionError, match="at most 64"):
        key_of(10**5000)


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("7", ["7", 7]),
        ("-7", ["-7", -7]),
        (7, [7]),
        ("007", ["007"]),
        ("-0", ["-0"]),
        ("\u0667", ["\u0667"]),  # a decimal digit that is not ASCII
        ("7.0", ["7.0"]),
        ("-", ["-"]),
        (str(2**63 - 1), [str(2**63 - 1), 2**63 - 1]),
        (str(-(2**63)), [str(-(2**63)), -(2**63)]),
        (str(2**63), [str(2**63)]),
        ("9" * 5000, ["9" * 5000]),
        ("D-17", ["D-17"]),
    ],
)
def test_ids_from_text_stand_for_strings_or_integers(id: str | int, expected: list[str | int]) -> None:
    found = possible_ids(id)
    assert found == expected and [type(each) for each in found] == [type(each) for each in expected]
