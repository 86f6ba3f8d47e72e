"""Pages in a total order: by score or value, and by id where these are equal.

Engines return equal items in any order, and in another one for another `limit` and `offset`, so that pages would repeat
some items and hide others. A page is therefore read with one more item at each end. If a run of equal items crosses an
end, more is read until the run is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from .protocol import Record, ScoredRecord, VectorQuery

__all__ = ["Ranked", "Window", "in_total_order", "ranked_by_value", "read_page", "records_in_order"]

_WIDEN = 64  # items that a window grows by at first; doubled each time


class Ranked(NamedTuple):
    """An item of a ranking. Items compare by rank, then by id.

    Attributes:
        rank: lower is better, such as a negated score.
        id: a UUID.
    """

    rank: float
    id: str


class Window(NamedTuple):
    """A part of a ranking: `size` items after the best `start`."""

    start: int
    size: int

    @classmethod
    def around(cls, offset: int, limit: int) -> Window:
        """A page and one item at each end."""
        start = max(0, offset - 1)
        return cls(start, offset - start + limit + 1)

    def widened(self, step: int) -> Window:
        """The window with `step` more items at each end."""
        start = max(0, self.start - step)
        return Window(start, self.start - start + self.size + step)

    def page(self, found: Sequence[Ranked], offset: int, limit: int) -> list[int] | None:
        """The page in this window.

        Args:
            found: what the engine returned for the window; fewer than `size` items at the end of the ranking.
            offset: the number of items before the page.
            limit: the maximum number of items of the page.

        Returns:
            Indices of `found`, in order; None if a run of equal items crosses an end of the window and of the page.
        """
        order = sorted(range(len(found)), key=found.__getitem__)
        page = order[offset - self.start :][:limit]
        if not page:
            return page
        open_before = self.start > 0 and found[order[0]].rank == found[page[0]].rank
        open_after = len(found) >= self.size and found[order[-1]].rank == found[page[-1]].rank
        return None if open_before or open_after else page


def read_page(
    fetch: Callable[[Window], Sequence[Ranked]], offset: int, limit: int, window: Window | None = None
) -> list[Ranked]:
    """Read a page in total order from an engine, in windows that grow until one decides it. `window` is the first."""
    window, step = window or Window.around(offset, limit), _WIDEN
    while (page := window.page(found := fetch(window), offset, limit)) is None:
        window, step = window.widened(step), 2 * step
    return [found[k] for k in page]


def in_total_order(
    searches: Sequence[VectorQuery],
    ask: Callable[[Sequence[VectorQuery], Sequence[Window]], list[list[ScoredRecord]]],
    retrieve: Callable[[Sequence[str]], list[Record]],
) -> list[list[ScoredRecord]]:
    """Run searches so that equal scores are ordered by id on every page.

    Args:
        searches: the searches.
        ask: runs searches on the engine for a window of each, and not for its `limit` and `offset`. The engine orders
            equal scores as it likes.
        retrieve: returns records by id.
    """
    windows = [Window.around(search.offset, search.limit) for search in searches]
    results = []
    for search, window, found in zip(searches, windows, ask(searches, windows), strict=True):
        if all(better.score > worse.score for better, worse in pairwise(found)):  # most searches, which need no ids
            results.append(found[search.offset - window.start :][: search.limit])
            continue
        page = window.page([_ranked(scored) for scored in found], search.offset, search.limit)
        results.append(_widened(search, ask, retrieve) if page is None else [found[k] for k in page])
    return results


def _widened(
    search: VectorQuery,
    ask: Callable[[Sequence[VectorQuery], Sequence[Window]], list[list[ScoredRecord]]],
    retrieve: Callable[[Sequence[str]], list[Record]],
) -> list[ScoredRecord]:
    """The results of one search, from windows that are read without payloads."""
    bare = replace(search, with_payload=False, with_vectors=False)

    def fetch(window: Window) -> list[Ranked]:
        return [_ranked(scored) for scored in ask([bare], [window])[0]]

    window = Window.around(search.offset, search.limit).widened(_WIDEN)
    page = read_page(fetch, search.offset, search.limit, window)
    if not search.with_payload and not search.with_vectors:
        return [ScoredRecord(ranked.id, -ranked.rank, {}) for ranked in page]
    records = {record.id: record for record in retrieve([ranked.id for ranked in page])}
    return [
        ScoredRecord(
            ranked.id,
            -ranked.rank,
            records[ranked.id].payload if search.with_payload else {},
            records[ranked.id].vector if search.with_vectors else None,
        )
        for ranked in page
        if ranked.id in records  # it may have been deleted meanwhile
    ]


def _ranked(scored: ScoredRecord) -> Ranked:
    return Ranked(-scored.score, scored.id)


def ranked_by_value(point: Any, descending: bool) -> Ranked:
    """The rank of a point that an engine ordered by a column."""
    return Ranked(-point.order_value if descending else point.order_value, str(point.id))


def records_in_order(retrieve: Callable[[Sequence[str]], list[Record]], page: Sequence[Ranked]) -> list[Record]:
    """The records of a page, without those deleted meanwhile."""
    records = {record.id: record for record in retrieve([ranked.id for ranked in page])}
    return [records[ranked.id] for ranked in page if ranked.id in records]
