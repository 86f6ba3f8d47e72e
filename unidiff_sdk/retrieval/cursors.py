"""Cursors: the end of a page, as a string that stays valid while items are added and deleted.

A cursor of a similarity search is a position in the order of scores: the last score shown, and the ids of the items
shown with that score. Items added or deleted between two pages neither repeat nor hide any other item. Where hits are
not ordered by score (`diversity`, `hybrid`, `rerank`), a cursor only counts the items shown.

A cursor contains no query and no filter, so an application may pass it to clients. The next page needs the same query
again; a cursor of another query is refused.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unidiff_sdk.errors import OptionError
from unidiff_sdk.store import ScoredRecord, Vector

__all__ = ["Cursor"]

VERSION = 1
# version, digest, items shown, last score, whether ordered by score, number of ties, length of the vector
_HEADER = struct.Struct("<B8sIfBIH")
MAX_SHOWN = 2**31
"""The largest count of items shown. The next page adds to it, and the header has 32 bits for it."""
_TOLERANCE = 1e-6  # relative; scores of one item in two searches differ by less


@dataclass(frozen=True)
class Cursor:
    """The end of a page.

    Attributes:
        digest: identifies the query, its filter and its order.
        shown: the number of items up to the end of the page.
        score: the last score shown; None if hits are not ordered by score.
        ties: the ids of the items shown with (almost) that score.
        vector: the query vector, if it depends on the content of the catalog, so that the order stays the same.
    """

    digest: bytes
    shown: int
    score: float | None = None
    ties: frozenset[str] = frozenset()
    vector: Vector | None = None

    @classmethod
    def after(
        cls, before: Cursor | None, digest: bytes, shown: int, found: Sequence[ScoredRecord], vector: Vector | None
    ) -> Cursor:
        """The end of the page `found`, ordered by score; `shown` counts the items of all pages so far."""
        score = found[-1].score
        last = frozenset(scored.id for scored in found if scored.score <= score + 2 * _tolerance(score))
        if before and before.score is not None and before.score <= score + 2 * _tolerance(score):
            last |= before.ties
        return cls(digest, shown, score, last, vector)

    def passed(self, score: float) -> bool:
        """Whether all items with this score come before the cursor."""
        return self.score is not None and score > self.score + _tolerance(self.score)

    def covers(self, found: ScoredRecord) -> bool:
        """Whether an item comes before the cursor."""
        return self.passed(found.score) or found.id in self.ties

    def __str__(self) -> str:
        vector = np.empty(0, np.float32) if self.vector is None else self.vector
        by_score = self.score is not None
        header = _HEADER.pack(
            VERSION, self.digest, self.shown, self.score or 0.0, by_score, len(self.ties), len(vector)
        )
        ties = b"".join(uuid.UUID(id).bytes for id in sorted(self.ties))
        return base64.urlsafe_b64encode(header + ties + vector.astype("<f4").tobytes()).decode().rstrip("=")

    @classmethod
    def read(cls, text: str, digest: bytes, dim: int) -> Cursor:
        """Parse the cursor of a page. Raises OptionError if it is invalid or belongs to another query."""
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            version, read_digest, shown, score, by_score, ties, size = _HEADER.unpack_from(data)
            vector = np.frombuffer(data[_HEADER.size + 16 * ties :], "<f4").astype(np.float32)
            ids = frozenset(
                str(uuid.UUID(bytes=data[k : k + 16])) for k in range(_HEADER.size, _HEADER.size + 16 * ties, 16)
            )
        except (TypeError, ValueError, binascii.Error, struct.error):
            raise OptionError(f"cursor={text!r:.60}: not a cursor: give the attribute cursor of a Page") from None
        finite = math.isfinite(score) and bool(np.isfinite(vector).all())
        if version != VERSION or len(vector) != size or size not in (0, dim) or shown > MAX_SHOWN or not finite:
            raise OptionError(f"cursor={text!r:.60}: damaged, or from another catalog or version of unidiff-sdk")
        if read_digest != digest:
            raise OptionError(
                "cursor= belongs to another search: repeat its query and arguments; only limit= may differ"
            )
        return cls(read_digest, shown, score if by_score else None, ids, vector if size else None)


def _tolerance(score: float) -> float:
    return _TOLERANCE * max(1.0, abs(score))
