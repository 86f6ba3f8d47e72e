"""Near-duplicates: items linked by a cosine above a threshold, grouped into connected components."""

from __future__ import annotations

from dataclasses import replace

from unidiff_sdk._internal.json_values import plain_number
from unidiff_sdk.errors import OptionError
from unidiff_sdk.store import Record, ScoredRecord, Store, VectorQuery
from unidiff_sdk.store.filters import Clause

__all__ = ["near_duplicates"]

NEIGHBORS = 32  # retrieved for each item; larger groups are found through chains of links
BATCH_SIZE = 128
ROUNDING = 1e-5  # identical images have a cosine of 1 except for rounding


def near_duplicates(store: Store, threshold: float, where: Clause | None) -> list[list[ScoredRecord]]:
    """Find the connected components of "cosine at least `threshold`" with two members or more, largest first.

    The score of each member is its highest cosine to another. Links come from an (approximate) search for the nearest
    `NEIGHBORS` items.

    Raises:
        OptionError: `threshold` is not above 0 and at most 1.
    """
    threshold = plain_number(threshold)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise OptionError(f"threshold={threshold!r}: give a cosine above 0 and at most 1")
    parent: dict[str, str] = {}
    members: dict[str, ScoredRecord] = {}

    def root(id: str) -> str:
        while parent.setdefault(id, id) != id:
            parent[id] = id = parent[parent[id]]  # halve the path on the way
        return id

    for records in store.scroll(BATCH_SIZE, where):
        for record, neighbors in zip(records, store.query_batch(_searches(records, threshold, where)), strict=True):
            others = [found for found in neighbors if found.id != record.id]
            if not others:
                continue
            members[record.id] = ScoredRecord(record.id, others[0].score, record.payload)
            for found in others:
                parent[root(record.id)] = root(found.id)

    groups: dict[str, list[ScoredRecord]] = {}
    for id, found in members.items():
        groups.setdefault(root(id), []).append(found)
    ranked = [sorted(group, key=lambda found: (-found.score, found.id)) for group in groups.values() if len(group) > 1]
    return sorted(ranked, key=lambda group: (-len(group), -group[0].score, group[0].id))


def _searches(records: list[Record], threshold: float, where: Clause | None) -> list[VectorQuery]:
    base = VectorQuery(records[0].vector, NEIGHBORS + 1, where=where, min_score=threshold - ROUNDING)
    return [replace(base, vector=record.vector) for record in records]
