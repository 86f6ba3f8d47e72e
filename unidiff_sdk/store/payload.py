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

from unidiff_sdk.errors import OptionError

from .ids import key_of

__all__ = ["RESERVED", "SYSTEM", "is_item"]

SYSTEM = "_unidiff"
"""The key of the catalog's own values."""

RESERVED = ("id", "text", SYSTEM)
"""Names that a column of the caller must not have."""


def is_item(key: str, payload: Any) -> bool:
    """Whether a payload has this schema and belongs to the record with the id `key`."""
    match payload:
        case {"id": str() | int() as id, "_unidiff": {"sha256": str(), "uri": str()} as system}:
            texts = payload.get("text"), system.get("source")
        case _:
            return False
    try:
        return key_of(id) == key and all(text is None or isinstance(text, str) for text in texts)
    except OptionError:  # not an id
        return False
