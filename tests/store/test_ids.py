"""Item ids: plain strings and integers, whatever class they are given as."""

from __future__ import annotations

import enum
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from unidiff_sdk.errors import OptionError
from unidiff_sdk.store.ids import checked_id, key_of


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


def test_a_number_and_its_digits_are_different_ids() -> None:
    assert key_of(7) != key_of("7")


@pytest.mark.parametrize("id", ["", None, True, np.bool_(True), 1.0, np.float64(1), Decimal("1.5"), b"a", 2**63, [1]])
def test_other_values_are_no_ids(id: Any) -> None:
    with pytest.raises(OptionError):
        key_of(id)


def test_a_very_long_integer_is_no_id() -> None:
    with pytest.raises(OptionError, match="at most 64"):
        key_of(10**5000)
