"""The payload schema: the JSON object that a store keeps with each vector.

{
    "id": "D-17",                       the caller's id, a string or an integer
    "text": "red striped dress",        the caption; absent if the item has none
    "price": 79.0, "brand": "Acme",     the caller's columns, under any other name
    "_unidiff": {                       values of the catalog itself
        "sha256": "3fa9…",              hash of the image; items with the same image share one file
        "uri": "images/3f/3fa9….png",   location of the image (`images.ImageStore`)
        "source": "../products"         folder or table that the item was indexed from; absent for other items
    }
}
"""

from __future__ import annotations

from typing import Any

from unidiff_sdk.errors import OptionError, StoreError

from .ids import key_of

__all__ = ["RESERVED", "SYSTEM", "is_item", "system_of"]

SYSTEM = "_unidiff"
"""The key of the catalog's own values."""

RESERVED = ("id", "text", SYSTEM)
"""Names that a column of the caller must not have."""

_OPTIONAL_TEXT = (str, type(None))


def is_item(key: str, payload: Any) -> bool:
    """Whether a payload has this schema and belongs to the record with the id `key`."""
    try:
        return _system(payload) is not None and key_of(payload["id"]) == key
    except OptionError:  # not an id
        return False


def system_of(payload: Any) -> dict[str, Any]:
    """The catalog's own values in a payload. Raises StoreError if it does not have this schema."""
    system = _system(payload)
    if system is None:
        raise StoreError(
            f"An item is damaged: its payload is {payload!r:.200}, which lacks an id, or the hash and the URI of an "
            "image. catalog.check() lists damaged items. Restore the catalog from a backup, or add them again."
        )
    return system


def _system(payload: Any) -> dict[str, Any] | None:
    # Structural pattern matching takes four times as long, for each hit of a search, and `str | None` makes a new type.
    try:
        system: dict[str, Any] = payload[SYSTEM]
        is_valid = (
            isinstance(payload["id"], (str, int))
            and isinstance(system["sha256"], str)
            and isinstance(system["uri"], str)
            and isinstance(payload.get("text"), _OPTIONAL_TEXT)
            and isinstance(system.get("source"), _OPTIONAL_TEXT)
        )
    except (AttributeError, KeyError, TypeError):
        return None
    return system if is_valid else None
