"""Cursors: where a page of a search ended, in a string that stays valid while items come and go.

A cursor of a search by similarity is a place in the order of scores: the last score shown, and which of the items that
score just so were shown. What is deleted or added meanwhile neither repeats nor hides any other item. Where the order
is not that of scores (`diversity`, `hybrid`) a cursor only counts what was shown.

It holds no filter and no query, so it may be given to clients; whoever goes on repeats the query, and another query
than the one it came from is refused.
"""

from __future__ import annotations

import base64
import binascii
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unidiff_sdk.errors import OptionError
from unidiff_sdk.store import ScoredRecord, Vector

__all__ = ["Cursor"]

VERSION = 1
_HEAD = struct.Struct("<B8sIfBIH")  # version, digest, items shown, last score, by score?, ties, length of the vector
_CLOSE = 1e-6  # scores of one item in two searches differ by less, relative to 1


@dataclass(frozen=True)
class Cursor:
    """The end of a page.

    Attributes:
        digest: of the query, its filter and its order.
        shown: how many items came before.
        score: the last one shown; None where the order is not that of scores.
        ties: ids of the items shown that score (almost) the same.
        vector: the query vector, if the catalog had a part in it: so that the order stays as it was.
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
        """The end of a page in the order of scores, which had `shown` items up to and with `found`."""
        score = found[-1].score
        last = frozenset(one.id for one in found if one.score <= score + 2 * _close(score))
        if before and before.score is not None and before.score <= score + 2 * _close(score):
            last |= before.ties
        return cls(digest, shown, score, last, vector)

    def passed(self, score: float) -> bool:
        """Whether all items of this score come before the cursor."""
        return self.score is not None and score > self.score + _close(self.score)

    def covers(self, found: ScoredRecord) -> bool:
        """Whether an item was shown before this cursor, or would have been if it had been there."""
        return self.passed(found.score) or found.id in self.ties

    def __str__(self) -> str:
        vector = np.empty(0, np.float32) if self.vector is None else self.vector
        by_score = self.score is not None
        head = _HEAD.pack(VERSION, self.digest, self.shown, self.score or 0.0, by_score, len(self.ties), len(vector))
        ties = b"".join(uuid.UUID(id).bytes for id in sorted(self.ties))
        return base64.urlsafe_b64encode(head + ties + vector.astype("<f4").tobytes()).decode().rstrip("=")

    @classmethod
    def read(cls, text: str, digest: bytes, dim: int) -> Cursor:
        """The cursor that a page gave out as a string. Raises OptionError if it is none, or one of another query."""
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            version, of, shown, score, by_score, ties, size = _HEAD.unpack_from(data)
            vector = np.frombuffer(data[_HEAD.size + 16 * ties :], "<f4").astype(np.float32)
            ids = frozenset(
                str(uuid.UUID(bytes=data[k : k + 16])) for k in range(_HEAD.size, _HEAD.size + 16 * ties, 16)
            )
        except (TypeError, ValueError, binascii.Error, struct.error):
            raise OptionError(f"cursor={text!r:.60}: it is not one that a page gave out (page.cursor)") from None
        if version != VERSION or len(vector) != size or size not in (0, dim) or not np.isfinite([score, *vector]).all():
            raise OptionError(f"cursor={text!r:.60}: it is damaged, or of another catalog or version")
        if of != digest:
            raise OptionError(
                "cursor= belongs to another search: repeat the query and all arguments but limit= that its page had"
            )
        return cls(of, shown, score if by_score else None, ids, vector if size else None)


def _close(score: float) -> float:
    return _CLOSE * max(1.0, abs(score))
