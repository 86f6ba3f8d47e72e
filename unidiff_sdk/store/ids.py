"""Item ids. The caller's ids are strings or integers; the engines store UUIDs."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import numpy as np

from unidiff_sdk._internal.json_values import checked_text, is_missing, to_json, unwrapped
from unidiff_sdk.errors import OptionError

__all__ = ["checked_id", "key_of", "possible_ids"]

_ID_TYPES = (str, int, np.integer, Decimal, uuid.UUID)
_LONGEST_INTEGER = len(str(-(2**63)))
_NAMESPACE = uuid.UUID("6f1c1f0e-6a52-5c0e-9d5a-3b8f0a1c7e42")


def checked_id(id: Any) -> str | int:
    """Return an id as a plain string or integer. 7 and "7" are different ids.

    A member of a StrEnum, a string of numpy and other subclasses are the plain value that they equal. A UUID is its
    string, a whole `Decimal` (an integer column of a database) is an integer, and a scalar of pyarrow is what it holds.

    Raises:
        OptionError: `id` is neither a non-empty string nor a 64-bit integer.
    """
    id = unwrapped(id)
    if isinstance(id, np.ndarray) and id.ndim == 0:
        id = id[()]
    if type(id) is str or type(id) is int:
        plain: Any = id
    elif isinstance(id, (bool, np.bool_)) or is_missing(id):
        plain = None
    else:
        plain = to_json(id, "id") if isinstance(id, _ID_TYPES) else None
    if type(plain) not in (str, int) or plain == "":
        raise OptionError(f"{id!r:.60} is not an id. Give a string that is not empty, or an integer.")
    if isinstance(plain, int) and not -(2**63) <= plain < 2**63:
        raise OptionError(f"The id is an integer of {plain.bit_length()} bits; at most 64 bits are allowed.")
    return checked_text(plain) if isinstance(plain, str) else plain


def key_of(id: Any) -> str:
    """Return the UUID that an item id is stored under. Raises OptionError as `checked_id` does."""
    plain = checked_id(id)
    return str(uuid.uuid5(_NAMESPACE, f"{type(plain).__name__}:{plain}"))


def possible_ids(id: str | int) -> list[str | int]:
    """The ids that an id from a command line, a URL or JSON can stand for: "7" is the string, or else the integer 7."""
    is_integer = isinstance(id, str) and len(id) <= _LONGEST_INTEGER and id.removeprefix("-").isdecimal()
    if is_integer and id == str(integer := int(id)) and -(2**63) <= integer < 2**63:
        return [id, integer]
    return [id]
