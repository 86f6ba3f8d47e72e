"""Deleted vectors in the HNSW graphs of a shard, and what searches do about them.

The engine leaves deleted vectors in its graphs, but a search does not step over them. Where the neighbors of a query
were deleted, parts of its surroundings cannot be reached. Where all entry points of a graph were deleted, which are
about ten, the engine finds nothing in it. So searches consider more candidates once vectors are deleted. They scan all
vectors where those are few, or where many are deleted, until `optimize` builds a new graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge

from unidiff_sdk.store.protocol import MAX_DELETED_SHARE, VECTOR

__all__ = ["GraphState", "deleted_from_graphs"]

_FLOAT = 4  # bytes
_REMEASURE = 0.05  # writes since the last measurement, as a share of the graphs

# Candidates per search while vectors of the graphs are deleted: the first number, plus the second times their share.
# The engine's own number is 100. With 60,000 vectors of 512 numbers and a fifth of them deleted, those nearest to the
# queries, 100 candidates find 0.80 of the nearest 10, 200 find 0.95, and 400 find 0.99.
_EF, _EF_PER_SHARE = 200, 1600


@dataclass
class GraphState:
    """How many vectors the graphs of a shard hold, and how many of them are deleted or replaced.

    Attributes:
        points: records, when it was measured.
        in_graphs: vectors in the graphs. The engine counts deleted ones, too.
        deleted: those among them that are deleted or replaced, when it was measured.
        written: ids that were written since.
    """

    points: int
    in_graphs: int = 0
    deleted: int = 0
    written: int = 0

    @classmethod
    def measure(cls, shard: edge.EdgeShard, path: Path) -> GraphState:
        """The state of an open shard. Call it while nothing is written. Waits for the disk if there are graphs."""
        info = shard.info()
        if not info.indexed_vectors_count:
            return cls(info.points_count)
        shard.flush()  # writes the marks of deleted vectors
        return cls(info.points_count, info.indexed_vectors_count, deleted_from_graphs(path))

    @property
    def is_stale(self) -> bool:
        """Whether so much was written since the measurement that it is worth another one."""
        return self.written > _REMEASURE * self.in_graphs > 0

    @property
    def unindexed(self) -> int:
        """The number of records that are not in the graphs."""
        return max(0, self.points - self.in_graphs + self.deleted)

    @property
    def deleted_share(self) -> float:
        """The deleted share of the graphs, 0 to 1, as if each id written since the measurement deleted a vector."""
        return min(1.0, (self.deleted + self.written) / self.in_graphs) if self.in_graphs else 0.0

    def search_options(self, dim: int, full_scan_kb: int, ef: int | None = None, exact: bool = False) -> dict[str, Any]:
        """Keyword arguments of the engine's search parameters that keep deleted vectors from hiding others.

        Args:
            dim: the length of the vectors.
            full_scan_kb: the engine scans segments whose vectors take at most this many kilobytes. It counts deleted
                vectors; this method counts only the others.
            ef: the caller's number of candidates. More are considered where deleted vectors could hide others.
            exact: the caller's choice to scan all vectors.
        """
        if exact:
            return {"exact": True}
        if not self.deleted_share:
            return {} if ef is None else {"hnsw_ef": ef}
        is_small = (self.points + self.written) * dim * _FLOAT <= full_scan_kb * 1024
        if is_small or self.deleted_share > MAX_DELETED_SHARE:
            return {"exact": True}
        return {"hnsw_ef": max(ef or 0, round(_EF + _EF_PER_SHARE * self.deleted_share))}


def deleted_from_graphs(path: Path) -> int:
    """The number of vectors in the graphs of a flushed shard that are deleted or replaced.

    A segment with a graph never changes, except for a file with one bit for each deleted vector.
    """
    graphs = path.glob(f"segments/*/vector_index-{VECTOR}/graph.bin")
    marks = (graph.parents[1] / "id_tracker.deleted" for graph in graphs)
    return sum(int(np.unpackbits(np.fromfile(file, np.uint8)).sum()) for file in marks if file.is_file())
