"""The rows that the processes of bulk indexing pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["RawRow"]


@dataclass(frozen=True)
class RawRow:
    """A row whose image is not decoded yet.

    Attributes:
        image: its bytes; a path that all machines can read; or with `url`, a name in object storage.
        url: the object storage that holds `image` and `caption`.
        caption: the name of the text file that holds the caption.
    """

    image: bytes | str
    text: str
    payload: dict[str, Any]
    name: str
    line: int
    url: str | None = None
    caption: str | None = None
