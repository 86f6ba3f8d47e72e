"""The payload schema: the keys that a stored payload has in addition to the caller's columns."""

from __future__ import annotations

__all__ = ["RESERVED", "SYSTEM"]

SYSTEM = "_unidiff"
"""The key that holds the catalog's own values: `sha256`, `uri` and, for items of a folder or table, `source`."""

RESERVED = ("id", "text", SYSTEM)
"""Names that a payload column must not have."""
