"""Item ids. The caller's ids are strings or integers; the engines store UUIDs."""

from __future__ import annotations

import uuid
from typing import Any

from unidiff_sdk._internal.text import checked_text
from unidiff_sdk.errors import OptionError

__all__ = ["key_of"]

_NAMESPACE = uuid.UUID("6f1c1f0e-6a52-5c0e-9d5a-3b8f0a1c7e42")


def key_of(id: Any) -> str:
    """Return the UUID that an item id is stored under. 7 and "7" are different ids.

    Raises:
        OptionError: `id` is neither a non-empty string nor a 64-bit integer.
    """
    if isinstance(id, bool) or not isinstance(id, (str, int)) or id == "":
        raise OptionError(f"{id!r} is not an id: give a string that is not empty, or an integer")
    if isinstance(id, str):
        checked_text(id)
    if isinstance(id, int) and not -(2**63) <= id < 2**63:
        raise OptionError(f"the id {id} does not fit into 64 bits: give it as a string")
    return str(uuid.uuid5(_NAMESPACE, f"{type(id).__name__}:{id}"))
