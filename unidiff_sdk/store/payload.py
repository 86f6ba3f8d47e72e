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

__all__ = ["RESERVED", "SYSTEM"]

SYSTEM = "_unidiff"
"""The key of the catalog's own values."""

RESERVED = ("id", "text", SYSTEM)
"""Names that a column of the caller must not have."""
